"""When a request will be done, if nothing else arrives. Reads the queue and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.batching import BatchLimits, batch_budget
from runtime.fairness import order
from runtime.predictions import Predictions
from runtime.queue import Queue
from runtime.request import RequestRecord, Stage


def outlook(
    record: RequestRecord,
    active: Iterable[RequestRecord],
    queue: Queue,
    predictions: Predictions,
    limits: BatchLimits,
) -> tuple[int, float]:
    """(place in its key's line, predicted seconds until its last frame)."""
    mine = order(record, queue.policy)
    queued = record.stage is Stage.QUEUED
    others = [r for r in active if r is not record]
    # Whoever shares its forwards makes them slower, but does not run before it.
    params = record.request.params
    budget = batch_budget(predictions.cost, limits, params, predictions.runs_on("denoise", params))
    alike = (r for r in others if r.batch_key == record.batch_key and r.stage in {Stage.ENCODE, Stage.DENOISE})
    mates = {r.id for r in alike} if budget > 1 else set()
    rivals = (r for r in others if r.id not in mates and (queued or order(r, queue.policy) < mine))
    stretch = _stretch(record, 1 + len(mates), budget, predictions)
    eta = record.remaining_s * stretch + sum(r.remaining_s for r in rivals)
    if not queued:
        return 0, eta
    position, before_s = queue.line(record.key).ahead_of(record)
    # The other keys' lines take their turns in between.
    return position, eta + before_s * queue.num_lines


def _stretch(record: RequestRecord, wanted: int, budget: int, predictions: Predictions) -> float:
    """How many times longer a step takes when so many want to share it than alone."""
    params, batch = record.request.params, min(wanted, budget)
    return predictions.unit("denoise", params, batch) / predictions.unit("denoise", params) * wanted / batch
