"""The way into a mesh: submit, cancel, progress, frames. Holds no weights and speaks no HTTP.

`run()` is one request from submission to its last frame as an async iterator. What the consumer does between two
items is what the mesh waits for: a chunk counts as stored when the consumer comes back for the next item.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.tokenize import PromptTokenizer
from runtime.errors import NotReady, PeerGone, RequestFailed, StartFailed
from runtime.log import get_logger
from runtime.models.card import Card, card_for
from runtime.protocol import (
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
    Progress,
    Request,
    Stored,
    Submit,
    Welcome,
)
from runtime.sampling import ResolvedParams, Terms
from runtime.wire import AsyncChannel, Received, incarnation

FRAME_CREDITS = 16
"""Chunks that may be under way to this gateway at once; bounds its memory."""

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


Event = Progress | Frames | Completed


@dataclass
class _Inbox:
    """What arrived for one running request."""

    request: Request
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    next_frame: int = 0
    unconsumed: int = 0
    """Chunks that were accepted and whose credits have not gone back yet."""


class Mesh:
    """One gateway instance's connection to one scheduler and its workers."""

    def __init__(self, scheduler: str, frames: str, *, batching_delay_s: float = 0.0) -> None:
        """`scheduler` is the endpoint to connect to, `frames` the one to take frames on."""
        self._control: AsyncChannel[FromGateway, FromScheduler] = AsyncChannel.connect(
            scheduler, FromScheduler, incarnation("gateway")
        )
        self._frames: AsyncChannel[Any, FramesChunk] = AsyncChannel.bind(frames, FramesChunk)
        self._delay_s = batching_delay_s
        self._inboxes: dict[str, _Inbox] = {}
        self._outbox: list[Request] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._flush: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._tokenizer: PromptTokenizer | None = None
        self.state = MeshState(False, "the scheduler has not answered yet", 0, 0)
        self.model: ModelInfo | None = None
        self.card: Card | None = None
        self._lost: Exception | None = None
        self.dropped_chunks = 0

    async def start(self) -> None:
        """Say hello; does not wait for an answer."""
        await self._control.send(GatewayHello(self._frames.endpoint, FRAME_CREDITS))
        self._tasks = [asyncio.create_task(self._hear_scheduler()), asyncio.create_task(self._hear_frames())]

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

    def request(self, request_id: str, params: ResolvedParams, terms: Terms = DEFAULT_TERMS) -> Request:
        """A tokenized request.

        Raises:
            NotReady: no rank has loaded the model yet.
            InvalidInput: a prompt is too long for the model.
        """
        if self._tokenizer is None:
            raise NotReady(self.state.reason)
        token_ids = self._tokenizer.tokenize(params)
        return Request(request_id, params, token_ids, 0, terms.key, terms.priority, terms.timeout_s)

    def warnings(self, params: ResolvedParams) -> tuple[str, ...]:
        """What of the prompts an encoder does not read, in words; empty until the model is known."""
        return () if self._tokenizer is None else self._tokenizer.warnings(params)

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """Progress and frames until Completed. Leaving the loop early cancels the request.

        Raises:
            RequestFailed: the mesh gave up on it, or somebody cancelled it.
        """
        inbox = _Inbox(request)
        self._inboxes[request.id] = inbox
        ended = False
        if self._lost is not None:
            inbox.events.put_nowait(self._lost)
        try:
            self._submit(request)
            while not ended:
                event = await inbox.events.get()
                if isinstance(event, Exception):
                    ended = True
                    raise event
                ended = isinstance(event, Completed)
                yield event
                if isinstance(event, Frames):
                    await self._consumed(inbox, event)
        finally:
            del self._inboxes[request.id]
            if inbox.unconsumed:
                await self._control.send(Grant(inbox.unconsumed))
            if request in self._outbox:
                # A cancel that overtakes its submit is a cancel of nothing: the request would run for nobody.
                self._outbox.remove(request)
            elif not ended:
                await self.cancel(request.id, "the submitter left")

    async def cancel(self, request_id: str, reason: str) -> None:
        await self._control.send(Cancel(request_id, reason))

    def abort(self, error: Exception) -> None:
        """The mesh is lost for good: end every running request with this error, and every later one."""
        self._lost = error
        for request_id in list(self._inboxes):
            self._deliver(request_id, error)

    async def _consumed(self, inbox: _Inbox, frames: Frames) -> None:
        inbox.unconsumed -= 1
        await self._control.send(Grant(1))
        if frames.last:
            await self._control.send(Stored(inbox.request.id))

    def _submit(self, request: Request) -> None:
        self._outbox.append(request)
        if self._flush is None or self._flush.done():
            self._flush = asyncio.create_task(self._send_outbox())

    async def _send_outbox(self) -> None:
        """What arrives within the delay goes out as one message, so that it is encoded together."""
        await asyncio.sleep(self._delay_s)
        batch, self._outbox = tuple(self._outbox), []
        if batch:
            await self._control.send(Submit(batch))

    async def _hear_scheduler(self) -> None:
        while True:
            message = (await self._control.receive()).message
            match message:
                case Welcome():
                    self._control.set_epoch(message.epoch)
                case MeshState():
                    await self._see_state(message)
                case Progress() | Completed():
                    self._deliver(message.request_id, message)
                case Failed():
                    self._deliver(message.request_id, RequestFailed(message.request_id, message.code, message.reason))
                case Cancelled():
                    self._deliver(message.request_id, RequestFailed(message.request_id, "cancelled", message.reason))

    async def _see_state(self, state: MeshState) -> None:
        if state.model is not None and state.model != self.model:
            self.model = state.model
            self.card = card_for(state.model.configs)
            self._tokenizer = await asyncio.to_thread(PromptTokenizer, state.model, self.card)
        async with self._changed:
            self.state = state
            self._changed.notify_all()

    async def _hear_frames(self) -> None:
        while True:
            received = await self._frames.receive()
            frames = self._accept(received)
            if frames is not None:
                self._deliver(received.message.request_id, frames)
                continue
            # A chunk that nobody waits for still used a credit.
            self.dropped_chunks += 1
            try:
                await self._control.send(Grant(1))
            except PeerGone as error:
                log.warning("credit not returned", error=str(error))

    def _accept(self, received: Received[FramesChunk]) -> Frames | None:
        """The chunk's frames, or None for one of an older attempt, a repeat, or a request that has ended."""
        chunk = received.message
        inbox = self._inboxes.get(chunk.request_id)
        if inbox is None or chunk.attempt != inbox.request.attempt or chunk.first_frame != inbox.next_frame:
            return None
        shape = (chunk.count, chunk.height, chunk.width, 3)
        if received.payload is None or received.payload.nbytes != int(np.prod(shape)):
            log.warning("dropped: frames of the wrong size", request=chunk.request_id)
            return None
        inbox.next_frame += chunk.count
        inbox.unconsumed += 1
        pixels = np.frombuffer(received.payload, dtype=np.uint8).reshape(shape)
        return Frames(chunk.first_frame, chunk.total, pixels, chunk.timings)

    def _deliver(self, request_id: str, event: Event | Exception) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.events.put_nowait(event)
