"""What is no longer wanted goes: jobs that expired, with their files, and files that nothing refers to any more."""

from __future__ import annotations

import asyncio
import math
import time

from sqlalchemy.exc import SQLAlchemyError

from gateway.inputs import Inputs
from gateway.jobs.bucket import StorageFailed
from gateway.jobs.database import StoreUnavailable
from gateway.jobs.deliveries import Deliveries
from gateway.jobs.outputs import OldFile, Outputs
from gateway.jobs.store import JobStore
from runtime.log import get_logger

SWEEP_EVERY_S = 60.0
LIST_EVERY_S = 600.0
"""Listing a bucket costs requests, and a folder may be large."""
ORPHAN_S = 3600.0
"""Younger files may belong to a job whose row is being written, and copies may still be read."""
LONGEST_JOB_S = 24 * 3600.0
"""From acceptance to end; a job's own pictures have to outlast it."""
DELIVERIES_S = 2 * 24 * 3600.0
"""Twice as long as anybody tries."""
BATCH = 200

log = get_logger("sweeper")


class Sweeper:
    """One task. Two gateways that sweep the same things do no harm: what is gone is gone.

    Args:
        keep_s: how long results are kept; 0 is for ever.
    """

    def __init__(
        self, store: JobStore, outputs: Outputs, inputs: Inputs, deliveries: Deliveries, keep_s: float
    ) -> None:
        self._store = store
        self._outputs = outputs
        self._inputs = inputs
        self._deliveries = deliveries
        self._keep_s = keep_s or math.inf
        self._listed_at = -math.inf

    async def run(self) -> None:
        """For ever; a database or bucket that is gone is swept later."""
        while True:
            try:
                await self.sweep()
            except (SQLAlchemyError, StoreUnavailable, StorageFailed, OSError):
                log.exception("could not sweep")
            await asyncio.sleep(SWEEP_EVERY_S)

    async def sweep(self, *, everything: bool = False) -> None:
        """Once: expired jobs, and now and then (or if `everything`) the files.

        Raises:
            StorageFailed: the bucket does not answer.
            SQLAlchemyError: the database does not.
        """
        await self._expire()
        if everything or time.monotonic() - self._listed_at > LIST_EVERY_S:
            self._listed_at = time.monotonic()
            await self._drop_images()
            await self._inputs.drop_unused(time.time() - self._keep_s - LONGEST_JOB_S)
            await self._drop_orphans()
            await self._outputs.trim_cache(time.time() - ORPHAN_S)
            await self._deliveries.prune(time.time() - DELIVERIES_S)

    async def _expire(self) -> None:
        while ids := await self._store.expired(time.time(), BATCH):
            # Files first: if this process dies in between, the rows are still there to say what to delete.
            await self._outputs.delete(*ids)
            for job_id in ids:
                await self._store.delete(job_id)
            log.info("results expired", jobs=len(ids))

    async def _drop_images(self) -> None:
        if self._keep_s == math.inf:
            return
        async for page in self._outputs.old_files("images", time.time() - self._keep_s):
            await self._outputs.discard(page)

    async def _drop_orphans(self) -> None:
        """Files without a row. A result may have been moved here, or its database away: it has its whole time."""
        async for page in self._outputs.old_files("videos", time.time() - ORPHAN_S):
            old = [file for file in page if not file.is_result or self._is_expired(file)]
            known = await self._store.known({file.owner for file in old})
            orphans = [file for file in old if file.owner not in known]
            await self._outputs.discard(orphans)
            if orphans:
                log.info(
                    "files of no job were removed", files=[file.file.name for file in orphans[:4]], all=len(orphans)
                )

    def _is_expired(self, file: OldFile) -> bool:
        return file.modified_at < time.time() - self._keep_s
