"""Serving under load, open loop: the same traces through every policy, whole-request FIFO, and a naive server.

The naive server runs a diffusers pipeline, one request after the other.

The traces are files (`--traces`, by default those of bench/traces/), their gaps stretched to a load that is a share of
the measured whole-request capacity: `--calibrate` requests of the first run back to back before. Every server has to
make the same frames to within 1/255, or the exit code is 1.
Predicted for 80 % short and 20 % long requests at 0.8 load: whole-request FIFO makes a short request wait for the long
ones before it (mean wait of M/G/1: load / (1 - load) times half the mean residual, about two long services); at step
boundaries with least remaining work first it waits for one item of 100 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import httpx2 as httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.report import machine, save, spread
from bench.workloads import TRACES, Arrival, at_rate, read_trace
from gateway.mesh import Frames, Mesh
from launch.process import child_environment
from launch.supervisor import Supervisor
from launch.weights import resolve_model
from runtime.config import Config
from runtime.sampling import SamplingParams, Terms

POLICIES: dict[str, dict[str, Any]] = {
    "whole-request fifo": {"scheduling_policy": "fifo", "max_active": 1, "batching_max_size": 1},
    "fifo": {"scheduling_policy": "fifo"},
    "srpt": {"scheduling_policy": "srpt"},
    "srpt, no batching": {"scheduling_policy": "srpt", "batching_max_size": 1},
    "deadline": {"scheduling_policy": "deadline"},
}
BASE = "whole-request fifo"
LARGEST_DIFFERENCE = 1
"""Between two servers' frames of one request, in 1/255: a matrix product rounds differently in company."""

Pixels = NDArray[np.uint8]


@dataclass
class Outcome:
    """One trace through one server."""

    latency_s: dict[str, float] = field(default_factory=dict)
    frames: dict[str, Pixels] = field(default_factory=dict)
    makespan_s: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--traces", type=Path, nargs="+", default=TRACES, help="files of bench.workloads")
    parser.add_argument("--requests", type=int, help="of each trace the first so many; unset: all")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--calibrate", type=int, default=40)
    parser.add_argument("--policies", nargs="+", default=[*POLICIES, "naive"])
    args = parser.parse_args()
    where = machine()
    traces = {path.stem: read_trace(path)[: args.requests] for path in args.traces}
    first = next(iter(traces.values()))
    capacity = asyncio.run(_capacity(args.ranks, first[: args.calibrate]))
    figures: dict[str, Any] = {"capacity_per_s": capacity, "load": args.load, "ranks": args.ranks}
    figures["requests"] = {name: len(trace) for name, trace in traces.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.policies}
    worst_difference = 0
    for file, own_trace in traces.items():
        trace = at_rate(own_trace, args.load * capacity)
        reference: Outcome | None = None
        for name in args.policies:
            outcome = _replay(name, args.ranks, trace)
            runs[name].append(_summary(trace, outcome))
            reference = reference or outcome
            worst_difference = max(worst_difference, _difference(reference, outcome))
            print(f"{file} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    figures["largest_difference_of_outputs_in_255"] = worst_difference
    figures["policies"] = {name: _over_seeds(values) for name, values in runs.items()}
    figures["against_whole_request_fifo"] = {name: _ratios(values, runs[BASE]) for name, values in runs.items()}
    save("serving", where, figures)
    if worst_difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"frames of one request differ by {worst_difference}/255 between two servers")


async def _capacity(ranks: int, some: Sequence[Arrival]) -> float:
    """Requests per second of whole-request FIFO when there is always one waiting."""
    burst = [msgspec.structs.replace(arrival, arrival_s=0.0) for arrival in some]
    outcome = await _through_mesh(POLICIES[BASE], ranks, burst)
    return len(burst) / outcome.makespan_s


def _replay(name: str, ranks: int, trace: Sequence[Arrival]) -> Outcome:
    if name == "naive":
        return _through_naive_server(trace)
    return asyncio.run(_through_mesh(POLICIES[name], ranks, trace))


