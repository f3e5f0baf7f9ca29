"""Equal small requests at once against one after the other, the curve over the batch size, and the size that the cost
model chose by itself: the trace of its items tells how many steps were made in which company.

Predicted: a step costs fixed + batch * work / rate; `Line` gives both from the warm-up. At 16 tokens the fixed part is
about half of a step, so sixteen at once should need about half the time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from bench.report import machine, save, spread
from gateway.mesh import Mesh
from launch.supervisor import Supervisor
from launch.weights import resolve_model
from runtime.config import Config
from runtime.sampling import SamplingParams
from runtime.trace import TraceLine, read_trace

APART = "apart"
"""Begins the ids of those that run one after the other."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    where = machine()
    figures = asyncio.run(_measure(args))
    save("throughput", where, figures)


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    params = SamplingParams(
        prompt="a red circle moving right", seed=1, num_frames=args.frames, num_inference_steps=args.steps
    )
    curve = {}
    for size in args.sizes:
        async with _Served(Config(num_gpus=args.ranks, ulysses_degree=args.ranks, batching_max_size=size)) as mesh:
            await _at_once(mesh, params, args.requests)
            curve[size] = spread([args.requests / await _at_once(mesh, params, args.requests) for _ in range(3)])
    with tempfile.TemporaryDirectory(prefix="framemesh-") as folder:
        config = Config(num_gpus=args.ranks, ulysses_degree=args.ranks, trace_path=f"{folder}/trace.jsonl")
        async with _Served(config) as mesh:
            await _at_once(mesh, params, args.requests)
            pairs = [
                (await _one_by_one(mesh, params, args.requests), await _at_once(mesh, params, args.requests))
                for _ in range(args.pairs)
            ]
        steps = _steps_by_batch(read_trace(Path(folder, "trace.jsonl")))
    return {
        "requests": args.requests,
        "frames": args.frames,
        "ranks": args.ranks,
        "wanted_speedup": 1.5,
        "speedup_at_once_over_one_by_one": spread([apart / together for apart, together in pairs]),
        "requests_per_s_by_batching_max_size": curve,
        "batching_max_size": config.batching_max_size,
        "chosen_batch": max(steps),
        "steps_at_once_by_batch": steps,
    }


def _steps_by_batch(trace: Sequence[TraceLine]) -> dict[int, int]:
    """Size of a batch -> denoising steps that were made at it, of the requests that came together."""
    steps: Counter[int] = Counter()
    for line in trace:
        if line.rank == 0 and line.kind == "Denoise" and not any(name.startswith(APART) for name in line.requests):
            steps[len(line.requests)] += line.units
    return dict(sorted(steps.items()))


class _Served:
    """A mesh for the length of a with block."""

    def __init__(self, config: Config) -> None:
        self._supervisor = Supervisor(config, resolve_model(config.model_path), quiet=True)
        self._mesh: Mesh | None = None

    async def __aenter__(self) -> Mesh:
        await self._supervisor.start()
        self._mesh = Mesh(self._supervisor.scheduler_endpoint, self._supervisor.frames_endpoint)
        await self._mesh.start()
        await self._supervisor.wait_ready()
        await self._mesh.wait_ready(30.0)
        return self._mesh

    async def __aexit__(self, *_: object) -> None:
        assert self._mesh is not None
        await self._supervisor.drain(3.0)
        await self._mesh.close()
        await self._supervisor.stop()


async def _at_once(mesh: Mesh, params: SamplingParams, count: int) -> float:
    started = time.monotonic()
    await asyncio.gather(*(_one(mesh, params, f"together-{started}-{index}") for index in range(count)))
    return time.monotonic() - started


async def _one_by_one(mesh: Mesh, params: SamplingParams, count: int) -> float:
    started = time.monotonic()
    for index in range(count):
        await _one(mesh, params, f"{APART}-{started}-{index}")
    return time.monotonic() - started


async def _one(mesh: Mesh, params: SamplingParams, request_id: str) -> None:
    assert mesh.card is not None
    async for _ in mesh.run(mesh.request(request_id, mesh.card.check(params))):
        pass


if __name__ == "__main__":
    main()
