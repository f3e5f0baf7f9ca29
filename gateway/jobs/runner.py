"""From an accepted job to its video: one task per job between the mesh, the store, the files and the event log."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from gateway.catalog import Catalog, Model
from gateway.jobs.outputs import Outputs, Recording
from gateway.jobs.store import Asked, Job, JobStore, Order, Page, Status
from gateway.media.stills import preview_still
from gateway.mesh import DRAINING, Frames, Preview
from gateway.replies import error_object
from gateway.stream import EventLog, as_base64, encode_stills, ending
from runtime.errors import InvalidInput, NotReady, RequestFailed
from runtime.log import get_logger
from runtime.protocol import Completed, Progress, Request
from runtime.sampling import ResolvedParams, Terms

SAVE_EVERY_S = 0.25
"""Progress goes to the store at most so often; changes of stage always do."""
MODEL_PATIENCE_S = 3.0
"""How long a submission waits for the model before it is refused."""
DENOISE_SHARE = 90
"""Percent of the progress at which the first frame appears."""

P = ParamSpec("P")
T = TypeVar("T")

log = get_logger("jobs")


class TooLate(Exception):
    """An accepted job found the mesh draining. It is not over: its readers wait, and `resume()` takes it up."""


@dataclass
class LiveJob:
    """A job that has a task in this process; `job` is newer than the store's row."""

    job: Job
    model: Model
    task: asyncio.Task[None] | None = None
    log: EventLog = field(default_factory=EventLog)
    saved_at: float = 0.0


