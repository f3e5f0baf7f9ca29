"""A snapshot of the mesh for whoever looks at it: pure, from the scheduler and the rank table to a Status.

Reads what others own and changes nothing; knows no socket and no clock.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from runtime.fairness import order
from runtime.predictions import item_size
from runtime.protocol import (
    Decode,
    Denoise,
    Encode,
    JobStatus,
    MeshState,
    RankStatus,
    Status,
    StepTime,
    WorkerHello,
)
from runtime.request import RequestRecord, Stage
from runtime.running import Running, request_ids
from runtime.scheduler import Scheduler

MOST_QUEUED = 50
"""Queued requests that a snapshot names; the rest are counted."""


class RankEntry(Protocol):
    """What the engine knows of a rank that joined."""

    hello: WorkerHello
    last_seen: float
    ready: bool
    peak_bytes: int


@dataclass
class StepTimes:
    """The latest item of every kind against its prediction."""

    _latest: dict[str, StepTime] = field(default_factory=dict)

    def note(self, running: Running | None, seconds: float) -> None:
        """A rank took so long for its part of a running item; the slowest rank counts."""
        if running is not None:
            kind, units, batch = item_size(running.item)
            seconds = max(running.seconds, seconds)
            self._latest[kind] = StepTime(kind, batch, units, seconds / units, running.predicted_s / units)

    @property
    def latest(self) -> tuple[StepTime, ...]:
        kinds = ("encode", "denoise", "first_decode", "decode")
        return tuple(self._latest[kind] for kind in kinds if kind in self._latest)


def take_status(
    scheduler: Scheduler,
    ranks: Mapping[int, RankEntry],
    mesh: MeshState,
    prefix: str,
    now: float,
    *,
    epoch: int,
    step_times: tuple[StepTime, ...],
    stale: int,
    dropped: int,
) -> Status:
    """How the mesh stands, with the requests whose ids begin with `prefix`."""
    queued = [record for record in scheduler.requests.values() if record.stage is Stage.QUEUED]
    return Status(
        epoch=epoch,
        ready=mesh.ready,
        reason=mesh.reason,
        layout=scheduler.layout,
        policy=scheduler.policy,
        model=mesh.model.name if mesh.model is not None else "",
        losses=mesh.losses,
        ranks=_ranks(scheduler, ranks, now),
        jobs=_jobs(scheduler, prefix, now),
        queued=dict(Counter(record.key for record in queued)),
        step_times=step_times,
        cost_error=scheduler.cost.error,
        stale=stale,
        dropped=dropped,
        draining=scheduler.draining,
        totals=scheduler.tally.totals,
        prefix=prefix,
    )


def _ranks(scheduler: Scheduler, ranks: Mapping[int, RankEntry], now: float) -> tuple[RankStatus, ...]:
    items = {rank: running for running in scheduler.running.values() for rank in running.item.ranks}
    numbers = range(scheduler.layout.num_ranks)
    held = {number: scheduler.memory.held(number) for number in numbers}
    budget = scheduler.memory.budget or 0
    return tuple(_rank(n, ranks.get(n), items.get(n), held[n], budget, now) for n in numbers)


def _rank(
    number: int, entry: RankEntry | None, running: Running | None, held: int, budget: int, now: float
) -> RankStatus:
    if entry is None:
        return RankStatus(number, doing="not there")
    silent = now - entry.last_seen
    hello = entry.hello
    if running is None:
        doing = "idle" if entry.ready else "loading the model"
        load = (0.0, 0.0, held, budget, entry.peak_bytes)
        return RankStatus(number, hello.host, hello.pid, entry.ready, silent, doing, (), *load)
    return RankStatus(
        number,
        hello.host,
        hello.pid,
        entry.ready,
        silent,
        _doing(number, running),
        request_ids(running.item),
        now - running.started,
        running.predicted_s,
        held,
        budget,
        entry.peak_bytes,
    )


def _doing(rank: int, running: Running) -> str:
    if rank not in running.waiting:
        return f"waits for rank {', '.join(map(str, sorted(running.waiting)))}"
    kind, units, batch = item_size(running.item)
    match running.item:
        case Encode():
            return f"{kind} x{len(running.item.requests)}"
        case Denoise():
            return f"{kind} x{batch}, {_count(units, 'step')}"
        case Decode():
            return f"decode, {_count(units, 'chunk')}"


def _jobs(scheduler: Scheduler, prefix: str, now: float) -> tuple[JobStatus, ...]:
    """Active ones by arrival, then the head of the line; an id in full names its request alone."""
    exact = scheduler.requests.get(prefix)
    records = [exact] if exact is not None else [r for r in scheduler.requests.values() if r.id.startswith(prefix)]
    active = sorted((r for r in records if r.stage is not Stage.QUEUED), key=lambda record: record.arrived)
    line = (r for r in records if r.stage is Stage.QUEUED)
    queued = heapq.nsmallest(MOST_QUEUED, line, key=lambda record: order(record, scheduler.policy))
    return tuple(_job(scheduler, record, now) for record in [*active, *queued])


def _job(scheduler: Scheduler, record: RequestRecord, now: float) -> JobStatus:
    decoding = record.stage in {Stage.DECODE, Stage.DELIVER}
    timings = record.timings(now)
    return JobStatus(
        record.id,
        record.key,
        str(record.stage),
        record.chunk if decoding else record.step,
        record.total_chunks if decoding else record.total_steps,
        scheduler.outlook(record)[1],
        timings[str(Stage.QUEUED)],
        timings["total"],
        record.request.priority,
        record.cancel_reason is not None,
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
