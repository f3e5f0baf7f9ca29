"""A mesh without a model, as a process: the real protocol, no arithmetic, so that what is measured is the gateway.

`python -m bench.standin --bind URL --sent FILE` works on `--at-once` requests, the others wait in line: `steps`
Progress messages `--step-ms` apart, then the card's chunks of noise-free frames `--chunk-ms` apart while there are
credits. When each chunk left is noted in FILE (request, first frame, CLOCK_MONOTONIC).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from runtime.errors import PeerGone
from runtime.layout import Layout
from runtime.models.card import Card, card_for, read_configs
from runtime.protocol import (
    Cancel,
    Cancelled,
    Completed,
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
BEAT_S = 1.0


@dataclass(eq=False)
class Running:
    request: Request
    gateway: bytes
    frames: np.ndarray
    chunks: list[int]
    """Frames in each, those that are still to go."""
    first: int = 0
    step: int = 0


@dataclass
class Standin:
    """One gateway or several; everything happens in `run()`."""

    channel: Channel[FromScheduler, ToScheduler]
    sent: TextIO
    step_s: float
    chunk_s: float
    at_once: int
    epoch: int = 1
    card: Card = field(init=False)
    model: ModelInfo = field(init=False)
    running: dict[str, Running] = field(default_factory=dict)
    """Those in line too."""
    line: deque[Running] = field(default_factory=deque)
    working: int = 0
    credits: dict[bytes, int] = field(default_factory=dict)
    starved: deque[Running] = field(default_factory=deque)
    frames: dict[bytes, Channel[FramesChunk, ToScheduler]] = field(default_factory=dict)
    timers: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        tokenizer = (MODEL_FOLDER / "tokenizer" / "tokenizer.json").read_text()
        exports = (TokenizerExport("text_encoder", tokenizer, 512),)
        configs = read_configs(MODEL_FOLDER)
        self.model = ModelInfo("demo", "demo", configs, exports, "fp32", "fp32", "cpu", Layout(1, 1, 1))
        self.card = card_for(configs)
        self.channel.set_epoch(self.epoch)

    def run(self) -> None:
        self.at(BEAT_S, self.beat)
        while True:
            wait_s = self.timers[0][0] - time.monotonic()
            received = self.channel.receive(max(wait_s, 0.0))
            if received is not None:
                self.hear(received.sender, received.message)
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()

    def at(self, delay_s: float, work: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + delay_s, next(self.numbers), work))

    def beat(self) -> None:
        for gateway in list(self.credits):
            self.tell(gateway, Welcome(self.epoch))
        self.at(BEAT_S, self.beat)

    def hear(self, sender: bytes, message: ToScheduler) -> None:
        match message:
            case GatewayHello():
                self.credits.setdefault(sender, message.credits)
                self.frames.setdefault(sender, Channel.connect(message.frames_endpoint, ToScheduler, incarnation("f")))
                self.tell(sender, Welcome(self.epoch))
                self.tell(sender, MeshState(True, "ready", 1, 1, self.model))
            case Submit():
                for request in message.requests:
                    self.take(request, sender)
            case Cancel():
                if self.running.pop(message.request_id, None) is not None:
                    self.tell(sender, Cancelled(message.request_id, message.reason))
            case Stored():
                if self.running.pop(message.request_id, None) is not None:
                    timings = {"queued": 0.0, "encode": 0.0, "denoise": 0.0, "decode": 0.0, "total": 0.0}
                    self.tell(sender, Completed(message.request_id, timings))
            case Grant():
                self.credits[sender] += message.credits
                if self.starved:
                    self.send_chunk(self.starved.popleft())

    def take(self, request: Request, gateway: bytes) -> None:
        one = Running(request, gateway, gradient(request.params), list(self.card.decode_chunks(request.params)))
        self.running[request.id] = one
        self.line.append(one)
        self.tell(gateway, Progress(request.id, "queued", 0, request.params.num_inference_steps, 1.0, len(self.line)))
        self.begin()

    def begin(self) -> None:
        while self.line and self.working < self.at_once:
            self.working += 1
            self.advance(self.line.popleft())

    def leave(self) -> None:
        """A request that needs no more work makes room."""
        self.working -= 1
        self.begin()

    def advance(self, one: Running) -> None:
        if one.request.id not in self.running:
            self.leave()
            return
        steps = one.request.params.num_inference_steps
        if one.step < steps:
            self.tell(
                one.gateway, Progress(one.request.id, "denoise", one.step, steps, self.step_s * (steps - one.step))
            )
            one.step += 1
            self.at(self.step_s, lambda: self.advance(one))
        elif one.chunks:
            self.send_chunk(one)
        else:
            self.leave()

    def send_chunk(self, one: Running) -> None:
        if one.request.id not in self.running:
            self.leave()
            return
        if not self.credits[one.gateway]:
            self.starved.append(one)
            return
        self.credits[one.gateway] -= 1
        count, params = one.chunks.pop(0), one.request.params
        pixels = one.frames[one.first : one.first + count]
        size = (params.num_frames, params.height, params.width)
        chunk = FramesChunk(one.request.id, one.request.attempt, one.first, count, *size, {"denoise": 0.0})
        self.sent.write(f"{one.request.id} {one.first} {time.monotonic()}\n")
        self.sent.flush()
        self.frames[one.gateway].send(chunk, payload=pixels.data)
        one.first += count
        self.at(self.chunk_s, lambda: self.advance(one))

    def tell(self, gateway: bytes, message: FromScheduler) -> None:
        try:
            self.channel.send(message, to=gateway)
        except PeerGone:
            self.credits.pop(gateway, None)


def gradient(params: ResolvedParams) -> np.ndarray:
    """(num_frames, height, width, 3): a ramp that moves, about as hard to encode as a smooth video."""
    ramp = np.linspace(0, 255, params.width, dtype=np.uint8)
    frames = np.stack([np.roll(ramp, 4 * number) for number in range(params.num_frames)])
    return np.ascontiguousarray(np.broadcast_to(frames[:, None, :, None], (*_shape(params), 3)))


def _shape(params: ResolvedParams) -> tuple[int, int, int]:
    return params.num_frames, params.height, params.width


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.standin", description=__doc__)
    parser.add_argument("--bind", required=True)
    parser.add_argument("--sent", type=Path, required=True)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--chunk-ms", type=float, default=50.0)
    parser.add_argument("--at-once", type=int, default=64)
    args = parser.parse_args()
    with args.sent.open("w") as sent:
        channel: Channel[FromScheduler, ToScheduler] = Channel.bind(args.bind, ToScheduler)
        Standin(channel, sent, args.step_ms / 1000, args.chunk_ms / 1000, args.at_once).run()


if __name__ == "__main__":
    main()
