"""One request from its submission to its end: what it counts for in the metrics, and its spans. Changes nothing."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

from prometheus_client import Gauge

from gateway.jobs.database import StoreUnavailable
from gateway.jobs.keeper import Lost
from gateway.mesh import Event, Frames
from gateway.metrics import Metrics
from gateway.tracing import Stages
from runtime.errors import NotReady, RequestFailed
from runtime.protocol import Completed, Progress

ENDS: dict[type[BaseException], str] = {
    asyncio.CancelledError: "cancelled",
    GeneratorExit: "cancelled",
    NotReady: "not_ready",
    Lost: "lost",
    StoreUnavailable: "store_unavailable",
}


class Watch:
    """A context manager around a request, to be called with each of its events.

    Args:
        metrics: where it counts.
        model: the name under which it does.
        request_id: the mesh's.
        traceparent: W3C trace context of the call behind it, or empty.
    """

    def __init__(self, metrics: Metrics, model: str, request_id: str, traceparent: str = "") -> None:
        self._metrics = metrics
        self._model = model
        self._request_id = request_id
        self._traceparent = traceparent
        self._stages = Stages()
        self._began = 0.0
        self._has_frames = self._overtaken = False

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._enter("queued")
        return self

    def __call__(self, event: Event) -> None:
        match event:
            case Progress():
                self._progressed(event.stage)
            case Frames():
                self._took(event)
            case Completed():
                self._metrics.queue_time.labels(self._model).observe(event.usage.queue_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reason = finished_reason(error)
        self._gauge(self._stages.last).dec()
        self._metrics.requests.labels(self._model, reason).inc()
        if error is None:
            self._metrics.latency.labels(self._model).observe(self._seconds)
        self._stages.tell(self._request_id, self._model, self._traceparent, "" if error is None else reason)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _progressed(self, stage: str) -> None:
        # Frames come on a socket of their own and may overtake the news that decoding has begun.
        self._overtaken = self._overtaken and stage != "queued"
        if not (self._overtaken and stage in {"encode", "denoise"}):
            self._enter(stage)

    def _took(self, frames: Frames) -> None:
        if self._stages.last not in {"decode", "deliver"}:
            self._enter("decode")
        if not self._has_frames:
            self._metrics.first_frame.labels(self._model).observe(self._seconds)
        self._has_frames = self._overtaken = True
        self._metrics.frames.labels(self._model).inc(frames.count)

    def _enter(self, stage: str) -> None:
        if self._stages.last:
            self._gauge(self._stages.last).dec()
        self._stages.enter(stage)
        self._gauge(stage).inc()

    def _gauge(self, stage: str) -> Gauge:
        metrics = self._metrics
        return (metrics.waiting if stage == "queued" else metrics.running).labels(self._model)


def finished_reason(error: BaseException | None) -> str:
    """One word for how a request ended here: completed, cancelled, why somebody else goes on with it, or the code of
    its failure."""
    if error is None:
        return "completed"
    if isinstance(error, RequestFailed):
        return error.code
    return next((word for kind, word in ENDS.items() if isinstance(error, kind)), "internal_error")
