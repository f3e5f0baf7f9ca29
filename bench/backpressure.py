"""A gateway that does not take its frames must cost nobody else anything: neither time nor memory.

One mesh, two gateways (real `gateway.mesh.Mesh`es of this process). The big one asks for a long video and takes its
frames at once, slowly, or not at all; the normal one runs short videos, one after the other. Beside them a run with
the normal one alone. The rounds alternate, so that a machine that gets slower does so for all.

Predicted: a gateway's 16 credits are all that is ever under way to it, so a stalled one holds 16 chunks of pixels in
its own memory and none in the workers', the ranks take up other work after its 16th chunk, and the normal one's steps
last as long as alone (ratio 1; against a big request that is served, its decode is saved).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from bench.report import machine, save, spread
from gateway.mesh import FRAME_CREDITS, Frames, Mesh
from launch.supervisor import Supervisor
from launch.weights import resolve_model
from runtime.config import Config
from runtime.sampling import SamplingParams
from runtime.trace import TraceLine, read_trace

PACES: dict[str, float] = {"at once": 0.0, "slow": 0.5, "stalled": math.inf}
"""Seconds that the big one's consumer takes for a chunk."""
BIG = SamplingParams(
    prompt="a red circle moving right", num_inference_steps=4, num_frames=161, height=128, width=128, seed=1
)
NORMAL = SamplingParams(prompt="a blue square moving left", num_inference_steps=20, num_frames=17, seed=2)
SAMPLE_S = 0.25
MIB = 1 << 20
PICTURE = Path(__file__).parent.parent / "docs" / "backpressure.png"


