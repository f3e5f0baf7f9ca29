"""What Prometheus reads: what this gateway counts itself, and what its meshes count. Asks no mesh and serves no route.

The number of series is bounded: labels are models, route templates and the ends that a request can come to.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.families import PREFIX, Snapshot, mesh_families
from gateway.media.metadata import version

LONG = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 150, 300, 600)
"""Seconds, of a whole request."""
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 600)
"""Seconds, of a call or of some frames."""
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
NO_ROUTE = "(none)"


class Metrics:
    """A registry of its own with every instrument of one gateway."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._snapshots: Sequence[Snapshot] = ()
        by_model = ("model",)
        self.running = self._gauge("num_requests_running", "Requests of this gateway that ranks work on.", by_model)
        self.waiting = self._gauge("num_requests_waiting", "Requests of this gateway that are in line.", by_model)
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "From submission to the last stored frame.", by_model, LONG
        )
        self.queue_time = self._histogram("request_queue_time_seconds", "In line, all attempts.", by_model, LONG)
        self.first_frame = self._histogram(
            "time_to_first_frame_seconds", "From submission to the first decoded frame.", by_model, LONG
        )
        self.requests = self._counter("requests", "Requests by how they ended.", ("model", "finished_reason"))
        self.frames = self._counter("frames", "Frames that arrived.", by_model)
        self._encoding = self._histogram("encode_seconds", "Each encoding of frames into a video.", (), SHORT)
        self._readers = self._gauge("sse_readers", "Open event streams.", ())
        self._calls = self._counter("http_requests", "HTTP calls.", ("route", "method", "status"))
        self._call_seconds = self._histogram(
            "http_request_duration_seconds", "From a call to the end of its answer.", ("route", "method"), SHORT
        )
        build = self._gauge("build_info", "1, for its labels.", ("version", "python"))
        build.labels(version(), platform.python_version()).set(1)
        self._registry.register(_Meshes(self))

    @property
    def snapshots(self) -> Sequence[Snapshot]:
        return self._snapshots

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Around each piece of work that makes a video of frames."""
        with self._encoding.time():
            yield

    @contextmanager
    def reading_events(self) -> Iterator[None]:
        """Around an event stream."""
        with self._readers.track_inprogress():
            yield

    def called(self, route: str, method: str, status: int, seconds: float) -> None:
        method = method if method in METHODS else "(other)"
        self._calls.labels(route, method, str(status)).inc()
        self._call_seconds.labels(route, method).observe(seconds)

    def tell(self, snapshots: Sequence[Snapshot], accept: str) -> tuple[bytes, str]:
        """(body, content type) for a scraper that takes what `accept` says."""
        self._snapshots = snapshots
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=bounds, registry=self._registry)


class Timing:
    """The outermost layer: counts and times every HTTP call under its route's template."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._metrics.called(route, scope["method"], status, time.monotonic() - began)


class _Meshes:
    """The latest snapshots as a collector."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return mesh_families(self._metrics.snapshots)