async def _through_mesh(overrides: dict[str, Any], ranks: int, trace: Sequence[Arrival]) -> Outcome:
    """A fresh mesh per run: the same start for every policy."""
    config = Config(num_gpus=ranks, ulysses_degree=ranks, **overrides)
    supervisor = Supervisor(config, resolve_model(config.model_path), quiet=True)
    try:
        await supervisor.start()
        mesh = Mesh(supervisor.scheduler_endpoint, supervisor.frames_endpoint)
        await mesh.start()
        await supervisor.wait_ready()
        await mesh.wait_ready(30.0)

        async def one(arrival: Arrival) -> Pixels:
            assert mesh.card is not None
            params = mesh.card.check(_params(arrival))
            request = mesh.request(arrival.id, params, Terms(key=arrival.key, timeout_s=arrival.timeout_s))
            chunks = [event.pixels async for event in mesh.run(request) if isinstance(event, Frames)]
            return np.concatenate(chunks)

        outcome = await _open_loop(trace, one)
        await supervisor.drain(3.0)
        await mesh.close()
        return outcome
    finally:
        await supervisor.stop()


def _through_naive_server(trace: Sequence[Arrival]) -> Outcome:
    command = [sys.executable, "-m", "bench.naive_server", str(resolve_model("demo"))]
    server = subprocess.Popen(command, env=child_environment({}), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        return asyncio.run(_through_http(server.stdout.readline().strip(), trace))
    finally:
        server.terminate()
        server.wait()


async def _through_http(url: str, trace: Sequence[Arrival]) -> Outcome:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def one(arrival: Arrival) -> Pixels:
            words = {name: getattr(arrival, name) for name in arrival.__struct_fields__}
            response = await client.post("/generate", json=words)
            shape = (arrival.num_frames, arrival.height, arrival.width, 3)
            return np.frombuffer(response.content, dtype=np.uint8).reshape(shape)

        return await _open_loop(trace, one)


async def _open_loop(trace: Sequence[Arrival], one: Callable[[Arrival], Awaitable[Pixels]]) -> Outcome:
    """Every request goes out at its time, however far behind the server is."""
    outcome = Outcome()
    started = time.monotonic()

    async def send(arrival: Arrival) -> None:
        await asyncio.sleep(started + arrival.arrival_s - time.monotonic())
        outcome.frames[arrival.id] = await one(arrival)
        outcome.latency_s[arrival.id] = time.monotonic() - started - arrival.arrival_s

    await asyncio.gather(*(send(arrival) for arrival in trace))
    outcome.makespan_s = time.monotonic() - started
    return outcome


def _params(arrival: Arrival) -> SamplingParams:
    return SamplingParams(
        prompt=arrival.prompt,
        num_frames=arrival.num_frames,
        height=arrival.height,
        width=arrival.width,
        num_inference_steps=arrival.num_inference_steps,
        guidance_scale=arrival.guidance_scale,
        seed=arrival.seed,
    )


def _summary(trace: Sequence[Arrival], outcome: Outcome) -> dict[str, float]:
    short = [outcome.latency_s[a.id] for a in trace if a.num_frames == 1]
    long = [outcome.latency_s[a.id] for a in trace if a.num_frames > 1]
    return {
        "short_p50_s": float(np.percentile(short, 50)),
        "short_p99_s": float(np.percentile(short, 99)),
        "short_mean_s": float(np.mean(short)),
        "long_p50_s": float(np.percentile(long, 50)),
        "long_p99_s": float(np.percentile(long, 99)),
        "long_mean_s": float(np.mean(long)),
        "makespan_s": outcome.makespan_s,
    }


def _difference(reference: Outcome, outcome: Outcome) -> int:
    """The largest of any colour of any pixel; 255 if a request has other frames, or none."""
    pairs = [(frames, outcome.frames.get(name)) for name, frames in reference.frames.items()]
    return max(
        255 if other is None or own.shape != other.shape else int(np.abs(own.astype(int) - other.astype(int)).max())
        for own, other in pairs
    )


def _over_seeds(values: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: spread([value[name] for value in values]) for name in values[0]}


def _ratios(values: Sequence[dict[str, float]], base: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Per seed: how many times better the short ones' median is, and the long ones' mean against the base."""
    pairs = list(zip(values, base, strict=True))
    return {
        "short_p50_times_better": spread([b["short_p50_s"] / v["short_p50_s"] for v, b in pairs]),
        "long_mean_over_fifo": spread([v["long_mean_s"] / b["long_mean_s"] for v, b in pairs]),
    }


if __name__ == "__main__":
    main()