@dataclass
class Round:
    """One pace once."""

    pace: str
    step_s: list[float] = field(default_factory=list)
    """Of the normal one's denoising items, per step."""
    request_s: list[float] = field(default_factory=list)
    """The normal one's requests, from submission to the last frame."""
    rss_mib: list[dict[str, float]] = field(default_factory=list)
    """Of every rank and of this process, with the seconds since the round began."""
    big_chunks: int = 0
    """That the big one's consumer had taken when the normal one was done."""
    big_under_way: int = 0
    """That were decoded and not taken by then."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.backpressure", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10, help="of the normal gateway in each round")
    args = parser.parse_args()
    where = machine()
    rounds = asyncio.run(_run(args.rounds, args.requests))
    alone = [r for r in rounds if r.pace == "alone"]
    figures: dict[str, Any] = {"credits": FRAME_CREDITS}
    for pace in ("alone", *PACES):
        mine = [r for r in rounds if r.pace == pace]
        figures[pace] = {
            "step_ms": spread([1000 * s for r in mine for s in r.step_s]),
            "request_s": spread([s for r in mine for s in r.request_s]),
            "step_over_alone": spread(
                [_middle(a.step_s) / _middle(b.step_s) for a, b in zip(mine, alone, strict=True)]
            ),
            "request_over_alone": spread(
                [_middle(a.request_s) / _middle(b.request_s) for a, b in zip(mine, alone, strict=True)]
            ),
            "big_chunks_taken": spread([r.big_chunks for r in mine]),
            "big_chunks_under_way": spread([r.big_under_way for r in mine]),
            "most_rss_mib": {name: max(s[name] for r in mine for s in r.rss_mib) for name in mine[0].rss_mib[0]},
            "rss_mib": [r.rss_mib for r in mine],
        }
    if sys.argv[1:]:
        for pace in ("alone", *PACES):
            print(pace, {name: value for name, value in figures[pace].items() if name != "rss_mib"})
    else:
        save("backpressure", where, figures)
        with contextlib.suppress(ImportError):
            plot(figures, PICTURE)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Resident memory over all rounds of a pace, of the process with both gateways and of the rank that decodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for one, name in zip(axes, ("gateways", "rank 0"), strict=True):
        for pace in ("alone", *PACES):
            samples = [sample for round_ in figures[pace]["rss_mib"] for sample in round_]
            one.plot([SAMPLE_S * n for n in range(len(samples))], [s[name] for s in samples], linewidth=1, label=pace)
        one.set_title(f"{name}, MiB")
        one.set_xlabel("seconds of that pace, all rounds")
        one.set_ylim(bottom=0)
        one.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


async def _run(count: int, requests: int) -> list[Round]:
    with tempfile.TemporaryDirectory(prefix="fmpress") as folder:
        trace = Path(folder) / "trace.jsonl"
        config = Config(num_gpus=2, ulysses_degree=2, trace_path=str(trace), output_path=folder, cost_cache=folder)
        async with _mesh(config) as (supervisor, big, normal):
            ranks = [p for p in psutil.Process(supervisor.pids["workers"]).children() if "RANK" in p.environ()]
            processes = {f"rank {p.environ()['RANK']}": p for p in ranks} | {"gateways": psutil.Process()}
            # The first of each shape is slower, and teaches the cost model.
            await _one(normal, NORMAL, "warm-normal", lambda _: asyncio.sleep(0))
            await _one(big, BIG, "warm-big", lambda _: asyncio.sleep(0))
            rounds = []
            for number in range(count):
                for pace in ("alone", *PACES):
                    rounds.append(await _round(big, normal, pace, f"{pace}-{number}", requests, processes, trace))
            return rounds


@contextlib.asynccontextmanager
async def _mesh(config: Config) -> AsyncIterator[tuple[Supervisor, Mesh, Mesh]]:
    """A mesh without a gateway process, and two gateways of ours."""
    supervisor = Supervisor(config, resolve_model(config.model_path), quiet=True)
    gateways: list[Mesh] = []
    try:
        await supervisor.start()
        for name in ("", "2"):
            gateways.append(Mesh(supervisor.scheduler_endpoint, supervisor.frames_endpoint + name))
            await gateways[-1].start()
        await supervisor.wait_ready()
        for gateway in gateways:
            await gateway.wait_ready(30.0)
        yield supervisor, gateways[0], gateways[1]
        await supervisor.leave(3.0)
    finally:
        for gateway in gateways:
            await gateway.close()
        await supervisor.stop()


async def _round(
    big: Mesh,
    normal: Mesh,
    pace: str,
    name: str,
    requests: int,
    processes: dict[str, psutil.Process],
    trace: Path,
) -> Round:
    """The normal one's requests while the big one's frames are there to be taken."""
    result, began = Round(pace), time.monotonic()
    watcher = asyncio.create_task(_watch(result, processes))
    stuck: asyncio.Task[None] | None = None
    try:
        if pace != "alone":
            stuck, first = await _begin(big, name, result, PACES[pace])
            await first
        # A file tells nobody that it has grown.
        while pace == "stalled" and _decoded(read_trace(trace), name) < FRAME_CREDITS:  # noqa: ASYNC110
            await asyncio.sleep(SAMPLE_S)
        for number in range(requests):
            sent = time.monotonic()
            await _one(normal, NORMAL, f"{name}-{number}", lambda _: asyncio.sleep(0))
            result.request_s.append(time.monotonic() - sent)
        lines = read_trace(trace)
        result.step_s = _step_seconds(lines, began)
        result.big_under_way = _decoded(lines, name) - result.big_chunks
        return result
    finally:
        watcher.cancel()
        if stuck is not None:
            stuck.cancel()
            await asyncio.gather(stuck, return_exceptions=True)


async def _begin(
    big: Mesh, name: str, result: Round, chunk_s: float
) -> tuple[asyncio.Task[None], asyncio.Future[None]]:
    """The big request, and a future that is done when its first frame has come."""
    first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def consume(_frames: Frames) -> None:
        if not first.done():
            first.set_result(None)
        if math.isinf(chunk_s):
            await asyncio.Event().wait()
        await asyncio.sleep(chunk_s)
        result.big_chunks += 1

    return asyncio.create_task(_one(big, BIG, f"{name}-big", consume)), first


async def _one(mesh: Mesh, params: SamplingParams, name: str, consume: Callable[[Frames], Any]) -> None:
    assert mesh.card is not None
    async with contextlib.aclosing(mesh.run(mesh.request(name, mesh.card.check(params)))) as events:
        async for event in events:
            if isinstance(event, Frames):
                await consume(event)


async def _watch(result: Round, processes: dict[str, psutil.Process]) -> None:
    began = time.monotonic()
    while True:
        rss = {name: process.memory_info().rss / MIB for name, process in processes.items()}
        result.rss_mib.append({"at_s": round(time.monotonic() - began, 2)} | rss)
        await asyncio.sleep(SAMPLE_S)


def _decoded(lines: Sequence[TraceLine], name: str) -> int:
    """Chunks of the round's big request that left a rank."""
    return sum(line.units for line in lines if line.kind == "Decode" and f"{name}-big" in line.requests)


def _step_seconds(lines: Sequence[TraceLine], began: float) -> list[float]:
    """Per denoising item of the normal one since then, on the slower rank."""
    slowest: dict[int, float] = {}
    for line in lines:
        if line.kind == "Denoise" and line.started > began and not any(name.endswith("-big") for name in line.requests):
            slowest[line.seq] = max(slowest.get(line.seq, 0.0), (line.finished - line.started) / line.units)
    return list(slowest.values())


def _middle(values: Sequence[float]) -> float:
    return spread(values)["median"]


if __name__ == "__main__":
    main()
