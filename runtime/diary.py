"""The scheduler's log of requests: a line per stage at debug level, and one for each that fails. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.log import get_logger
from runtime.protocol import Cancelled, Completed, Failed, FromScheduler, Progress, Request

log = get_logger("requests")


def trace_of(request: Request) -> dict[str, str]:
    """What ties a request's log lines to the HTTP call behind it: `trace`, its x-request-id, and `trace_id` (W3C)."""
    known = {"trace": request.trace, "trace_id": request.traceparent[3:35]}
    return {name: value for name, value in known.items() if value}


class Diary:
    """Remembers of every request that has not ended where it was last, and whose call it is."""

    def __init__(self) -> None:
        self._traces: dict[str, dict[str, str]] = {}
        self._stages: dict[str, str] = {}

    def submitted(self, requests: Iterable[Request]) -> None:
        self._traces |= {request.id: trace_of(request) for request in requests}

    def told(self, news: FromScheduler) -> None:
        """News of a request on its way to a gateway."""
        match news:
            case Progress(request_id, stage) if self._stages.get(request_id) != stage:
                self._stages[request_id] = stage
                log.debug("stage", request=request_id, stage=stage, **self._traces.get(request_id, {}))
            case Completed(request_id, timings):
                log.debug("completed", request=request_id, s=round(timings["total"], 3), **self._forget(request_id))
            case Cancelled(request_id, reason):
                log.debug("cancelled", request=request_id, reason=reason, **self._forget(request_id))
            case Failed(request_id, code, reason):
                log.warning("failed", request=request_id, code=code, reason=reason, **self._forget(request_id))

    def trace(self, request_id: str) -> dict[str, str]:
        return self._traces.get(request_id, {})

    def _forget(self, request_id: str) -> dict[str, str]:
        self._stages.pop(request_id, None)
        return self._traces.pop(request_id, {})
