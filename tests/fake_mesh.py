"""A scheduler and a worker in one thread, without a model: the real protocol over real sockets, frames that move.

It can be restarted under a new epoch, lose its worker and resume what ran, drain, and give up, as the real one does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from runtime.errors import PeerGone
from runtime.layout import Layout
from runtime.models.card import Card, card_for, read_configs
from runtime.protocol import (
    TIMED_OUT,
    Cancel,
    Cancelled,
    Completed,
    Drain,
    Failed,
    FramesChunk,
    FromScheduler,
    GatewayHello,
    Grant,
    JobStatus,
    MeshState,
    ModelInfo,
    Observe,
    Progress,
    RankStatus,
    Request,
    Status,
    StepTime,
    Stored,
    Submit,
    SupervisorHello,
    TokenizerExport,
    ToScheduler,
    Totals,
    Usage,
    Welcome,
)
from runtime.sampling import ResolvedParams, preview_steps
from runtime.wire import Channel, incarnation

MODEL_FOLDER = Path(__file__).parent.parent / "workers" / "demo" / "model"
EPOCH = 4711
BEAT_S = 1.0
"""Every gateway is written to at least so often."""
HELLOS = GatewayHello | SupervisorHello | Observe


def demo_model() -> ModelInfo:
    """What rank 0 says about the shipped model, made from its JSON files alone."""
    tokenizer = (MODEL_FOLDER / "tokenizer" / "tokenizer.json").read_text()
    return ModelInfo(
        name="demo",
        model_path="demo",
        configs=read_configs(MODEL_FOLDER),
        tokenizers=(TokenizerExport("text_encoder", tokenizer, 512),),
        dit_precision="fp32",
        vae_precision="fp32",
        device="cpu",
        layout=Layout(1, 1, 2),
    )


def moving_frames(params: ResolvedParams) -> np.ndarray:
    """(num_frames, height, width, 3): a bright square that moves two pixels a frame to the right."""
    frames = np.full((params.num_frames, params.height, params.width, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        left = 2 * number % (params.width - 16)
        frame[16:32, left : left + 16] = 220
    return frames


def preview_brightness(step: int) -> int:
    """Of every pixel of the preview after so many steps."""
    return 20 + 8 * step


@dataclass
class _Running:
    request: Request
    gateway: bytes
    life: Iterator[str]
    """Yields the mark that it has come to; it goes on when nothing holds that mark."""
    mark: str = ""
    stored: bool = False


@dataclass
class FakeMesh:
    """Runs every request at once, one mark after the other: queued, encode, denoise:1 …, decode:1 …, deliver."""

    folder: Path
    ready: bool = True
    steps_sleep_s: float = 0.0
    slowness: float = 1.0
    """Scales the seconds that it says it took."""
    submitted: list[Request] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    """Marks at which requests stop until `release()`."""
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Mark -> (code, reason): what happens to the requests that come to it."""
    most_credits: int = 0
    """A gateway that gives back more than it took exceeds what it granted first."""
    chunks: list[tuple[str, int, int]] = field(default_factory=list)
    """(request, attempt, first frame) of every chunk that was sent."""
    untold: set[str] = field(default_factory=set)
    """Marks of which no progress is told: the scheduler is silent about steps within an item, and frames overtake."""
    repeats: list[str] = field(default_factory=list)
    """Requests of which the next chunk is sent twice."""
    previews: list[tuple[str, int, int]] = field(default_factory=list)
    """(request, attempt, step) of every preview that was sent."""
    epoch: int = EPOCH
    beats: bool = True
    stale: int = 0
    draining: bool = False
    gave_up: str = ""
    backlog_s: float = 0.0
    loses_cancels: bool = False
    looks: int = 0
    """How often somebody asked how things stand."""
    blind: bool = False
    """Nobody is told."""
    totals: Totals = field(default_factory=Totals)
    """What it says that it did."""
    hellos: list[int] = field(default_factory=list)
    """The epoch in which each gateway's hello came."""
    backlog_s: float = 0.0
    """What it predicts for all that it has accepted."""

    def __post_init__(self) -> None:
        self.model = demo_model()
        self.card: Card = card_for(self.model.configs)
        self._running: dict[str, _Running] = {}
        self._gateways: dict[bytes, str] = {}
        self._credits: dict[bytes, int] = {}
        self._frames: dict[str, Channel[FramesChunk, ToScheduler]] = {}
        self._ended = threading.Event()
        self._announce = threading.Event()
        self._frozen = threading.Event()
        self._orders: list[Callable[[], None]] = []
        self._beaten = 0.0
        self._bind()
        self._thread = threading.Thread(target=self._loop, name="fake mesh")
        self._thread.start()

    def _bind(self) -> None:
        self._channel: Channel[FromScheduler, ToScheduler] | None = Channel.bind(self.endpoint, ToScheduler)
        self._channel.set_epoch(self.epoch)

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.folder}/scheduler"

    @property
    def credits(self) -> int:
        """Of the gateway that came last."""
        return next(reversed(self._credits.values()), 0)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def release(self, *marks: str) -> None:
        """Let requests pass these marks; all of them if none is named."""
        self.held -= set(marks) or set(self.held)

    def become_ready(self) -> None:
        self.ready = True
        self._announce.set()

    def announce(self) -> None:
        """Tell every gateway how things stand."""
        self._announce.set()

    def freeze(self) -> None:
        """As SIGSTOP: what is sent to it is read when it goes on."""
        self._order(self._frozen.set)

    def thaw(self) -> None:
        self._frozen.clear()

    def drain(self) -> None:
        self._order(self._drain)

    def give_up(self, reason: str) -> None:
        self.gave_up = reason
        self._announce.set()

    def die(self) -> None:
        """As kill -9 of the scheduler: nothing is remembered, nobody is told."""
        self._order(self._die)

    def come_back(self) -> None:
        """A scheduler at the same endpoint, under a new epoch. Its worker starts from scratch."""
        self._order(self._come_back)

    def restart(self) -> None:
        self.die()
        self.come_back()

    def lose_worker(self) -> None:
        """What ran starts again with the next attempt; its frames come again from the first on."""
        self._order(self._lose_worker)

    def _order(self, work: Callable[[], None]) -> None:
        """Have the loop do it, and wait until it has."""
        done = threading.Event()
        self._orders.append(lambda: (work(), done.set()))
        assert done.wait(5)

    def _die(self) -> None:
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        self._running.clear()
        self._gateways.clear()

    def _come_back(self) -> None:
        self.epoch += 1
        self._credits.clear()
        self._bind()

    def _lose_worker(self) -> None:
        for running in self._running.values():
            self._start_again(running, running.gateway)

    def _start_again(self, running: _Running, gateway: bytes) -> None:
        running.request = msgspec.structs.replace(running.request, attempt=running.request.attempt + 1)
        running.gateway, running.mark = gateway, ""
        running.life = self._live(running)

    def _drain(self) -> None:
        self.draining = True
        self._announce.set()

    def wait_for(self, mark: str, timeout_s: float = 20.0) -> str:
        """The id of a request that is held at a mark."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for running in list(self._running.values()):
                if running.mark == mark:
                    return running.request.id
            time.sleep(0.005)
        raise AssertionError(f"no request came to {mark}: {[r.mark for r in self._running.values()]}")

    def at(self, request_id: str) -> str:
        """The mark that a request has come to; empty if it does not run here."""
        running = self._running.get(request_id)
        return running.mark if running is not None else ""

    def _loop(self) -> None:
        try:
            while not self._ended.is_set():
                while self._orders:
                    self._orders.pop(0)()
                if self._frozen.is_set():
                    time.sleep(0.01)
                    continue
                self._receive(0.001 if any(map(self._may_go_on, self._running.values())) else 0.02)
                self._beat()
                if self._announce.is_set():
                    self._announce.clear()
                    for gateway in list(self._gateways):
                        self._tell(gateway, self._state())
                for running in list(self._running.values()):
                    self._advance(running)
        finally:
            for channel in filter(None, [self._channel, *self._frames.values()]):
                channel.close()

    def _receive(self, patience_s: float) -> None:
        if self._channel is None:
            time.sleep(patience_s)
            return
        received = self._channel.receive(patience_s)
        while received is not None:
            self._hear(received.sender, received.epoch, received.message)
            received = self._channel.receive(0)

    def _beat(self) -> None:
        if self.beats and time.monotonic() - self._beaten > BEAT_S:
            self._beaten = time.monotonic()
            for gateway in list(self._gateways):
                self._tell(gateway, Welcome(self.epoch))

    def _hear(self, sender: bytes, epoch: int, message: ToScheduler) -> None:
        if epoch != self.epoch and not isinstance(message, HELLOS):
            self.stale += 1
            self._tell(sender, Welcome(self.epoch))
            return
        match message:
            case GatewayHello():
                self.hellos.append(self.epoch)
                if sender not in self._gateways:
                    self._credits[sender] = message.credits
                self._gateways[sender] = message.frames_endpoint
                self._tell(sender, Welcome(self.epoch))
                self._tell(sender, self._state())
            case Submit():
                self.batches.append(len(message.requests))
                for request in message.requests:
                    self.submitted.append(request)
                    self._take(request, sender)
            case Drain():
                self._drain()
            case Observe():
                self._answer(sender, message.prefix)
            case Cancel():
                self._cancel(sender, message)
            case Stored():
                self.stored.append(message.request_id)
                running = self._running.get(message.request_id)
                if running is not None and running.gateway == sender:
                    running.stored = True
            case Grant():
                self._credits[sender] = self._credits.get(sender, 0) + message.credits
                self.most_credits = max(self.most_credits, self.credits)

    def _cancel(self, gateway: bytes, message: Cancel) -> None:
        self.cancelled.append(message.request_id)
        if self.loses_cancels:
            return
        running = self._running.get(message.request_id)
        if running is not None and running.gateway == gateway:
            del self._running[message.request_id]
        usage = Usage() if running is None else Usage(0.1, 0.3, 1, 5_000_000)
        self._tell(gateway, Cancelled(message.request_id, message.reason, usage))

    def _answer(self, observer: bytes, prefix: str) -> None:
        self.looks += 1
        if not self.blind:
            self._tell(observer, Welcome(self.epoch))
            self._tell(observer, self.status(prefix))

    def _take(self, request: Request, gateway: bytes) -> None:
        """A request that runs already goes on for the gateway that asks for it now."""
        running = self._running.get(request.id)
        if running is None and self.draining:
            self._tell(gateway, Failed(request.id, "draining", "the mesh is draining and takes no new work"))
        elif running is None:
            running = self._running[request.id] = _Running(request, gateway, iter(()))
            running.life = self._live(running)
        elif running.gateway != gateway:
            self._start_again(running, gateway)

    def _tell(self, gateway: bytes, message: FromScheduler) -> None:
        """The requests of a gateway that is gone wait for one that adopts them."""
        try:
            assert self._channel is not None
            self._channel.send(message, to=gateway)
        except PeerGone:
            self._gateways.pop(gateway, None)

    def _state(self) -> MeshState:
        return msgspec.structs.replace(self._readiness(), backlog_s=self.backlog_s)

    def _readiness(self) -> MeshState:
        if self.gave_up:
            return MeshState(False, self.gave_up, 0, 2, self.model, gave_up=True)
        if self.draining:
            return MeshState(False, "draining", 2, 2, self.model, draining=True)
        if not self.ready:
            return MeshState(False, "the workers are starting", 1, 2)
        return MeshState(True, "ready", 2, 2, self.model, backlog_s=self.backlog_s)

    def status(self, prefix: str = "") -> Status:
        """Two ranks that do nothing, whatever runs."""
        state = self._state()
        return Status(
            epoch=self.epoch,
            ready=state.ready,
            reason=state.reason,
            layout=self.model.layout,
            policy="srpt",
            model=self.model.name,
            losses=3,
            ranks=tuple(
                RankStatus(rank, "here", 100 + rank, self.ready, 0.1, "idle", (), 0.0, 0.0, 10, 100, 1000)
                for rank in range(2)
            ),
            jobs=tuple(
                JobStatus(one.request.id, one.request.key, one.mark.partition(":")[0], 0, 4, 1.0, 0.0, 1.0)
                for one in self._running.values()
                if one.request.id.startswith(prefix)
            ),
            queued={},
            step_times=(StepTime("denoise", 2, 5, 0.1, 0.2),),
            cost_error=0.25,
            stale=self.stale,
            dropped=0,
            draining=self.draining,
            totals=self.totals,
            prefix=prefix,
        )

    def _may_go_on(self, running: _Running) -> bool:
        return running.mark not in self.held and (running.mark != "deliver" or running.stored)

    def _advance(self, running: _Running) -> None:
        if not self._may_go_on(running):
            return
        running.mark = next(running.life, "end")
        if running.mark in self.failures:
            code, reason = self.failures[running.mark]
            request_id, usage = running.request.id, Usage(0.1, 0.7, 3, 5_000_000)
            timed_out = Cancelled(request_id, reason, usage, code)
            self._tell(running.gateway, timed_out if code == TIMED_OUT else Failed(request_id, code, reason, usage))
        if running.mark in {"end", *self.failures}:
            self._running.pop(running.request.id, None)

    def _live(self, running: _Running) -> Iterator[str]:
        request, gateway = running.request, running.gateway
        steps, chunks = request.params.num_inference_steps, self.card.decode_chunks(request.params)

        def tell(stage: str, step: int, total: int, eta_s: float, position: int = 0) -> None:
            if f"{stage}:{step}" not in self.untold:
                self._tell(gateway, Progress(request.id, stage, step, total, eta_s, position))

        tell("queued", 0, steps, 4.0, 1)
        yield "queued"
        tell("encode", 0, steps, 3.0)
        yield "encode"
        due = preview_steps(steps, request.previews)
        for step in range(steps + 1):
            tell("denoise", step, steps, 2.0 * (steps - step) / steps + 1)
            if step in due:
                self._send_preview(gateway, request, step)
            time.sleep(self.steps_sleep_s)
            yield f"denoise:{step}"
        tell("decode", 0, len(chunks), 1.0)
        frames, first = moving_frames(request.params), 0
        for number, count in enumerate(chunks, 1):
            while self._credits.get(gateway, 0) < 1:
                yield "starved"
            self._credits[gateway] -= 1
            self._send_frames(gateway, request, frames[first : first + count], first)
            if request.id in self.repeats:
                self.repeats.remove(request.id)
                self._credits[gateway] -= 1
                self._send_frames(gateway, request, frames[first : first + count], first)
            first += count
            tell("deliver" if number == len(chunks) else "decode", number, len(chunks), 1.0)
            yield f"decode:{number}"
        yield "deliver"
        self.completed.append(request.id)
        timings = {"queued": 0.1, "encode": 0.2, "denoise": 0.5, "decode": 0.2, "total": 1.0}
        timings = {stage: self.slowness * seconds for stage, seconds in timings.items()}
        self._tell(gateway, Completed(request.id, timings, Usage(0.1, 1.8, request.attempt + 1, 5_000_000)))

    def _send_frames(self, gateway: bytes, request: Request, pixels: np.ndarray, first: int) -> None:
        count, height, width, _ = pixels.shape
        total, timings = request.params.num_frames, {"encode": 0.2 * self.slowness, "denoise": 0.5 * self.slowness}
        chunk = FramesChunk(request.id, request.attempt, first, count, total, height, width, timings)
        if self._send_chunk(gateway, chunk, pixels):
            self.chunks.append((request.id, request.attempt, first))

    def _send_preview(self, gateway: bytes, request: Request, step: int) -> None:
        """As coarse as latents are, its brightness tells the step."""
        height, width = request.params.height // 8, request.params.width // 8
        pixels = np.full((1, height, width, 3), preview_brightness(step), np.uint8)
        chunk = FramesChunk(request.id, request.attempt, 0, 1, 1, height, width, kind="preview", step=step)
        if self._send_chunk(gateway, chunk, pixels):
            self.previews.append((request.id, request.attempt, step))

    def _send_chunk(self, gateway: bytes, chunk: FramesChunk, pixels: np.ndarray) -> bool:
        endpoint = self._gateways.get(gateway)
        if endpoint is None:
            return False
        if endpoint not in self._frames:
            self._frames[endpoint] = Channel.connect(endpoint, ToScheduler, incarnation("frames"))
        self._frames[endpoint].send(chunk, payload=np.ascontiguousarray(pixels).data)
        return True
