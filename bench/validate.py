"""Whether the simulator can be believed: a real mesh serves a trace, the simulator replays it, p50 and p99 compared.

An open-loop client sends each request when the trace says, however long the queue. The scheduler process writes down
its items (`bench.simulate.RecordingScheduler`). Each trace is replayed three times: with the mean item times of its own
run; with those and the machine's slowness along the run, which is for machines that others use too; and with the
constants file, which is made of the trace whose items took least, so that the others were never seen by it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import msgspec

from bench.report import RESULTS, machine, save
from bench.simulate import (
    Alone,
    Beliefs,
    Costs,
    ItemDone,
    Ready,
    Row,
    Setup,
    Submitted,
    learn,
    measured_units,
    measured_weather,
    quantile,
    resolved,
    simulate,
    summarize,
)
from bench.workloads import LONG, SHORT, WORKLOADS, Arrival, Workload
from framemesh import Completed
from gateway.mesh import Mesh
from launch.process import Child, python_module
from launch.supervisor import Supervisor
from launch.weights import resolve_model
from runtime.config import Config
from runtime.errors import StartFailed

CONSTANTS = RESULTS / "constants_demo_2ranks.json"
REQUESTS, TRACES, JITTERS = 200, 2, 5
"""A p99 of 60 requests would be their maximum."""
WANTED = 0.2
"""Largest relative error of p50 and p99."""
REAL_POLICIES: dict[str, dict[str, Any]] = {
    "srpt": {"scheduling_policy": "srpt"},
    "fifo": {"scheduling_policy": "fifo"},
    "whole-request": {"scheduling_policy": "fifo", "batching_max_size": 1, "max_active": 1},
}


class RecordedSupervisor(Supervisor):
    """A mesh whose scheduler process writes down what it does."""

    rows: Path

    async def _spawn(
        self, name: str, command: list[str], environment: dict[str, str], announces: bool = False
    ) -> Child:
        if name == "scheduler":
            own = command[command.index("runtime") + 1 :]
            command = python_module("bench.simulate", "--record", str(self.rows), *own)
        return await super()._spawn(name, command, environment, announces)


@dataclass
class Played:
    """A trace that a real mesh has served."""

    trace: list[Arrival]
    began: float
    ends: dict[str, float]

    @property
    def seconds(self) -> list[float]:
        return [self.ends[a.id] - self.began - a.arrival_s for a in self.trace]


def main() -> None:
    """Measure, calibrate, replay, save; the figures also say how loaded the machine was."""
    parser = argparse.ArgumentParser(prog="python -m bench.validate", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--count", type=int, help="requests a trace")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--policies", nargs="+", default=["srpt"], choices=[*REAL_POLICIES])
    args = parser.parse_args()
    where = machine()
    figures: dict[str, Any] = {"wanted_error": WANTED, "constants": CONSTANTS.name}
    for policy in args.policies:
        with tempfile.TemporaryDirectory(prefix="framemesh-") as folder:
            rows_file = Path(folder) / "rows.jsonl"
            config = Config(
                num_gpus=args.ranks,
                ulysses_degree=args.ranks,
                cost_cache=folder,
                start_timeout=90,
                **REAL_POLICIES[policy],
            )
            warm, played = asyncio.run(_serve(config, rows_file, args.load, args.count or REQUESTS))
            rows = [msgspec.json.decode(line, type=Row) for line in rows_file.read_bytes().splitlines()]
        costs, compared = _compare(policy, rows, warm, played, args.ranks, where)
        figures[policy] = compared
        if policy == args.policies[0]:
            CONSTANTS.write_bytes(msgspec.json.format(msgspec.json.encode(costs)) + b"\n")
    figures["load_after"] = round(os.getloadavg()[0], 2)
    save("simulate", where, figures, variant="validation")


async def _serve(config: Config, rows: Path, load: float, count: int) -> tuple[Played, list[Played]]:
    """The warm-up, and the traces at this load by what the warm-up took."""
    supervisor = RecordedSupervisor(config, resolve_model("demo"), quiet=True)
    supervisor.rows = rows
    mesh: Mesh | None = None
    guard: asyncio.Task[None] | None = None
    try:
        await supervisor.start()
        mesh = Mesh(supervisor.scheduler_endpoint, supervisor.frames_endpoint)
        await mesh.start()
        await supervisor.wait_ready()
        await mesh.wait_ready(60.0)
        await mesh.wait_model()
        guard = asyncio.create_task(_abort_with(supervisor, mesh))
        warm = await _warm_up(mesh)
        short, long = (min(warm.seconds[n::2]) for n in (0, 1))
        rate = load / (SHORT.weight * short + LONG.weight * long)
        played = []
        for seed in range(1, TRACES + 1):
            trace = WORKLOADS["mix"].trace(rate, seed, count)
            played.append(await _play(mesh, [msgspec.structs.replace(a, id=f"{seed}-{a.id}") for a in trace]))
        guard.cancel()
        await supervisor.leave(3.0)
        return warm, played
    finally:
        if guard is not None:
            guard.cancel()
        if mesh is not None:
            await mesh.close()
        await supervisor.stop()


async def _abort_with(supervisor: Supervisor, mesh: Mesh) -> None:
    """What the supervisor cannot repair ends the run instead of leaving it silent."""
    try:
        await supervisor.watch()
    except StartFailed as error:
        mesh.abort(str(error))


async def _warm_up(mesh: Mesh) -> Played:
    """Short, long, short, long: one after the other."""
    began, trace, ends = time.monotonic(), list[Arrival](), dict[str, float]()
    for number, shape in enumerate((SHORT, LONG) * 3):
        one = Workload("warm-up", (shape,)).trace(1.0, number, 1)[0]
        arrival = msgspec.structs.replace(one, id=f"warm-{number}", arrival_s=time.monotonic() - began)
        ends[arrival.id] = await _consume(mesh, arrival)
        trace.append(arrival)
    return Played(trace, began, ends)


async def _play(mesh: Mesh, trace: list[Arrival]) -> Played:
    """Every request at its time."""
    began = time.monotonic() + 0.2
    ends: dict[str, float] = {}

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(began + arrival.arrival_s - time.monotonic())
        ends[arrival.id] = await _consume(mesh, arrival)

    await asyncio.gather(*(one(arrival) for arrival in trace))
    return Played(trace, began, ends)


async def _consume(mesh: Mesh, arrival: Arrival) -> float:
    """Takes every frame; returns when the last word came."""
    ended = 0.0
    async for event in mesh.run(mesh.request(arrival.id, resolved(arrival))):
        if isinstance(event, Completed):
            ended = time.monotonic()
    return ended


def _compare(
    policy: str, rows: Sequence[Row], warm: Played, played: Sequence[Played], ranks: int, where: dict[str, Any]
) -> tuple[Costs, dict[str, Any]]:
    params = {a.id: resolved(a) for one in (warm, *played) for a in one.trace}
    items = [row for row in rows if isinstance(row, ItemDone) and row.ids]
    believed = next(row.believed for row in rows if isinstance(row, Ready))
    setup = Setup(costs=Costs(note="", learnt=believed), ranks=ranks, as_measured=True)

    def known(until: float) -> Beliefs:
        return learn([item for item in items if item.finished < until], params, setup, believed)

    files = []
    for one in played:
        costs = _costs(rows, items, one, params)
        costs.learnt, costs.start, costs.machine = known(max(one.ends.values())), known(one.began), where
        files.append(costs)
    busy = [_real(one, items)["busy_rank_s"] for one in played]
    calmest = files[busy.index(min(busy))]
    traces = []
    for one, own in zip(played, files, strict=True):
        mine = [item for item in items if item.ids[0] in one.ends]
        setups = {
            "own_times": replace(setup, costs=own),
            "own_times_and_weather": replace(
                setup, costs=own, cv=0.0, weather=measured_weather(mine, params, own.units, one.began)
            ),
            "file": replace(setup, costs=msgspec.structs.replace(calmest, start=own.start)),
        }
        traces.append({**_real(one, items), **{name: _replayed(policy, one, each) for name, each in setups.items()}})
    return calmest, {"traces": traces, "within": {name: _within(traces, name) for name in setups}}


def _within(traces: Sequence[dict[str, Any]], replay: str) -> bool:
    return all(abs(trace[replay]["error"][name]) <= WANTED for trace in traces for name in ("p50_s", "p99_s"))


def _costs(rows: Sequence[Row], items: list[ItemDone], first: Played, params: dict[str, Any]) -> Costs:
    """A constants file of one trace."""
    inside = [item for item in items if item.ids[0] in first.ends]
    last = {request_id: item.finished for item in inside for request_id in item.ids}
    submitted = {row.id: row.now for row in rows if isinstance(row, Submitted)}
    lateness = [submitted[a.id] - first.began - a.arrival_s for a in first.trace]
    return Costs(
        note=f"Measured: {len(first.trace)} requests of the mix, demo model, CPU ranks.",
        learnt=next(row.believed for row in rows if isinstance(row, Ready)),
        units=measured_units(inside, params),
        gap_s=_mean([item.finished - item.planned - item.seconds for item in inside]),
        submit_s=_mean(lateness),
        deliver_s=_mean([first.ends[name] - last[name] for name in first.ends]),
    )


def _real(one: Played, items: Sequence[ItemDone]) -> dict[str, Any]:
    mine = [item for item in items if item.ids[0] in one.ends]
    return {
        "requests": len(one.trace),
        "real": _latencies(one),
        "items": len(mine),
        "busy_rank_s": sum(item.seconds * item.ranks for item in mine),
    }


def _replayed(policy: str, one: Played, setup: Setup) -> dict[str, Any]:
    """The mean over several draws of the jitter."""
    runs = [simulate(one.trace, policy, setup, seed) for seed in range(JITTERS)]
    alone, real = Alone(setup), _latencies(one)
    figures = [summarize(run, alone, setup.slo_scale) for run in runs]
    simulated = {name: _mean([each[name] for each in figures]) for name in real}
    return {
        "simulated": simulated,
        "error": {name: simulated[name] / real[name] - 1 for name in real},
        "items": _mean([run.items for run in runs]),
        "busy_rank_s": _mean([run.busy_rank_s for run in runs]),
    }


def _latencies(one: Played) -> dict[str, float]:
    return {"mean_s": _mean(one.seconds), **{f"p{p}_s": quantile(one.seconds, p / 100) for p in (50, 90, 99)}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
