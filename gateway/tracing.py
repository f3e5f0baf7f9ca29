"""W3C trace context: in with the HTTP call, on with the request, out as spans where an OpenTelemetry SDK is configured.

FastAPI opens the span of the HTTP call itself. Without an SDK nothing is recorded, and what the client sent travels on.
"""

from __future__ import annotations

import re
import time
from itertools import pairwise

import msgspec
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import Request

from gateway.jobs.store import Asked
from runtime.protocol import Request as Generation

TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_context = TraceContextTextMapPropagator()


def traceparent(request: Request) -> str:
    """The context to hand on: of the span of this call, or else what the client sent; empty if there is neither."""
    carrier: dict[str, str] = {}
    _context.inject(carrier)
    sent = request.headers.get("traceparent", "")
    return carrier.get("traceparent") or (sent if TRACEPARENT.fullmatch(sent) else "")


def traced(generation: Generation, asked: Asked) -> Generation:
    """The request with what ties the scheduler's and the ranks' log lines to the call behind it."""
    return msgspec.structs.replace(generation, trace=asked.request_id, traceparent=asked.traceparent)


class Stages:
    """When a request entered each stage, and at the end a span for every one of them."""

    def __init__(self) -> None:
        self._entered: list[tuple[str, int]] = []

    @property
    def last(self) -> str:
        return self._entered[-1][0] if self._entered else ""

    def enter(self, stage: str) -> None:
        """Does nothing if it is there already."""
        if stage != self.last:
            self._entered.append((stage, time.time_ns()))

    def tell(self, request_id: str, model: str, parent: str, failure: str) -> None:
        """One span for the generation under `parent` (a traceparent), with the stages inside.

        `failure` is why it ended without its frames, or empty.
        """
        tracer, ended = trace.get_tracer("framemesh"), time.time_ns()
        around = _context.extract({"traceparent": parent})
        attributes = {"framemesh.request": request_id, "framemesh.model": model}
        whole = tracer.start_span("generate", around, attributes=attributes, start_time=self._entered[0][1])
        if whole.is_recording():
            inside = trace.set_span_in_context(whole, around)
            for (stage, began), (_, over) in pairwise([*self._entered, ("", ended)]):
                tracer.start_span(stage, inside, start_time=began).end(over)
            if failure:
                whole.set_status(StatusCode.ERROR, failure)
        whole.end(ended)
