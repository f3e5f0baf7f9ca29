"""How much may be asked: rates, requests at once, the length of the line, and when to come back. Knows no HTTP bodies.

`Admission.enter` stands between a checked request and its submission. Whoever is refused is told a time that follows
from the cost model: the scheduler's predictions of all accepted work (`MeshState.backlog_s`) and of each request.
"""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass
from typing import Self

from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.requests import Request

from gateway.auth import Caller, caller
from gateway.catalog import Catalog, Model
from gateway.jobs.runner import JobRunner
from gateway.jobs.store import Job
from gateway.middleware import answer_headers
from runtime.apikeys import Rate, parse_rate
from runtime.config import Config
from runtime.errors import InvalidInput, NotReady
from runtime.sampling import ResolvedParams

SOON_S = 1.0
LATE_S = 3600.0
LOADING_S = (2.0, 60.0)
"""Bounds of the guess at how much longer a mesh takes to become ready."""


class Refused(Exception):
    """Too much was asked: HTTP 429."""

    def __init__(self, code: str, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = min(max(retry_after_s, SOON_S), LATE_S)


@dataclass(eq=False)
class Place:
    """Room for so many generations of an account, until the block that it opens ends, or nobody knows it any more."""

    account: str
    count: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.count = 0


@dataclass(frozen=True)
class Allowance:
    """What one caller may do; None is no limit."""

    rate: Rate | None
    concurrent: int | None


class Admission:
    """One gateway's bounds. What several gateways let in together is bounded by each on its own."""

    def __init__(self, config: Config, catalog: Catalog, runner: JobRunner) -> None:
        self._config = config
        self._catalog = catalog
        self._runner = runner
        self._rate = None if config.rate_limit is None else parse_rate("rate_limit", config.rate_limit)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._places: weakref.WeakSet[Place] = weakref.WeakSet()
        """Of requests that are here without a job: images, and videos on their way into the store. Weak: the answer to
        a client that left early is dropped without a word."""
        self._unready_since = self._refused_last = time.monotonic()

    async def enter(self, request: Request, model: Model, params: ResolvedParams, count: int = 1) -> Place:
        """Let `count` generations of this shape in.

        A video needs its place until it is submitted: from then on it counts as a job.

        Raises:
            InvalidInput: more pixels than anybody may ask for.
            Refused: too many requests of this key, or of all.
        """
        asking = caller(request)
        allowed = self._allowance(asking)
        self._check_size(params, count)
        self._check_queue(model, count)
        self._check_concurrent(asking, allowed, model, count)
        place = Place(asking.name, count)
        self._places.add(place)
        await self._check_rate(request, asking, allowed, count)
        return place

    def retry_after_s(self, error: NotReady) -> float:
        """When a mesh that takes no work now may take some.

        One that drains is gone when its backlog is done. One that loads tells nobody how far it is: what has taken so
        long already is expected to take as long again.
        """
        if error.draining:
            backlog = min((model.mesh.state.backlog_s for model in self._catalog), default=0.0)
            return max(SOON_S, min(backlog, self._config.drain_timeout))
        now, (least, most) = time.monotonic(), LOADING_S
        if now - self._refused_last > most:
            self._unready_since = now
        self._refused_last = now
        return min(max(now - self._unready_since, least), most)

    def _allowance(self, asking: Caller) -> Allowance:
        key, config = asking.key, self._config
        rate = key.rate if key is not None and key.rate is not None else self._rate
        own = key.concurrent if key is not None else None
        return Allowance(rate, own if own is not None else config.max_concurrent_per_key)

    def _check_size(self, params: ResolvedParams, count: int) -> None:
        most = self._config.max_pixels
        pixels = params.width * params.height * params.num_frames * count
        if most is not None and pixels > most:
            what = f"{params.width}x{params.height} x {params.num_frames} frames x {count}"
            message = f"{what} = {pixels} pixels; at most {most} are made here in one request"
            raise InvalidInput("size", message, code="too_many_pixels")

    def _check_queue(self, model: Model, count: int) -> None:
        most = self._config.max_queue
        jobs = list(self._runner.under_way())
        # An image that runs is not told apart from one that waits.
        inside = self._held()
        waiting = sum(job.status == "queued" for job in jobs) + inside
        excess = waiting + count - most
        if most and excess > 0:
            message = f"{waiting} requests wait here, and no more than {most} may; try again later"
            raise Refused("queue_full", message, self._until_done(model, excess, len(jobs) + inside))

    def _check_concurrent(self, asking: Caller, allowed: Allowance, model: Model, count: int) -> None:
        if allowed.concurrent is None:
            return
        own = [job for job in self._runner.under_way() if job.terms.key == asking.name]
        unfinished = len(own) + self._held(asking.name)
        if unfinished + count > allowed.concurrent:
            excess = unfinished + count - allowed.concurrent
            message = f"this API key has {unfinished} unfinished requests, and no more than {allowed.concurrent} may be"
            raise Refused("rate_limit_exceeded", message, self._until_own(own, excess, model, unfinished))

    def _held(self, account: str | None = None) -> int:
        """Places that are taken, by one account or by all."""
        return sum(place.count for place in self._places if account in {None, place.account})

    def _until_done(self, model: Model, excess: int, unfinished: int) -> float:
        """Predicted seconds until so many of the unfinished requests have gone ahead, taken as equally large."""
        return model.mesh.state.backlog_s * excess / max(unfinished, 1)

    def _until_own(self, own: list[Job], excess: int, model: Model, unfinished: int) -> float:
        """Predicted seconds until so many of a caller's own requests have ended."""
        etas = sorted(job.eta_s for job in own if job.eta_s is not None)
        return etas[excess - 1] if excess <= len(etas) else self._until_done(model, excess, unfinished)

    async def _check_rate(self, request: Request, asking: Caller, allowed: Allowance, count: int) -> None:
        if allowed.rate is None:
            return
        item = RateLimitItemPerSecond(allowed.rate.amount, allowed.rate.seconds)
        let_in = await self._limiter.hit(item, asking.name, cost=count)
        window = await self._limiter.get_window_stats(item, asking.name)
        reset_s = max(window.reset_time - time.time(), 0.0)
        answer_headers(request).update(
            {
                "x-ratelimit-limit-requests": str(allowed.rate.amount),
                "x-ratelimit-remaining-requests": str(max(window.remaining, 0)),
                "x-ratelimit-reset-requests": f"{math.ceil(reset_s * 1000)}ms",
            }
        )
        if not let_in:
            message = f"this API key may make {allowed.rate.amount} requests in {allowed.rate.seconds} s"
            if count > allowed.rate.amount:
                raise InvalidInput("n", f"{count} images are more than {message}", code="rate_limit_exceeded")
            raise Refused("rate_limit_exceeded", f"{message}; {window.remaining} are left", reset_s)
