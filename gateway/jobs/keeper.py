"""Which of the store's jobs this gateway works on: claims, renews, loses. Knows not how a job is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from gateway.jobs.database import StoreUnavailable
from gateway.jobs.store import Job, JobStore
from runtime.errors import FramemeshError
from runtime.log import get_logger

RENEWALS = 3
"""In the time of one lease."""
HEAR_CANCELS_S = 1.0

log = get_logger("jobs")


class Lost(Exception):
    """The job is not ours any more: another gateway works on it, or it was ended or deleted."""


class Hands(Protocol):
    """Who does the jobs."""

    def working_on(self) -> Collection[str]:
        """Ids of the jobs in hand."""

    def accepting(self) -> Collection[str]:
        """Ids of jobs that are about to be: in the store, or not yet."""

    def wanted(self) -> tuple[Collection[str], Collection[str]]:
        """Models to take jobs of, and models of which to take none now."""

    async def take_up(self, job: Job) -> None: ...

    async def lose(self, job_id: str) -> None:
        """Leave a job alone, whatever state it is in; one that is not in hand any more is none."""

    async def tidy(self, job_id: str) -> object:
        """Remove what is left of a job that was lost, if nobody needs it."""

    async def cancel(self, job_id: str, reason: str) -> None: ...


class Keeper:
    """The leases of one gateway. With SQLite nobody can take a job away, but those that were given back wait for us."""

    def __init__(self, store: JobStore, hands: Hands) -> None:
        self._store = store
        self._hands = hands
        self._renew_every_s = store.lease_s / RENEWALS
        self._tick_s = min(HEAR_CANCELS_S, self._renew_every_s) if store.shared else self._renew_every_s
        self._held_until = time.monotonic() + store.lease_s
        """When the leases run out that were renewed last, at the earliest."""

    async def claim(self) -> None:
        """Take up what nobody works on."""
        models, but = self._hands.wanted()
        for job in await self._store.claim(models, but):
            await self._hands.take_up(job)

    async def run(self) -> None:
        """For ever."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(self._tick_s)
            try:
                if time.monotonic() - renewed + self._tick_s / 2 >= self._renew_every_s:
                    renewed = time.monotonic()
                    await self._renew()
                    await self.claim()
                elif self._hands.working_on():
                    await self._cancel(await self._store.cancels(self._tick_s))
            except (FramemeshError, SQLAlchemyError, OSError) as error:
                log.warning("the leases of the jobs could not be looked after", error=str(error))

    async def _renew(self) -> None:
        began, working_on = time.monotonic(), set(self._hands.working_on())
        try:
            held = await self._store.renew(max(self._held_until - began, 0.0))
        except StoreUnavailable:
            if self._store.shared:
                await self._lose(working_on, "its lease could not be renewed")
            raise
        self._held_until = began + self._store.lease_s
        lost = working_on - held.keys()
        await self._lose(lost & {*self._hands.working_on()}, "it is not this one's any more")
        for job_id in lost:
            await self._hands.tidy(job_id)
        for job_id in held.keys() - working_on - {*self._hands.working_on(), *self._hands.accepting()}:
            # A claim whose answer was lost, or a job that could not go on without the store.
            job = await self._store.mine(job_id)
            if job is not None:
                await self._hands.take_up(job)
        await self._cancel({job_id: reason for job_id, reason in held.items() if reason is not None})

    async def _lose(self, jobs: Collection[str], reason: str) -> None:
        for job_id in jobs:
            log.warning("a job is left to other gateways", job=job_id, reason=reason)
            await self._hands.lose(job_id)

    async def _cancel(self, wanted: dict[str, str]) -> None:
        # Side by side: a mesh may be slow to answer, and the leases do not wait.
        await asyncio.gather(*(self._hands.cancel(job_id, reason) for job_id, reason in wanted.items()))
