"""The events of a job that another gateway works on, told from its row. Knows neither the mesh nor files."""

from __future__ import annotations

import asyncio

from gateway.jobs.database import StoreUnavailable
from gateway.jobs.store import DENOISED, Job, JobStore
from gateway.replies import error_body
from gateway.stream import FRAMES_PER_EVENT, EventLog, ending
from runtime.log import get_logger

POLL_S = 0.5
PATIENT_POLLS = 20
"""How often nobody may be reading before it ends."""

GONE = error_body("deleted by the client", "invalid_request_error", None, "cancelled")

log = get_logger("jobs")


class Mirror:
    """One job's row, read while somebody follows its log."""

    def __init__(self, store: JobStore, job_id: str, events: EventLog, told: Job | None = None) -> None:
        """`told` is what the log says already."""
        self._store = store
        self._job_id = job_id
        self._told = told
        self._unread = 0
        self.log = events
        self.task: asyncio.Task[None] | None = None

    def touch(self) -> None:
        """Somebody is about to read."""
        self._unread = 0

    async def run(self) -> None:
        """Until the job has ended, or nobody reads any more."""
        while not self.log.ended and self._unread < PATIENT_POLLS:
            try:
                await self._tell(await self._store.get(self._job_id))
            except StoreUnavailable as error:
                log.warning("a job's row cannot be read", job=self._job_id, error=str(error))
            await asyncio.sleep(0 if self.log.ended else POLL_S)
            self._unread = 0 if self.log.readers else self._unread + 1

    async def _tell(self, job: Job | None) -> None:
        """What is new in the row since the last look."""
        if job is None:
            await self.log.publish("error", GONE)
        elif job.finished:
            await self._tell_ending(job)
        elif job.stage == "queued":
            await self._tell_queued(job)
        else:
            await self._tell_progress(job)
        self._told = job

    async def _tell_ending(self, job: Job) -> None:
        """With frames only now: they are read from the finished file."""
        total = job.params.num_frames if job.status == "completed" else 0
        for first in range(self.log.frames_told, total, FRAMES_PER_EVENT):
            count = min(FRAMES_PER_EVENT, total - first)
            await self.log.publish("frames", {"first": first, "count": count, "total": total})
        await self.log.publish(*ending(job))

    async def _tell_queued(self, job: Job) -> None:
        if self._told is None or self._told.stage != "queued":
            await self.log.publish("queued", {"position": job.queue_position, "eta_s": job.eta_s})

    async def _tell_progress(self, job: Job) -> None:
        """The steps before the stage that follows them."""
        if job.stage in DENOISED:
            await self._tell_step(job)
            await self._tell_stage(job)
        else:
            await self._tell_stage(job)
            await self._tell_step(job)

    async def _tell_stage(self, job: Job) -> None:
        if self._told is None or self._told.stage != job.stage:
            await self.log.publish("stage", {"stage": job.stage})

    async def _tell_step(self, job: Job) -> None:
        before = (0, 0) if self._told is None else (self._told.step, self._told.progress)
        if (job.step, job.progress) != before:
            names = ("step", "total_steps", "eta_s", "progress")
            await self.log.publish("step", {name: getattr(job, name) for name in names})
