"""From an accepted job to its video: one task per job between the mesh, the store, the files and the event log.

It works on the jobs that the store says are this gateway's; what other gateways do is seen and told from the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, ParamSpec, TypeVar

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from gateway.catalog import Catalog, Model
from gateway.jobs.bucket import StorageFailed
from gateway.jobs.database import StoreUnavailable
from gateway.jobs.keeper import Keeper, Lost
from gateway.jobs.mirror import Mirror
from gateway.jobs.outputs import Outputs, Recording
from gateway.jobs.store import DENOISED, Asked, Job, JobStore, Order, Page, Status, fingerprint
from gateway.jobs.webhooks import Webhooks
from gateway.media.stills import preview_still
from gateway.mesh import DRAINING, NO_NEW_WORK, Frames, Preview
from gateway.metrics import Metrics
from gateway.replies import error_object
from gateway.stream import EventLog, as_base64, encode_stills, ending
from gateway.tracing import traced
from gateway.watch import Watch
from runtime.errors import InvalidInput, NotReady, RequestFailed
from runtime.log import get_logger
from runtime.protocol import Completed, Progress, Request, Usage
from runtime.sampling import ResolvedParams, Terms

SAVE_EVERY_S = 0.25
"""Progress goes to the store at most so often; changes of stage always do."""
MODEL_PATIENCE_S = 3.0
"""How long a submission waits for the model before it is refused."""
CANCEL_PATIENCE_S = 5.0
"""How long a cancel waits for the gateway that works on the job."""
CANCEL_POLL_S = 0.2
USAGE_PATIENCE_S = 2.0
"""How long a cancel waits for the scheduler's word on what the job took; it comes when its item ends."""
DENOISE_SHARE = 90
"""Percent of the progress at which the first frame appears."""

P = ParamSpec("P")
T = TypeVar("T")

log = get_logger("jobs")


class TooLate(Exception):
    """An accepted job found the mesh draining. It is not over: it is given back, and its readers wait."""


@dataclass
class LiveJob:
    """A job that has a task in this process; `job` is newer than the store's row."""

    job: Job
    model: Model
    task: asyncio.Task[None] | None = None
    log: EventLog = field(default_factory=EventLog)
    saved_at: float = 0.0
    too_late: bool = False
    """The mesh was draining when it came."""


