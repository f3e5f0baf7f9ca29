"""A scheduler and a worker in one thread, without a model: the real protocol over real sockets, frames that move."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime.errors import PeerGone
from runtime.layout import Layout
from runtime.models.card import Card, card_for, read_configs
from runtime.protocol import (
    Cancel,
    Cancelled,
    Completed,
    Failed,
    FramesChunk,
    FromScheduler,
    GatewayHello,
    Grant,
    MeshState,
    ModelInfo,
    Progress,
    Request,
    Stored,
    Submit,
    TokenizerExport,
    ToScheduler,
    Welcome,
)
from runtime.sampling import ResolvedParams
from runtime.wire import Channel, incarnation

MODEL_FOLDER = Path(__file__).parent.parent / "workers" / "demo" / "model"
EPOCH = 4711


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
    submitted: list[Request] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    """Marks at which requests stop until `release()`."""
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Mark -> (code, reason): what happens to the requests that come to it."""
    credits: int = 0

    def __post_init__(self) -> None:
        self.model = demo_model()
        self.card: Card = card_for(self.model.configs)
        self._running: dict[str, _Running] = {}
        self._gateways: dict[bytes, str] = {}
        self._frames: dict[str, Channel[FramesChunk, ToScheduler]] = {}
        self._ended = threading.Event()
        self._announce = threading.Event()
        self._channel: Channel[FromScheduler, ToScheduler] = Channel.bind(self.endpoint, ToScheduler)
        self._channel.set_epoch(EPOCH)
        self._thread = threading.Thread(target=self._loop, name="fake mesh")
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.folder}/scheduler"

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def release(self, *marks: str) -> None:
        """Let requests pass these marks; all of them if none is named."""
        self.held -= set(marks) or set(self.held)

    def become_ready(self) -> None:
        self.ready = True
        self._announce.set()

    def wait_for(self, mark: str, timeout_s: float = 5.0) -> str:
        """The id of a request that is held at a mark."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for running in list(self._running.values()):
                if running.mark == mark:
                    return running.request.id
            time.sleep(0.005)
        raise AssertionError(f"no request came to {mark}: {[r.mark for r in self._running.values()]}")

    def _loop(self) -> None:
        try:
            while not self._ended.is_set():
                received = self._channel.receive(0.001 if any(map(self._may_go_on, self._running.values())) else 0.02)
                while received is not None:
                    self._hear(received.sender, received.epoch, received.message)
                    received = self._channel.receive(0)
                if self._announce.is_set():
                    self._announce.clear()
                    for gateway in list(self._gateways):
                        self._tell(gateway, self._state())
                for running in list(self._running.values()):
                    self._advance(running)
        finally:
            for channel in [self._channel, *self._frames.values()]:
                channel.close()

    def _hear(self, sender: bytes, epoch: int, message: ToScheduler) -> None:
        assert epoch == EPOCH or isinstance(message, GatewayHello), message
        match message:
            case GatewayHello():
                self._gateways[sender] = message.frames_endpoint
                self.credits = message.credits
                self._tell(sender, Welcome(EPOCH))
                self._tell(sender, self._state())
            case Submit():
                self.batches.append(len(message.requests))
                for request in message.requests:
                    self.submitted.append(request)
                    self._running[request.id] = _Running(request, sender, self._live(request, sender))
            case Cancel():
                self.cancelled.append(message.request_id)
                running = self._running.pop(message.request_id, None)
                if running is not None:
                    self._tell(sender, Cancelled(message.request_id, message.reason))
            case Stored():
                self.stored.append(message.request_id)
                self._running[message.request_id].stored = True
            case Grant():
                self.credits += message.credits

    def _tell(self, gateway: bytes, message: FromScheduler) -> None:
        """A gateway that is gone takes its requests with it."""
        try:
            self._channel.send(message, to=gateway)
        except PeerGone:
            self._gateways.pop(gateway, None)
            self._running = {name: run for name, run in self._running.items() if run.gateway != gateway}

    def _state(self) -> MeshState:
        if not self.ready:
            return MeshState(False, "the workers are starting", 1, 2)
        return MeshState(True, "ready", 2, 2, self.model)

    def _may_go_on(self, running: _Running) -> bool:
        return running.mark not in self.held and (running.mark != "deliver" or running.stored)

    def _advance(self, running: _Running) -> None:
        if not self._may_go_on(running):
            return
        running.mark = next(running.life, "end")
        if running.mark in self.failures:
            code, reason = self.failures[running.mark]
            self._tell(running.gateway, Failed(running.request.id, code, reason))
        if running.mark in {"end", *self.failures}:
            self._running.pop(running.request.id, None)

    def _live(self, request: Request, gateway: bytes) -> Iterator[str]:
        steps, chunks = request.params.num_inference_steps, self.card.decode_chunks(request.params)

        def tell(stage: str, step: int, total: int, eta_s: float, position: int = 0) -> None:
            self._tell(gateway, Progress(request.id, stage, step, total, eta_s, position))

        tell("queued", 0, steps, 4.0, 1)
        yield "queued"
        tell("encode", 0, steps, 3.0)
        yield "encode"
        for step in range(steps + 1):
            tell("denoise", step, steps, 2.0 * (steps - step) / steps + 1)
            time.sleep(self.steps_sleep_s)
            yield f"denoise:{step}"
        tell("decode", 0, len(chunks), 1.0)
        frames, first = moving_frames(request.params), 0
        for number, count in enumerate(chunks, 1):
            while self.credits < 1:
                yield "starved"
            self.credits -= 1
            self._send_frames(gateway, request, frames[first : first + count], first)
            first += count
            tell("deliver" if number == len(chunks) else "decode", number, len(chunks), 1.0)
            yield f"decode:{number}"
        yield "deliver"
        self.completed.append(request.id)
        timings = {"queued": 0.1, "encode": 0.2, "denoise": 0.5, "decode": 0.2, "total": 1.0}
        self._tell(gateway, Completed(request.id, timings))

    def _send_frames(self, gateway: bytes, request: Request, pixels: np.ndarray, first: int) -> None:
        endpoint = self._gateways.get(gateway)
        if endpoint is None:
            return
        if endpoint not in self._frames:
            self._frames[endpoint] = Channel.connect(endpoint, ToScheduler, incarnation("frames"))
        count, height, width, _ = pixels.shape
        total, timings = request.params.num_frames, {"encode": 0.2, "denoise": 0.5}
        chunk = FramesChunk(request.id, request.attempt, first, count, total, height, width, timings)
        self._frames[endpoint].send(chunk, payload=np.ascontiguousarray(pixels).data)
