"""The way into one mesh: submit, cancel, progress, frames. Holds no weights, speaks no HTTP, knows no other mesh.

`run()` is one request from submission to its last frame as an async iterator. What the consumer does between two
items is what the mesh waits for: a chunk counts as stored when the consumer comes back for the next item.

A scheduler that was started anew (another epoch) knows nothing: it is told of every request that still runs. Lost
workers are the scheduler's to replace. Either way frames come again from the first on, under a higher attempt, and
the consumer sees each of them once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gateway.tokenize import PromptTokenizer
from runtime.errors import NotReady, PeerGone, RequestFailed, StartFailed
from runtime.log import get_logger
from runtime.models.card import Card, card_for
from runtime.protocol import (
    CANCELLED,
    Cancel,
    Cancelled,
    Completed,
    Failed,
    FramesChunk,
    FromGateway,
    FromScheduler,
    GatewayHello,
    Grant,
    MeshState,
    ModelInfo,
    Observe,
    Progress,
    Request,
    Status,
    Stored,
    Submit,
    Welcome,
)
from runtime.sampling import ResolvedParams, Terms
from runtime.wire import AsyncChannel, Received, incarnation

FRAME_CREDITS = 16
"""Chunks that may be under way to this gateway at once; bounds its memory."""

SILENCE_S = 3.0
"""A scheduler that has said nothing for so long is greeted again: one that was started anew does not know us."""
LOOK_S = 1.0
"""A scheduler that takes longer to say how it stands does not count as there."""
FRESH_S = 0.5
"""A snapshot that is younger is shown again: however many look, the scheduler is asked so often at most."""
MESH_LOST = "mesh_lost"
"""The code of requests that end because the mesh did."""
DRAINING = "draining"
"""The code of requests that came too late."""
NO_NEW_WORK = "draining: no new work is taken"
"""True of a server that stops, and of a gateway that outlives the meshes that do."""
ANSWER_S = 2.0
"""How long a scheduler may take to say whether it has a request."""

DEFAULT_TERMS = Terms()

log = get_logger("mesh")


@dataclass(frozen=True)
class Frames:
    """Some decoded frames of one request, in order."""

    first: int
    total: int
    pixels: NDArray[np.uint8]
    """(count, height, width, 3) RGB."""
    timings: dict[str, float]
    """The rank's compute seconds per stage so far."""

    @property
    def count(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def last(self) -> bool:
        return self.first + self.count == self.total


@dataclass(frozen=True)
class Preview:
    """What a request would look like, as predicted after some of its denoising steps."""

    step: int
    """Steps behind it, 1 or more."""
    pixels: NDArray[np.uint8]
    """(height, width, 3) RGB; as coarse as the latents."""


Event = Progress | Preview | Frames | Completed


class Moved(Exception):
    """The request was taken away from this mesh; `attempt` is the highest that it came to here."""

    def __init__(self, attempt: int) -> None:
        super().__init__(attempt)
        self.attempt = attempt


@dataclass(eq=False)
class _Inbox:
    """What arrived for one running request."""

    request: Request
    """As the present epoch knows it; frames of a lower attempt are of an earlier epoch."""
    attempt: int
    """The highest of which a chunk has come."""
    events: asyncio.Queue[tuple[Event | Exception | None, int | None]] = field(default_factory=asyncio.Queue)
    """With the epoch in which each came; None stands for the newest preview."""
    preview: Preview | None = None
    """Not consumed yet; a newer one takes its place."""
    preview_step: int = 0
    """Of the newest that came."""
    next_frame: int = 0
    unconsumed: int = 0
    """Chunks that were accepted in this epoch and whose credits have not gone back yet."""
    timings: dict[str, float] | None = None
    """The rank's seconds per stage, once the last frame is here."""
    stored: bool = False
    """The consumer has every frame."""
    unheard: bool = False
    """The last frame came in an earlier epoch: no scheduler will say that it is completed."""

    def again(self) -> None:
        """What is submitted anew outdoes every chunk that may still be under way."""
        self.attempt += 1
        self.request = msgspec.structs.replace(self.request, attempt=self.attempt)

    def end_unheard(self, epoch: int | None) -> None:
        """Everything is stored: that is all that completed means, whoever says so."""
        assert self.timings is not None
        self.events.put_nowait((Completed(self.request.id, self.timings), epoch))


class Mesh:
    """One gateway instance's connection to one scheduler and its workers."""

    def __init__(self, scheduler: str, frames: str, *, batching_delay_s: float = 0.0) -> None:
        """`scheduler` is the endpoint to connect to, `frames` the one to take frames on."""
        self.scheduler = scheduler
        self._control: AsyncChannel[FromGateway, FromScheduler] = AsyncChannel.connect(
            scheduler, FromScheduler, incarnation("gateway")
        )
        self._frames: AsyncChannel[Any, FramesChunk] = AsyncChannel.bind(frames, FramesChunk)
        self._delay_s = batching_delay_s
        self._hello = GatewayHello(self._frames.endpoint, FRAME_CREDITS)
        self._epoch: int | None = None
        self._spoken = 0.0
        """When the scheduler was heard or greeted last."""
        self._looking: asyncio.Future[Status] | None = None
        """The question how the mesh stands, while it has no answer."""
        self._seen: Status | None = None
        self._seen_at = 0.0
        self._inboxes: dict[str, _Inbox] = {}
        self._outbox: list[_Inbox] = []
        self._over: list[str] = []
        """Requests that the next scheduler has to be told are over."""
        self._dropped: set[str] = set()
        """Requests that went elsewhere, and of which the scheduler has not said that they are over."""
        self._asked: dict[str, asyncio.Future[Status]] = {}
        """Requests of which somebody wants to know whether the scheduler has them."""
        self._tasks: list[asyncio.Task[None]] = []
        self._flush: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._tokenizer: PromptTokenizer | None = None
        self.state = MeshState(False, "the scheduler has not answered yet", 0, 0)
        self.num_heard = 0
        """Messages of the scheduler so far; it speaks once a second."""
        self.on_state: Callable[[], None] = lambda: None
        """Called when `state` or `lost` has changed."""
        self.model: ModelInfo | None = None
        self.card: Card | None = None
        self._lost: str | None = None
        self.dropped_chunks = 0
        self.stale = 0
        """Messages dropped because they were of another epoch."""

    @property
    def lost(self) -> str | None:
        """Why the mesh gave up; None again once its scheduler was started anew."""
        return self._lost

    @property
    def loaded(self) -> bool:
        """Whether `request()` can tokenize."""
        return self._tokenizer is not None

    async def start(self) -> None:
        """Say hello; does not wait for an answer."""
        await self._greet()
        work = (self._hear_scheduler(), self._hear_frames(), self._keep_in_touch())
        self._tasks = [asyncio.create_task(task) for task in work]

    async def close(self) -> None:
        tasks = [*self._tasks, self._flush] if self._flush is not None else self._tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._control.close()
        self._frames.close()

    async def wait_ready(self, timeout_s: float) -> None:
        """Until every rank has the model.

        Raises:
            StartFailed: not within the time; says how far it came.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.state.ready)
        except TimeoutError as error:
            state = self.state
            raise StartFailed(
                f"the mesh was not ready after {timeout_s:.0f} s: {state.ranks_ready} of {state.num_ranks} ranks, "
                f"{state.reason}"
            ) from error

    async def wait_model(self) -> None:
        """Until `request()` can tokenize, however long that takes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._tokenizer is not None)

    def request(
        self,
        request_id: str,
        params: ResolvedParams,
        terms: Terms = DEFAULT_TERMS,
        *,
        resumed: bool = False,
        previews: int = 0,
    ) -> Request:
        """A tokenized request; `resumed` for one that was accepted before, which no drain keeps out.

        `previews` is how many pictures are wanted while it is denoised; there may come fewer, and none of a solver
        that cannot say where it is heading.

        Raises:
            NotReady: no rank has loaded the model yet, or the mesh drains.
            InvalidInput: a prompt is too long for the model.
        """
        self._check_open(resumed)
        if self._tokenizer is None:
            raise NotReady(self.state.reason)
        token_ids = self._tokenizer.tokenize(params)
        request = Request(request_id, params, token_ids, 0, terms.key, terms.priority, terms.timeout_s)
        return msgspec.structs.replace(request, previews=previews)

    def warnings(self, params: ResolvedParams) -> tuple[str, ...]:
        """What of the prompts an encoder does not read, in words; empty until the model is known."""
        return () if self._tokenizer is None else self._tokenizer.warnings(params)

    async def run(self, request: Request, *, resumed: bool = False) -> AsyncGenerator[Event, None]:
        """Progress, previews and frames until Completed. Leaving the loop early cancels the request.

        Progress may fall back when the mesh had to resume the request; frames come once, in order. Of previews that
        wait for the consumer only the newest is left, and they end with the first frame.

        Raises:
            NotReady: the mesh drains, and the request is not `resumed`.
            RequestFailed: the mesh gave up on it or altogether, or somebody cancelled it.
            Moved: it was taken away.
        """
        self._check_open(resumed)
        if self._lost is not None:
            raise RequestFailed(request.id, MESH_LOST, self._lost)
        inbox = _Inbox(request, request.attempt)
        self._inboxes[request.id] = inbox
        ended = False
        try:
            self._submit(inbox)
            while not ended:
                event, epoch = await inbox.events.get()
                if event is None:
                    event, inbox.preview = inbox.preview, None
                    assert event is not None
                elif isinstance(event, Exception):
                    ended = True
                    raise event
                ended = isinstance(event, Completed)
                yield event
                if isinstance(event, Frames):
                    await self._consumed(inbox, event, epoch)
        finally:
            del self._inboxes[request.id]
            if inbox.unconsumed:
                await self._tell(Grant(inbox.unconsumed))
            if not self._withdraw(inbox) and not ended:
                await self._tell(Cancel(request.id, "the submitter left"))

    @property
    def dropped_messages(self) -> int:
        """Messages that could not be read."""
        counts = (self._control.dropped, self._frames.dropped)
        return sum(dropped.malformed + dropped.wrong_version + dropped.refused for dropped in counts)

    async def look(self) -> Status | None:
        """How the mesh stands, at most half a second ago; None if its scheduler does not answer.

        Any number of callers share one question; without a caller none is asked.
        """
        if self._seen is not None and time.monotonic() - self._seen_at < FRESH_S:
            return self._seen
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_future()
            await self._tell(Observe())
        answer = self._looking
        try:
            async with asyncio.timeout(LOOK_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            if self._looking is answer:
                self._looking = None
            return None

    async def cancel(self, request_id: str, reason: str) -> None:
        """Its `run()` ends as cancelled, with what it took, when its item does."""
        inbox = self._inboxes.get(request_id)
        if inbox is not None and self._withdraw(inbox):
            self._deliver(request_id, RequestFailed(request_id, CANCELLED, reason))
        else:
            await self._tell(Cancel(request_id, reason))

    def _withdraw(self, inbox: _Inbox) -> bool:
        """Whether it was still to be submitted, and is not any more. A cancel that overtakes its submit is a cancel of
        nothing: the request would run for nobody."""
        waiting = inbox in self._outbox
        if waiting:
            self._outbox.remove(inbox)
        return waiting

    def take_away(self, request_id: str) -> None:
        """End a request's `run()` with Moved; what has arrived is consumed before."""
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            self._deliver(request_id, Moved(inbox.attempt))

    async def drop(self, request_id: str) -> None:
        """A request went elsewhere: the scheduler has to end it, when it hears of that, and shows it to nobody."""
        self._dropped.add(request_id)
        await self.cancel(request_id, "it went on on another mesh")

    def remembers(self, request_id: str) -> bool:
        """Whether the scheduler may still work on a request that it was told to drop."""
        return request_id in self._dropped

    async def has(self, request_id: str) -> bool:
        """Whether the scheduler knows a request, by an earlier gateway's doing perhaps; no, if it does not answer."""
        answer = self._asked.setdefault(request_id, asyncio.get_running_loop().create_future())
        await self._tell(Observe(request_id))
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await asyncio.shield(answer)
        except TimeoutError:
            return False
        finally:
            self._asked.pop(request_id, None)
        return any(job.id == request_id for job in status.jobs)

    async def forget(self, request_id: str) -> None:
        """A request of an earlier process is over: a checkpoint of it may be left that nobody needs any more."""
        if self._epoch is None:
            self._over.append(request_id)
        else:
            await self._tell(Stored(request_id))

    def abort(self, reason: str) -> None:
        """The mesh is lost for good: every running request ends with this reason, and every later one."""
        self._lost = reason
        for request_id in list(self._inboxes):
            self._deliver(request_id, RequestFailed(request_id, MESH_LOST, reason))
        self.on_state()

    def _check_open(self, resumed: bool) -> None:
        if self.state.draining and not resumed:
            raise NotReady(NO_NEW_WORK, draining=True)

    async def _consumed(self, inbox: _Inbox, frames: Frames, epoch: int | None) -> None:
        if epoch == self._epoch:
            # A new scheduler has all its credits: those that its predecessor spent are gone with it.
            inbox.unconsumed -= 1
            await self._tell(Grant(1))
        inbox.stored = frames.last
        if inbox.stored and inbox.unheard:
            inbox.end_unheard(self._epoch)
        if inbox.stored:
            await self._tell(Stored(inbox.request.id))

    def _submit(self, inbox: _Inbox) -> None:
        self._outbox.append(inbox)
        if self._flush is None or self._flush.done():
            self._flush = asyncio.create_task(self._send_outbox())

    async def _send_outbox(self) -> None:
        """What arrives within the delay goes out as one message, so that it is encoded together."""
        await asyncio.sleep(self._delay_s)
        batch, self._outbox = tuple(inbox.request for inbox in self._outbox), []
        if batch:
            await self._tell(Submit(batch))

    async def _tell(self, message: FromGateway) -> None:
        """What does not reach a scheduler is said again to the next one, or not worth saying."""
        try:
            await self._control.send(message)
        except PeerGone as error:
            log.warning("not told", message=type(message).__name__, error=str(error))

    async def _greet(self) -> None:
        self._spoken = time.monotonic()
        await self._tell(self._hello)

    async def _keep_in_touch(self) -> None:
        while True:
            await asyncio.sleep(max(self._spoken + SILENCE_S - time.monotonic(), 0.1))
            if time.monotonic() - self._spoken >= SILENCE_S:
                await self._greet()
                for request_id in tuple(self._dropped):
                    await self.drop(request_id)

    async def _hear_scheduler(self) -> None:
        while True:
            received = await self._control.receive()
            if isinstance(received.message, Welcome):
                await self._welcomed(received.message.epoch)
            elif received.epoch != self._epoch:
                self.stale += 1
                continue
            else:
                await self._hear(received.message)
            self._spoken = time.monotonic()
            self.num_heard += 1

    async def _hear(self, message: FromScheduler) -> None:
        match message:
            case MeshState():
                await self._see_state(message)
            case Status():
                self._see_status(message)
            case Progress() if message.request_id in self._dropped:
                # It was not to be reached when it was told.
                await self.drop(message.request_id)
            case Progress():
                self._deliver(message.request_id, message)
            case Completed() | Failed() | Cancelled() if message.request_id in self._dropped:
                self._dropped.discard(message.request_id)
                self.on_state()
            case Completed():
                self._deliver(message.request_id, message)
            case Failed() | Cancelled():
                self._deliver(message.request_id, _failure(message))

    async def _welcomed(self, epoch: int) -> None:
        """Tell a scheduler that does not know us who we are and what we still want of it."""
        if epoch == self._epoch:
            return
        first, self._epoch = self._epoch is None, epoch
        self._lost = None
        self._control.set_epoch(epoch)
        # It knows none of them, but there may be checkpoints.
        over, self._over, self._dropped = [*self._over, *self._dropped], [], set()
        for request_id in over:
            await self._tell(Stored(request_id))
        if first and not self._inboxes:
            return
        await self._greet()
        over = [request_id for request_id, inbox in self._inboxes.items() if inbox.stored]
        batch = tuple(self._owed())
        log.warning("the scheduler was started anew", epoch=epoch, resubmitted=len(batch))
        if batch:
            await self._tell(Submit(batch))
        for request_id in over:
            await self._tell(Stored(request_id))

    def _owed(self) -> list[Request]:
        """What a new scheduler has to be told: all that runs, but for what only its Completed is missing of."""
        owed = []
        for inbox in self._inboxes.values():
            inbox.unconsumed = 0
            if inbox.timings is not None:
                inbox.unheard = True
                if inbox.stored:
                    inbox.end_unheard(self._epoch)
                continue
            if inbox not in self._outbox:
                inbox.again()
            owed.append(inbox.request)
        self._outbox.clear()
        return owed

    async def _see_state(self, state: MeshState) -> None:
        if state.model is not None and state.model != self.model:
            self.model = state.model
            self.card = card_for(state.model.configs)
            self._tokenizer = await asyncio.to_thread(PromptTokenizer, state.model, self.card)
        if state.gave_up and self._lost is None:
            self.abort(state.reason)
        async with self._changed:
            self.state = state
            self._changed.notify_all()
        self.on_state()

    def _see_status(self, status: Status) -> None:
        if status.prefix:
            asked = self._asked.get(status.prefix)
            if asked is not None and not asked.done():
                asked.set_result(status)
            return
        self._seen, self._seen_at = status, time.monotonic()
        looking, self._looking = self._looking, None
        if looking is not None and not looking.done():
            looking.set_result(status)

    async def _hear_frames(self) -> None:
        while True:
            received = await self._frames.receive()
            chunk = received.message
            inbox = self._inboxes.get(chunk.request_id)
            if chunk.kind == "preview":
                self._take_preview(inbox, received)
                continue
            frames = self._accept(inbox, received)
            if inbox is not None and frames is not None:
                inbox.events.put_nowait((frames, self._epoch))
                continue
            self.dropped_chunks += 1
            if inbox is None or chunk.attempt >= inbox.request.attempt:
                # A chunk that nobody waits for still used a credit; one of an earlier epoch used that epoch's.
                await self._tell(Grant(1))

    def _accept(self, inbox: _Inbox | None, received: Received[FramesChunk]) -> Frames | None:
        """The chunk's frames, or None for one of an older attempt, a repeat, or a request that has ended.

        Chunks always have the same boundaries, so that the frames of another attempt go on where the last one was.
        """
        chunk = received.message
        if inbox is None or chunk.attempt < inbox.attempt:
            return None
        inbox.attempt = chunk.attempt
        if chunk.first_frame != inbox.next_frame:
            return None
        pixels = _pixels(received)
        if pixels is None:
            return None
        inbox.next_frame += chunk.count
        inbox.unconsumed += 1
        frames = Frames(chunk.first_frame, chunk.total, pixels, chunk.timings)
        if frames.last:
            inbox.timings = chunk.timings
        return frames

    def _take_preview(self, inbox: _Inbox | None, received: Received[FramesChunk]) -> None:
        """Keep it for the consumer, unless frames are there already or a newer one was."""
        chunk, pixels = received.message, _pixels(received)
        wanted = inbox is not None and chunk.attempt >= inbox.attempt and not inbox.next_frame
        if inbox is None or not wanted or chunk.step <= inbox.preview_step or pixels is None:
            self.dropped_chunks += 1
            return
        if inbox.preview is None:
            inbox.events.put_nowait((None, self._epoch))
        inbox.preview, inbox.preview_step = Preview(chunk.step, pixels[0]), chunk.step

    def _deliver(self, request_id: str, event: Event | Exception) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.events.put_nowait((event, self._epoch))


def _failure(news: Failed | Cancelled) -> RequestFailed:
    return RequestFailed(news.request_id, news.code, news.reason, news.usage)


def _pixels(received: Received[FramesChunk]) -> NDArray[np.uint8] | None:
    """(count, height, width, 3) of a chunk; None if its payload is not what its header says."""
    chunk = received.message
    shape = (chunk.count, chunk.height, chunk.width, 3)
    if received.payload is None or received.payload.nbytes != int(np.prod(shape)):
        log.warning("dropped: frames of the wrong size", request=chunk.request_id)
        return None
    return np.frombuffer(received.payload, dtype=np.uint8).reshape(shape)