class JobRunner:
    """Owns every running job's task, files and events."""

    def __init__(
        self,
        catalog: Catalog,
        store: JobStore,
        outputs: Outputs,
        metrics: Metrics,
        webhooks: Webhooks,
        keep_s: float = 0.0,
    ) -> None:
        """`keep_s`: how long a job is kept after its end; 0 is for ever."""
        self._catalog = catalog
        self._store = store
        self.outputs = outputs
        self._metrics = metrics
        self._webhooks = webhooks
        self._keep_s = keep_s
        self._live: dict[str, LiveJob] = {}
        self._accepting: set[str] = set()
        self._mirrors: dict[str, Mirror] = {}
        self._keeper = Keeper(store, self)
        self._tasks: list[asyncio.Task[None]] = []

    async def submit(
        self,
        model: Model,
        params: ResolvedParams,
        terms: Terms,
        asked: Asked,
        idempotency_key: str | None = None,
        *,
        drawn_seed: bool = True,
    ) -> Job:
        """Accept a job: it is in the store before this returns. A key that its account used before returns its job.

        Args:
            drawn_seed: the seed of `params` is not the client's, so that a repeated request has another one.

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
        job = msgspec.structs.replace(job, fingerprint=fingerprint(job, drawn_seed))
        # Whoever heard from the launcher that the mesh is ready may be here before the news of it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MODEL_PATIENCE_S):
                await model.mesh.wait_model()
        request, warnings = await asyncio.to_thread(_tokenize, model, job)
        job = msgspec.structs.replace(job, asked=msgspec.structs.replace(asked, warnings=(*asked.warnings, *warnings)))
        self._accepting.add(job.id)
        try:
            stored = await self._store.insert(job)
            if stored.id == job.id:
                self._start(job, model, request)
        finally:
            self._accepting.discard(job.id)
        # Jobs of before there were fingerprints have none.
        if stored.fingerprint not in {None, job.fingerprint}:
            message = "was used before for a request with other parameters"
            raise InvalidInput("Idempotency-Key", message, code="idempotency_key_reused")
        return self._newest(stored)

    async def resume(self) -> None:
        """Take up what an earlier process left unfinished, under the same ids, and from now on what other gateways
        leave; it runs when the model is loaded."""
        await self._keeper.claim()
        self._tasks.append(asyncio.create_task(self._keeper.run(), name="keeper of the jobs"))

    # ---- what the keeper asks and says -----------------------------------------------------------------------

    def working_on(self) -> Collection[str]:
        return self._live.keys()

    def accepting(self) -> Collection[str]:
        return self._accepting

    def wanted(self) -> tuple[Collection[str], Collection[str]]:
        draining = [model.name for model in self._catalog if model.mesh.state.draining]
        return [model.name for model in self._catalog], draining

    async def take_up(self, job: Job) -> None:
        """Go on with a job that was accepted before; its frames come again from the first one."""
        model = self._catalog.get(job.model)
        output_file = await self._recover(job)
        if job.cancel_requested is not None:
            await self._end_unstarted(job, "cancelled", error_code="cancelled", error_message=job.cancel_requested)
        elif output_file is not None:
            # The process died between finishing the file and noting it.
            done = {"progress": 100, "frames_done": job.params.num_frames, "output_file": output_file}
            await self._end_unstarted(job, "completed", **done)
        elif job.asked.attached:
            reason = "the server was restarted while its client waited"
            await self._end_unstarted(job, "cancelled", error_code="cancelled", error_message=reason)
        elif model is None:
            reason = f"the server was restarted without the model {job.model}"
            await self._end_unstarted(job, "failed", error_code="model_changed", error_message=reason)
        else:
            again = {"status": "queued", "stage": "queued", "progress": 0, "step": 0, "frames_done": 0}
            self._start(msgspec.structs.replace(job, **again), model, None)

    async def _recover(self, job: Job) -> str | None:
        """Clear away the half of a video that an earlier process left; the name of the file if it left a whole one.

        If nobody can tell, it is made again.
        """
        await asyncio.to_thread(self.outputs.fragments(job.id).unlink, missing_ok=True)
        name = self.outputs.final(job.id, job.asked.output_format).name
        try:
            return name if await self.outputs.recover(job.id, name) else None
        except (StorageFailed, RequestFailed) as error:
            log.warning("a finished file was not looked for", job=job.id, reason=str(error))
            return None

    async def _end_unstarted(self, job: Job, status: Status, **columns: Any) -> None:
        with contextlib.suppress(Lost):
            await self._end(job, status, **columns)
        await self._forget_elsewhere(job.id)

    async def lose(self, job_id: str) -> None:
        live = self._live.get(job_id)
        if live is not None and live.task is not None:
            live.task.cancel()
            await asyncio.wait([live.task])
            self._leave(live)

    async def tidy(self, job_id: str) -> Job | None:
        """The job's row, if there is one."""
        row = await self._store.get(job_id)
        if row is None or row.status in {"cancelled", "failed"}:
            await self.outputs.clear(job_id)
        return row

    def _leave(self, live: LiveJob) -> None:
        """It goes on without us, or not at all; who follows it here hears of that from the store."""
        if self._live.get(live.job.id) is live:
            self._forget(live)
            if not live.log.ended:
                self._reflect(live.job.id, live.log, live.job)

    async def _forget_elsewhere(self, job_id: str) -> None:
        for model in self._catalog:
            await model.mesh.forget(job_id)

    # ---- what clients ask ------------------------------------------------------------------------------------

    async def find(self, job_id: str, account: str | None = None) -> Job | None:
        """None also for a job of another account than the one that is asked for."""
        live = self._live.get(job_id)
        if live is None:
            return await self._store.get(job_id, account)
        return live.job if account in {None, live.job.terms.key} else None

    async def list(self, after: str | None, limit: int, order: Order, account: str | None = None) -> Page:
        page = await self._store.list(after, limit, order, account)
        return Page([self._newest(job) for job in page.jobs], page.has_more)

    async def was_asked(self, account: str, idempotency_key: str | None) -> bool:
        """Whether such a request was accepted before; the same again makes no work."""
        return idempotency_key is not None and await self._store.with_key(account, idempotency_key) is not None

    def under_way(self) -> Iterator[Job]:
        """Every job that has a task in this process, as it is now."""
        return (live.job for live in self._live.values())

    def events(self, job_id: str) -> EventLog | None:
        """The event log of a job that runs in this process."""
        live = self._live.get(job_id)
        return None if live is None else live.log

    def follow(self, job: Job) -> EventLog | None:
        """The event log of an unfinished job, whoever works on it; None if it has ended."""
        own, mirror = self.events(job.id), self._mirrors.get(job.id)
        if own is not None:
            return own
        if mirror is None:
            return None if job.finished else self._reflect(job.id, EventLog())
        mirror.touch()
        return mirror.log

    async def wait(self, job_id: str) -> Job:
        """The job once it has ended, wherever that is.

        Raises:
            NotReady: it came too late for the mesh, and waits for the next one.
            InvalidInput: it was deleted meanwhile.
        """
        live = self._live.get(job_id)
        if live is not None and live.task is not None:
            await asyncio.wait([live.task])
            if live.too_late:
                raise NotReady(NO_NEW_WORK, draining=True)
        job = await self._known(job_id, live)
        events = self.follow(job) if live is None else live.log
        if events is not None:
            # Who ends a job without its task tells its readers a moment later.
            async for _event in events.follow():
                pass
        return await self._known(job_id, live)

    async def _known(self, job_id: str, live: LiveJob | None) -> Job:
        job = live.job if live is not None and live.job.finished else await self._store.get(job_id)
        if job is None:
            raise InvalidInput("video_id", f"{job_id} was deleted while it was made", code="video_not_found")
        return job

    async def cancel(self, job_id: str, reason: str) -> None:
        """Stop a job and wait until nothing touches it any more; a finished one stays as it is.

        The gateway that works on it may be another one, and have no time: then it is cancelled soon.
        """
        live = self._live.get(job_id)
        if live is None or live.task is None:
            await self._cancel_elsewhere(job_id, reason)
            return
        if live.model.mesh.model is not None:
            await live.model.mesh.cancel(job_id, reason)
            await asyncio.wait([live.task], timeout=USAGE_PATIENCE_S)
        live.task.cancel()
        await asyncio.wait([live.task])
        try:
            if not live.log.ended:
                await self._end_live(live, "cancelled", error_code="cancelled", error_message=reason)
        except Lost:
            self._leave(live)
            await self._cancel_elsewhere(job_id, reason)
        except StoreUnavailable:
            self._leave(live)
            raise
        self._forget(live)

    async def _cancel_elsewhere(self, job_id: str, reason: str) -> None:
        until, asked = time.monotonic() + CANCEL_PATIENCE_S, False
        columns = {"error_code": "cancelled", "error_message": reason}
        while (job := await self._store.get(job_id)) is not None and not job.finished:
            if await self._end_unowned(job, columns) or time.monotonic() > until:
                return
            if not asked:
                await self._store.request_cancel(job_id, reason)
            asked = True
            await asyncio.sleep(CANCEL_POLL_S)

    async def _end_unowned(self, job: Job, columns: dict[str, Any]) -> bool:
        also = self._webhooks.announcing(job, "cancelled")
        ended = await self._store.end_unowned(job.id, also=also, **self._ending("cancelled"), **columns)
        if ended:
            self._webhooks.wake()
            await self.outputs.clear(job.id)
            await self._forget_elsewhere(job.id)
        return ended

    async def delete(self, job_id: str) -> None:
        """Cancel a job if it runs, then remove it with its files."""
        await self.cancel(job_id, "deleted by the client")
        await self._store.delete(job_id)
        await self.outputs.delete(job_id)

    async def close(self) -> None:
        """Stop every task. Jobs that were running stay unfinished in the store, for whoever comes next."""
        tasks = [task for live in self._live.values() if (task := live.task) is not None]
        tasks += [*self._tasks, *(mirror.task for mirror in self._mirrors.values() if mirror.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._store.release()
        except (StoreUnavailable, SQLAlchemyError) as error:
            log.warning("unfinished jobs were not given back; they wait until their lease ends", error=str(error))

    def _start(self, job: Job, model: Model, request: Request | None) -> None:
        mirror = self._mirrors.pop(job.id, None)
        live = LiveJob(job, model) if mirror is None else LiveJob(job, model, log=mirror.log)
        if mirror is not None and mirror.task is not None:
            mirror.task.cancel()
        self._live[job.id] = live
        live.task = asyncio.create_task(self._run(live, request), name=job.id)

    def _newest(self, job: Job) -> Job:
        live = self._live.get(job.id)
        return job if live is None else live.job

    def _forget(self, live: LiveJob) -> None:
        if self._live.get(live.job.id) is live:
            del self._live[live.job.id]

    def _reflect(self, job_id: str, events: EventLog, told: Job | None = None) -> EventLog:
        mirror = self._mirrors[job_id] = Mirror(self._store, job_id, events, told)
        mirror.task = asyncio.create_task(self._reflecting(mirror, job_id), name=f"mirror of {job_id}")
        return events

    async def _reflecting(self, mirror: Mirror, job_id: str) -> None:
        try:
            await mirror.run()
        finally:
            if self._mirrors.get(job_id) is mirror:
                del self._mirrors[job_id]

    async def _run(self, live: LiveJob, request: Request | None) -> None:
        """One job to its end. A cancelled task ends nothing here: who cancelled it knows whether the job is over."""
        try:
            await self._attempt(live, request)
        except (TooLate, Lost, StoreUnavailable) as error:
            log.warning("a job waits in the store, or ends there", job=live.job.id, reason=str(error))
            self._leave(live)
        except Exception as error:
            log.exception("a job failed in the gateway", job=live.job.id, trace=live.job.asked.request_id)
            await self._give_up(live, f"the gateway failed: {type(error).__name__}; its log says more")
        self._forget(live)

    async def _attempt(self, live: LiveJob, request: Request | None) -> None:
        try:
            done, output_file = await self._watched(live, request)
        except NotReady as error:
            await self._give_back(live, str(error))
        except RequestFailed as error:
            if error.code == DRAINING:
                await self._give_back(live, error.reason)
            status: Status = "cancelled" if error.code == "cancelled" else "failed"
            told = {"error_code": error.code, "error_message": error.reason, "usage": error.usage or Usage()}
            await self._end_live(live, status, **told)
        else:
            measured = {"timings": done.timings, "usage": done.usage}
            await self._end_live(live, "completed", progress=100, output_file=output_file, **measured)

    async def _give_back(self, live: LiveJob, reason: str) -> NoReturn:
        live.too_late = True
        await self._store.release(live.job.id)
        raise TooLate(reason)

    async def _give_up(self, live: LiveJob, reason: str) -> None:
        """Readers hear of the end even if the store is what failed."""
        columns = {"error_code": "internal_error", "error_message": reason}
        try:
            await self._end_live(live, "failed", **columns)
        except (Lost, StoreUnavailable):
            self._leave(live)
        except SQLAlchemyError:
            log.exception("the end of a job was not stored", job=live.job.id)
            await live.log.publish("error", {"error": error_object(msgspec.structs.replace(live.job, **columns))})

    async def _watched(self, live: LiveJob, request: Request | None) -> tuple[Completed, str]:
        with Watch(self._metrics, live.model.name, live.job.id, live.job.asked.traceparent) as seen:
            return await self._generate(live, request, seen)

    async def _generate(self, live: LiveJob, request: Request | None, seen: Watch) -> tuple[Completed, str]:
        """(the mesh's last word, name of the finished file)."""
        resumed, job, mesh = request is None, live.job, live.model.mesh
        if request is None:
            await mesh.wait_model()
            request = await asyncio.to_thread(
                mesh.request, job.id, job.params, job.terms, resumed=True, previews=job.asked.previews
            )
            request = msgspec.structs.replace(request, images=job.asked.images)
        output_file = ""
        with contextlib.closing(Recording(self.outputs, live.job)) as recording:
            async with contextlib.aclosing(mesh.run(traced(request, job.asked), resumed=resumed)) as events:
                async for event in events:
                    seen(event)
                    match event:
                        case Progress():
                            await self._progressed(live, event)
                        case Preview():
                            await self._previewed(live, event)
                        case Frames():
                            await self._recorded(live, event, recording)
                            if event.last:
                                await self._check_ours(live)
                                # Going back for the next event tells the mesh that the video is stored.
                                with self._metrics.encoding():
                                    output_file = await _in_thread(recording.finish)
                                await self.outputs.keep(job.id, output_file)
                        case Completed():
                            assert output_file, "completed before the last frame was stored"
                            return event, output_file
        raise RequestFailed(live.job.id, "internal_error", "the mesh ended without a word")

    async def _progressed(self, live: LiveJob, event: Progress) -> None:
        job = live.job
        if job.frames_done and event.stage not in DENOISED:
            # Frames come on a socket of their own and may overtake the news that decoding has begun.
            return
        queued = event.stage == "queued"
        live.job = msgspec.structs.replace(
            job,
            status="queued" if queued else "in_progress",
            started_at=job.started_at if queued else job.started_at or time.time(),
            eta_s=round(event.eta_s, 3),
            queue_position=event.queue_position if queued else None,
        )
        if queued:
            await live.log.publish("queued", {"position": event.queue_position, "eta_s": live.job.eta_s})
        await self._enter(live, event.stage)
        if event.stage == "denoise":
            await self._stepped(live, event.step)
        await self._save(live)

    async def _stepped(self, live: LiveJob, step: int) -> None:
        """So many are done; after a loss of the workers it may be fewer than before."""
        before = live.job.step
        progress = max(live.job.progress, DENOISE_SHARE * step // max(live.job.total_steps, 1))
        live.job = msgspec.structs.replace(live.job, step=step, progress=progress)
        if step > before:
            names = ("step", "total_steps", "eta_s", "progress")
            await live.log.publish("step", {name: getattr(live.job, name) for name in names})

    async def _previewed(self, live: LiveJob, preview: Preview) -> None:
        params = live.job.params
        picture = await _in_thread(preview_still, preview.pixels, params.width, params.height)
        data = {"step": preview.step, "width": picture.width, "height": picture.height}
        await live.log.publish("preview", data | {"jpeg": as_base64(picture.file)})

    async def _recorded(self, live: LiveJob, frames: Frames, recording: Recording) -> None:
        if not live.job.frames_done:
            await self._enter(live, "decode")
        with self._metrics.encoding():
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
        with self._metrics.encoding():
            await _in_thread(recording.convert, frames.pixels, frames.timings)

    async def _enter(self, live: LiveJob, stage: str) -> None:
        if stage == live.job.stage:
            return
        if stage in DENOISED:
            # The news of the item that ends with the last step says only that it decodes.
            await self._stepped(live, live.job.total_steps)
        log.debug("stage", job=live.job.id, stage=stage, trace=live.job.asked.request_id)
        live.job = msgspec.structs.replace(live.job, stage=stage)
        live.saved_at = 0.0
        if stage != "queued":
            await live.log.publish("stage", {"stage": stage})

    async def _save(self, live: LiveJob) -> None:
        if time.monotonic() - live.saved_at < SAVE_EVERY_S:
            return
        live.saved_at = time.monotonic()
        names = ("status", "progress", "started_at", "stage", "step", "frames_done")
        columns = {name: getattr(live.job, name) for name in names}
        try:
            changed = await self._store.update(live.job.id, **columns)
        except StoreUnavailable as error:
            # How far it is can be said later; whose it is the keeper watches.
            log.warning("a job's progress was not stored", job=live.job.id, error=str(error))
        else:
            if not changed:
                await self._lost(live.job.id)

    async def _check_ours(self, live: LiveJob) -> None:
        """The finished file has one name, whoever makes it: only the owner may."""
        if await self._store.mine(live.job.id) is None:
            await self._lost(live.job.id)

    async def _lost(self, job_id: str) -> NoReturn:
        """Raises Lost; the files of a job that nobody wants any more go first."""
        row = await self.tidy(job_id)
        state = "was deleted" if row is None else f"is {row.status}" if row.finished else "is another gateway's"
        raise Lost(f"it {state}")

    async def _end_live(self, live: LiveJob, status: Status, **columns: Any) -> None:
        """Store how it ended, then tell its readers."""
        live.job = await self._end(live.job, status, **columns)
        await live.log.publish(*ending(live.job))

    async def _end(self, job: Job, status: Status, **columns: Any) -> Job:
        """Store how it ended; the job as it is then. If the store has another ending already, that one stands."""
        columns |= self._ending(status)
        changed = await self._store.update(job.id, also=self._webhooks.announcing(job, status), **columns)
        self._webhooks.wake()
        ended = msgspec.structs.replace(job, eta_s=None, queue_position=None, **columns)
        if not changed:
            row = await self._store.get(job.id)
            if row is None or not row.finished:
                await self._lost(job.id)
            ended = row or ended
        if ended.status != "completed":
            await self.outputs.clear(job.id)
        return ended

    def _ending(self, status: Status) -> dict[str, Any]:
        """The columns that every end has."""
        now = time.time()
        return {"status": status, "completed_at": now, "expires_at": now + self._keep_s if self._keep_s else None}


def _tokenize(model: Model, job: Job) -> tuple[Request, tuple[str, ...]]:
    """(what goes to the mesh, what of the prompts no encoder will read)."""
    request = model.mesh.request(job.id, job.params, job.terms, previews=job.asked.previews)
    return msgspec.structs.replace(request, images=job.asked.images), model.mesh.warnings(job.params)


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
