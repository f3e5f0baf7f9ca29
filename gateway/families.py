"""What meshes count, as Prometheus' metric families: a pure function of snapshots. Asks nobody.

The number of series is bounded: labels are models, meshes, ranks, stages and the accounts that a scheduler tells apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from runtime.protocol import Buckets, RankStatus, Status

PREFIX = "framemesh"
PROBE_ACCOUNT = "(probe)"
"""Whose work health probes are; it is charged to nobody and told to nobody."""
NOBODY = "(anonymous)"
"""Whose work is that of calls without a key; an empty label would be none."""
MESH = ("model", "mesh")


@dataclass(frozen=True)
class Snapshot:
    """One mesh when it was looked at."""

    model: str
    mesh: str
    """Its name among the meshes of this model."""
    status: Status | None
    """None if its scheduler did not answer."""
    stale: int
    """Messages that this gateway dropped because they were of another epoch."""
    dropped: int
    """Likewise because they could not be read."""
    dropped_chunks: int
    """Frames that nobody waited for."""


Answered = Sequence[tuple[Snapshot, Status]]


def mesh_families(snapshots: Sequence[Snapshot]) -> Iterator[Metric]:
    """Of a scheduler that did not answer only that it did not."""
    answered = [(one, one.status) for one in snapshots if one.status is not None]
    yield from _of_connections(snapshots)
    yield from _of_ranks(answered)
    yield from _of_work(answered)


def _of_connections(snapshots: Sequence[Snapshot]) -> Iterator[Metric]:
    """Our end of the connections."""
    up = _gauge("mesh_up", "Whether the mesh's scheduler answers.", MESH)
    stale = _counter("stale_messages", "Messages of another epoch that were dropped, and by whom.", (*MESH, "by"))
    dropped = _counter("dropped_messages", "Messages that could not be read, and by whom.", (*MESH, "by"))
    chunks = _counter("dropped_chunks", "Chunks of frames that nobody here waited for.", MESH)
    for one in snapshots:
        place = [one.model, one.mesh]
        up.add_metric(place, float(one.status is not None))
        chunks.add_metric(place, one.dropped_chunks)
        stale.add_metric([*place, "gateway"], one.stale)
        dropped.add_metric([*place, "gateway"], one.dropped)
        if one.status is not None:
            stale.add_metric([*place, "scheduler"], one.status.stale)
            dropped.add_metric([*place, "scheduler"], one.status.dropped)
    yield from (up, stale, dropped, chunks)


def _of_ranks(answered: Answered) -> Iterator[Metric]:
    up = _gauge("worker_up", "Whether the rank has the model and is heard.", (*MESH, "rank"))
    restarts = _counter("worker_restarts", "Losses of the worker group.", MESH)
    memory = _gauge(
        "worker_memory_bytes",
        "Of states: held, budget. Of everything during its last item: peak.",
        (*MESH, "rank", "of"),
    )
    for one, status in answered:
        restarts.add_metric([one.model, one.mesh], status.losses)
        for rank in status.ranks:
            place = [one.model, one.mesh, str(rank.rank)]
            up.add_metric(place, float(rank.ready))
            for name, value in _memory_of(rank).items():
                memory.add_metric([*place, name], value)
    yield from (up, restarts, memory)


def _memory_of(rank: RankStatus) -> dict[str, int]:
    return {"held": rank.held_bytes, "budget": rank.budget_bytes, "peak": rank.peak_bytes}


def _of_work(answered: Answered) -> Iterator[Metric]:
    requests = _gauge("mesh_requests", "Requests in the mesh, of every gateway.", (*MESH, "state"))
    steps = _histogram("denoise_step_seconds", "Each denoising step of a batch.", MESH)
    batches = _histogram("generation_batch_size", "Requests in each denoise item.", MESH)
    errors = _histogram("cost_prediction_error", "|predicted - measured| / measured of each item.", (*MESH, "stage"))
    seconds = _counter("rank_seconds", "Seconds of work times ranks by account.", (*MESH, "account"))
    for one, status in answered:
        place, totals = [one.model, one.mesh], status.totals
        running = sum(job.stage != "queued" for job in status.jobs)
        requests.add_metric([*place, "running"], running)
        requests.add_metric([*place, "waiting"], sum(status.queued.values()))
        _add(steps, place, totals.step_seconds)
        _add(batches, place, totals.batch_sizes)
        for kind, buckets in sorted(totals.cost_errors.items()):
            _add(errors, [*place, kind], buckets)
        for account, spent in sorted(totals.rank_seconds.items()):
            if account != PROBE_ACCOUNT:
                seconds.add_metric([*place, account or NOBODY], spent)
    yield from (requests, steps, batches, errors, seconds)


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)


def _counter(name: str, text: str, labels: tuple[str, ...]) -> CounterMetricFamily:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, labels=labels)


def _histogram(name: str, text: str, labels: tuple[str, ...]) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"{PREFIX}_{name}", text, labels=labels)


def _add(family: HistogramMetricFamily, labels: list[str], buckets: Buckets) -> None:
    """Counts per bucket become Prometheus' cumulative ones."""
    names = [str(bound) for bound in buckets.bounds] + ["+Inf"]
    counts = accumulate(float(count) for count in buckets.counts)
    family.add_metric(labels, list(zip(names, counts, strict=True)), buckets.total)