class JobRunner:
    """Owns every running job's task, files and events."""

    def __init__(self, catalog: Catalog, store: JobStore, outputs: Outputs) -> None:
        self._catalog = catalog
        self._store = store
        self.outputs = outputs
        self._live: dict[str, LiveJob] = {}

    async def submit(
        self, model: Model, params: ResolvedParams, terms: Terms, asked: Asked, idempotency_key: str | None = None
    ) -> Job:
        """Accept a job: it is in the store before this returns. A key that was used before returns its job.

        Raises:
            NotReady: the model is not loaded yet, or the mesh drains.
            InvalidInput: the prompt has too many tokens, or the key belongs to a different request.
        """
        job = Job(
            id=new_video_id(),
            params=params,
            terms=terms,
            asked=asked,
            model=model.name,
            created_at=time.time(),
            total_steps=params.num_inference_steps,
            idempotency_key=idempotency_key,
        )
        # Whoever heard from the launcher that the mesh is ready may be here before the news of it.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(model.mesh.wait_model(), MODEL_PATIENCE_S)
        request = await asyncio.to_thread(model.mesh.request, job.id, params, terms, previews=asked.previews)
        stored = await self._store.insert(job)
        if stored.id == job.id:
            self._start(job, model, request)
        elif msgspec.structs.replace(stored.params, seed=params.seed) != params:
            raise InvalidInput("Idempotency-Key", "was used before for a request with other parameters")
        return self._newest(stored)

    async def resume(self) -> None:
        """Take up what an earlier process left unfinished, under the same ids; it runs when the model is loaded."""
        self.outputs.open()
        for job in await self._store.unfinished():
            final, model = self.outputs.final(job.id), self._catalog.get(job.model)
            # The frames come again from the first one.
            self.outputs.fragments(job.id).unlink(missing_ok=True)
            if final.exists():
                # The process died between finishing the file and noting it.
                done = {"progress": 100, "frames_done": job.params.num_frames, "output_file": final.name}
                await self._end(job, "completed", **done)
                await self._forget_elsewhere(job)
            elif model is None:
                reason = f"the server was restarted without the model {job.model}"
                await self._end(job, "failed", error_code="model_changed", error_message=reason)
                await self._forget_elsewhere(job)
            else:
                again = {"status": "queued", "stage": "queued", "progress": 0, "step": 0, "frames_done": 0}
                self._start(msgspec.structs.replace(job, **again), model, None)

    async def _forget_elsewhere(self, job: Job) -> None:
        for model in self._catalog:
            await model.mesh.forget(job.id)

    async def find(self, job_id: str) -> Job | None:
        live = self._live.get(job_id)
        return live.job if live is not None else await self._store.get(job_id)

    async def list(self, after: str | None, limit: int, order: Order) -> Page:
        page = await self._store.list(after, limit, order)
        return Page([self._newest(job) for job in page.jobs], page.has_more)

    def events(self, job_id: str) -> EventLog | None:
        """The event log of a job that runs in this process."""
        live = self._live.get(job_id)
        return None if live is None else live.log

    async def cancel(self, job_id: str, reason: str) -> None:
        """Stop a job and wait until nothing touches it any more; a finished one stays as it is."""
        live = self._live.get(job_id)
        if live is None or live.task is None:
            return
        live.task.cancel()
        await asyncio.wait([live.task])
        if not live.log.ended:
            await self._end_live(live, "cancelled", error_code="cancelled", error_message=reason)
        self._forget(live)

    async def delete(self, job_id: str) -> None:
        """Cancel a job if it runs, then remove it with its files."""
        await self.cancel(job_id, "deleted by the client")
        await self._store.delete(job_id)
        await asyncio.to_thread(self.outputs.delete, job_id)

    async def close(self) -> None:
        """Stop every task. Jobs that were running stay unfinished in the store, for `resume()`."""
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, job: Job, model: Model, request: Request | None) -> None:
        live = LiveJob(job, model)
        self._live[job.id] = live
        live.task = asyncio.create_task(self._run(live, request), name=job.id)

    def _newest(self, job: Job) -> Job:
        live = self._live.get(job.id)
        return job if live is None else live.job

    def _forget(self, live: LiveJob) -> None:
        self._live.pop(live.job.id, None)

    async def _run(self, live: LiveJob, request: Request | None) -> None:
        """One job to its end. A cancelled task ends nothing here: who cancelled it knows whether the job is over."""
        try:
            await self._attempt(live, request)
        except TooLate:
            log.warning("a job came too late for this mesh and waits in the store for the next one", job=live.job.id)
            return
        except Exception as error:
            log.exception("a job failed in the gateway", job=live.job.id)
            await self._give_up(live, f"the gateway failed: {type(error).__name__}; its log says more")
        self._forget(live)

    async def _attempt(self, live: LiveJob, request: Request | None) -> None:
        try:
            timings, output_file = await self._generate(live, request)
        except NotReady as error:
            raise TooLate from error
        except RequestFailed as error:
            if error.code == DRAINING:
                raise TooLate from error
            status: Status = "cancelled" if error.code == "cancelled" else "failed"
            await self._end_live(live, status, error_code=error.code, error_message=error.reason)
        else:
            await self._end_live(live, "completed", progress=100, timings=timings, output_file=output_file)

    async def _give_up(self, live: LiveJob, reason: str) -> None:
        """Readers hear of the end even if the store is what failed."""
        columns = {"error_code": "internal_error", "error_message": reason}
        try:
            await self._end_live(live, "failed", **columns)
        except SQLAlchemyError:
            log.exception("the end of a job was not stored", job=live.job.id)
            await live.log.publish("error", {"error": error_object(msgspec.structs.replace(live.job, **columns))})

    async def _generate(self, live: LiveJob, request: Request | None) -> tuple[dict[str, float], str]:
        """(seconds per stage, name of the finished file)."""
        resumed, job, mesh = request is None, live.job, live.model.mesh
        if request is None:
            await mesh.wait_model()
            request = await asyncio.to_thread(
                mesh.request, job.id, job.params, job.terms, resumed=True, previews=job.asked.previews
            )
        output_file = ""
        with contextlib.closing(Recording(self.outputs, live.job)) as recording:
            async with contextlib.aclosing(mesh.run(request, resumed=resumed)) as events:
                async for event in events:
                    match event:
                        case Progress():
                            await self._progressed(live, event)
                        case Preview():
                            await self._previewed(live, event)
                        case Frames():
                            await self._recorded(live, event, recording)
                            if event.last:
                                # Going back for the next event tells the mesh that the video is stored.
                                output_file = await _in_thread(recording.finish)
                        case Completed():
                            assert output_file, "completed before the last frame was stored"
                            return event.timings, output_file
        raise RequestFailed(live.job.id, "internal_error", "the mesh ended without a word")

    async def _progressed(self, live: LiveJob, event: Progress) -> None:
        job = live.job
        if job.frames_done and event.stage not in {"decode", "deliver"}:
            # Frames come on a socket of their own and may overtake the news that decoding has begun.
            return
        step = event.step if event.stage == "denoise" else job.step
        queued = event.stage == "queued"
        live.job = msgspec.structs.replace(
            job,
            status="queued" if queued else "in_progress",
            started_at=job.started_at if queued else job.started_at or time.time(),
            step=step,
            progress=max(job.progress, DENOISE_SHARE * step // max(job.total_steps, 1)),
            eta_s=round(event.eta_s, 3),
            queue_position=event.queue_position if queued else None,
        )
        if queued:
            await live.log.publish("queued", {"position": event.queue_position, "eta_s": live.job.eta_s})
        await self._enter(live, event.stage)
        if step > job.step:
            names = ("step", "total_steps", "eta_s", "progress")
            await live.log.publish("step", {name: getattr(live.job, name) for name in names})
        await self._save(live)

    async def _previewed(self, live: LiveJob, preview: Preview) -> None:
        params = live.job.params
        picture = await _in_thread(preview_still, preview.pixels, params.width, params.height)
        data = {"step": preview.step, "width": picture.width, "height": picture.height}
        await live.log.publish("preview", data | {"jpeg": as_base64(picture.file)})

    async def _recorded(self, live: LiveJob, frames: Frames, recording: Recording) -> None:
        if not live.job.frames_done:
            await self._enter(live, "decode")
        await _in_thread(recording.add, frames.pixels, frames.timings)
        stills = await _in_thread(encode_stills, frames.pixels) if live.log.wants_stills else None
        done = frames.first + frames.count
        progress = DENOISE_SHARE + (99 - DENOISE_SHARE) * done // frames.total
        # Frames come on a socket of their own and may overtake the news that it runs.
        started_at = live.job.started_at or time.time()
        live.job = msgspec.structs.replace(
            live.job, status="in_progress", started_at=started_at, frames_done=done, progress=progress
        )
        data = {"first": frames.first, "count": frames.count, "total": frames.total}
        await live.log.publish("frames", data, stills)
        await self._save(live)

    async def _enter(self, live: LiveJob, stage: str) -> None:
        if stage == live.job.stage:
            return
        live.job = msgspec.structs.replace(live.job, stage=stage)
        live.saved_at = 0.0
        if stage != "queued":
            await live.log.publish("stage", {"stage": stage})

    async def _save(self, live: LiveJob) -> None:
        if time.monotonic() - live.saved_at < SAVE_EVERY_S:
            return
        live.saved_at = time.monotonic()
        names = ("status", "progress", "started_at", "stage", "step", "frames_done")
        await self._store.update(live.job.id, **{name: getattr(live.job, name) for name in names})

    async def _end_live(self, live: LiveJob, status: Status, **columns: Any) -> None:
        """Store how it ended, then tell its readers."""
        live.job = await self._end(live.job, status, **columns)
        await live.log.publish(*ending(live.job))

    async def _end(self, job: Job, status: Status, **columns: Any) -> Job:
        """Store how it ended; the job as it is then. If the store has another ending already, that one stands."""
        columns |= {"status": status, "completed_at": time.time()}
        changed = await self._store.update(job.id, **columns)
        ended = msgspec.structs.replace(job, eta_s=None, queue_position=None, **columns)
        ended = ended if changed else await self._store.get(job.id) or ended
        if ended.status != "completed":
            await asyncio.to_thread(self.outputs.delete, job.id)
        return ended


def new_video_id() -> str:
    """Ordered by time, and not to be guessed from another one."""
    return f"video_{time.time_ns():016x}{secrets.token_hex(8)}"


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`asyncio.to_thread`, but a cancelled caller waits for the thread: it must not use a file that is being closed."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
