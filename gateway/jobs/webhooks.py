"""Telling receivers of a job's end, signed by Standard Webhooks, until they have heard it. Holds up no job.

    POST URL
    webhook-id: evt_…            webhook-timestamp: 1789…            webhook-signature: v1,…
    {"id": "evt_…", "object": "event", "type": "video.completed", "created_at": 1789…, "data": {"id": "video_…"}}

Any answer of 2xx ends it and 410 gives it up; all others are tried again for about a day. A receiver may hear of an
event twice, under the same webhook-id.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import random
import secrets
import stat
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import msgspec
from sqlalchemy import Executable
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks.webhooks import Webhook

from gateway.jobs.database import StoreUnavailable
from gateway.jobs.deliveries import Deliveries, Delivery
from gateway.jobs.store import Job
from gateway.outbound import check_url, open_client
from runtime.config import Config
from runtime.errors import InvalidInput
from runtime.log import get_logger

ANSWER_S = 10.0
"""How long a receiver may take to answer."""
T = TypeVar("T")
LEASE_S = 15.0
"""Longer than an attempt; after that another process takes over a delivery whose sender died."""
FIRST_PAUSE_S = 2.0
PAUSE_FACTOR = 4
LONGEST_PAUSE_S = 4 * 3600.0
RETRY_FOR_S = 24 * 3600.0
AT_ONCE = 32
"""Deliveries under way in this process."""
AT_ONCE_PER_URL = 4
LOOK_EVERY_S = 10.0
"""Rows that another process has written are found so late at most."""
ANSWER_BYTES = 64 * 1024
GONE = 410
MIN_SECRET_BYTES = 24

log = get_logger("webhooks")


class Webhooks:
    """Accepts URLs, announces endings, delivers.

    Raises:
        InvalidInput: the file of secrets cannot be used.
    """

    def __init__(self, deliveries: Deliveries, config: Config) -> None:
        self._deliveries = deliveries
        self._own_url = config.webhook_url
        self._allow_private = config.allow_private_urls
        self._signers = [] if config.webhook_secret_file is None else read_secrets(Path(config.webhook_secret_file))
        self._awake = asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()
        self._held: dict[str, Delivery] = {}
        """Taken for ourselves, by id, and without an outcome until now."""
        self._busy: Counter[str] = Counter()
        """Deliveries under way by URL."""

    async def accept(self, url: str | None) -> str | None:
        """A client's URL, if it is one that we would deliver to.

        Raises:
            InvalidInput: names `webhook_url`.
        """
        if url is None:
            return None
        if not self._signers:
            reason = "this server sends no webhooks; its operator would have to set --webhook-secret-file"
            raise InvalidInput("webhook_url", reason, code="webhooks_not_configured")
        await check_url("webhook_url", url, allow_private=self._allow_private)
        return url

    def announcing(self, job: Job, status: str) -> Sequence[Executable]:
        """What belongs into the transaction that ends a job; call `wake` after it."""
        if not self._signers:
            return ()
        urls = dict.fromkeys(url for url in (job.asked.webhook_url, self._own_url) if url is not None)
        return [self._deliveries.owing(_announcement(job.id, status, url)) for url in urls]

    def wake(self) -> None:
        """There may be something to deliver."""
        self._awake.set()

    async def run(self) -> None:
        """Deliver what is due, for ever."""
        if not self._signers:
            return
        async with await self._client(self._allow_private) as strangers, await self._client(True) as own:
            try:
                while True:
                    self._awake.clear()
                    pause = await self._deliver_due(strangers, own)
                    await self._sleep(pause)
            finally:
                for task in self._sending:
                    task.cancel()
                await asyncio.gather(*self._sending, return_exceptions=True)
                # For whoever comes next, who would wait for the end of our lease.
                with contextlib.suppress(SQLAlchemyError, StoreUnavailable):
                    for delivery in self._held.values():
                        await self._deliveries.postpone(delivery, time.time())

    async def _client(self, allow_private: bool) -> httpx2.AsyncClient:
        return await open_client(allow_private=allow_private, timeout_s=ANSWER_S, max_bytes=ANSWER_BYTES)

    async def _sleep(self, pause_s: float) -> None:
        # Not `wait_for`: before Python 3.12 that forgets a cancel which comes together with what it waits for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._awake.wait()

    async def _deliver_due(self, strangers: httpx2.AsyncClient, own: httpx2.AsyncClient) -> float:
        """Start what may be started; returns the seconds until there may be more to do."""
        try:
            # What falls due behind our last look must not be overlooked.
            looked_at = time.time()
            while len(self._sending) < AT_ONCE:
                looked_at = time.time()
                delivery = await _finished(self._take())
                if delivery is None:
                    break
                self._start(delivery, own if delivery.url == self._own_url else strangers)
            next_at = await self._deliveries.next_at(looked_at)
        except (SQLAlchemyError, StoreUnavailable):
            log.exception("deliveries could not be read")
            return LOOK_EVERY_S
        return LOOK_EVERY_S if next_at is None else max(0.01, min(next_at - time.time(), LOOK_EVERY_S))

    async def _take(self) -> Delivery | None:
        delivery = await self._deliveries.take(LEASE_S, self._full_urls())
        if delivery is not None:
            self._held[delivery.id] = delivery
        return delivery

    def _full_urls(self) -> list[str]:
        return [url for url, count in self._busy.items() if count >= AT_ONCE_PER_URL]

    def _start(self, delivery: Delivery, http: httpx2.AsyncClient) -> None:
        task = asyncio.create_task(self._deliver(delivery, http), name=f"webhook {delivery.id}")
        self._sending.add(task)
        self._busy[delivery.url] += 1

        def ended(_task: asyncio.Task[None]) -> None:
            self._sending.discard(task)
            self._busy[delivery.url] -= 1
            if not self._busy[delivery.url]:
                del self._busy[delivery.url]
            self.wake()

        task.add_done_callback(ended)

    async def _deliver(self, delivery: Delivery, http: httpx2.AsyncClient) -> None:
        outcome = await self._post(delivery, http)
        self._held.pop(delivery.id, None)
        await _finished(self._note(delivery, outcome))

    async def _note(self, delivery: Delivery, outcome: int | str) -> None:
        about = {"webhook": delivery.id, "job": delivery.job_id, "attempts": delivery.attempts, "outcome": outcome}
        try:
            if isinstance(outcome, int) and 200 <= outcome < 300:
                await self._deliveries.delivered(delivery)
                log.debug("a webhook was delivered", **about)
                return
            next_at = None if outcome == GONE else _next_at(delivery)
            await self._deliveries.postpone(delivery, next_at)
            log.warning("a webhook was not delivered", given_up=next_at is None, **about)
        except (SQLAlchemyError, StoreUnavailable):
            log.exception("the outcome of a webhook was not stored; it is sent again", **about)

    async def _post(self, delivery: Delivery, http: httpx2.AsyncClient) -> int | str:
        """The status of the answer, or why there is none."""
        body = event_body(delivery)
        now = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signer.sign(delivery.id, now, body) for signer in self._signers),
        }
        try:
            async with http.stream("POST", delivery.url, content=body, headers=headers) as answer:
                return answer.status_code
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return f"{type(error).__name__}: {error}"


async def _finished(work: Coroutine[Any, Any, T]) -> T:
    """Its result. Who is cancelled meanwhile waits for its end: what the database has done has to be known."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def event_body(delivery: Delivery) -> str:
    """The same bytes in every attempt."""
    event = {
        "id": delivery.id,
        "object": "event",
        "type": delivery.event,
        "created_at": int(delivery.created_at),
        "data": {"id": delivery.job_id},
    }
    return msgspec.json.encode(event).decode()


def read_secrets(path: Path) -> list[Webhook]:
    """One signer for each line of a file; with several, receivers may know any one of them.

    Raises:
        InvalidInput: it cannot be read, others can read it, or it holds no secrets.
    """
    field = "webhook_secret_file"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(field, f"{path} cannot be read: {error}") from error
    if mode & 0o077:
        raise InvalidInput(field, f"{path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
    try:
        signers = [_signer(line) for line in lines]
    except ValueError as error:
        raise InvalidInput(field, f"a line of {path} is no secret: {error}") from error
    if not signers:
        raise InvalidInput(field, f"{path} is empty; write whsec_ and the base64 of 32 random bytes into it")
    return signers


def _signer(line: str) -> Webhook:
    if not line.startswith("whsec_"):
        raise ValueError("it does not begin with whsec_")
    try:
        secret = base64.b64decode(line.removeprefix("whsec_"), validate=True)
    except binascii.Error as error:
        raise ValueError("it is not whsec_ and base64") from error
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"it has {len(secret)} bytes; take {MIN_SECRET_BYTES} or more, 32 say")
    return Webhook(secret)


def _announcement(job_id: str, status: str, url: str) -> Delivery:
    return Delivery(f"evt_{secrets.token_hex(16)}", job_id, f"video.{status}", url, time.time())


def _next_at(delivery: Delivery) -> float | None:
    """When to try again; None once it has been tried for long enough."""
    pause = min(FIRST_PAUSE_S * PAUSE_FACTOR ** (delivery.attempts - 1), LONGEST_PAUSE_S)
    next_at = time.time() + pause * random.uniform(0.75, 1.25)
    return next_at if next_at < delivery.created_at + RETRY_FOR_S else None
