"""What checkpoints cost: seconds of a denoising step with one every 1, 5 and 10 steps against none, interleaved pairs.

Predicted: the compute thread only takes references (about 50 us), the rest is the writer thread's, which shares the
cores and the interpreter with compute. A checkpoint is durable after its bytes at the disk's rate and two fsyncs; what
of that is Python and not waiting for the disk, about 0.5 ms, is what a step can lose. So a checkpoint at every step
costs at most 0.5 ms / step, 5 % of the demo model's 10 ms, and one in ten steps nothing that can be seen.
Figures are written to results/ only for the default arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import msgspec
import torch
from diffusers import WanTransformer3DModel

from bench.report import machine, save, spread
from launch.weights import resolve_model
from runtime.config import Config
from runtime.models.card import Card, card_for, read_configs
from runtime.protocol import (
    Checkpoint,
    Checkpointed,
    CheckpointFailed,
    Denoise,
    Encode,
    FromScheduler,
    Release,
    Request,
    ToScheduler,
)
from runtime.sampling import SamplingParams
from runtime.wire import Channel, incarnation
from workers.checkpoint import digest
from workers.executor import Executor
from workers.frames import FrameSender
from workers.seat import Seat
from workers.setup import build_executor
from workers.spool import Spool, SpoolFolder

LARGER = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 4,
    "in_channels": 16,
    "out_channels": 16,
}
"""The denoiser of the second model, with random weights: the latents of a real Wan are of 16 channels."""

ASKED: dict[str, dict[str, Any]] = {"demo": {}, "larger": {"height": 128, "width": 128, "num_frames": 33}}
"""Sizes other than the model's own."""

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--models", nargs="+", default=["demo", "larger"], choices=["demo", "larger"])
    args = parser.parse_args()
    where = machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="framemesh-", dir=".") as folder:
        figures = {name: _measure(name, Path(folder), args) for name in args.models}
    if args == parser.parse_args([]):
        save("checkpoints", where, figures)
    else:
        print(msgspec.json.format(msgspec.json.encode({"machine": where, **figures})).decode())


def _measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = resolve_model("demo") if name == "demo" else _larger(folder)
    with _rank(model, ASKED[name], folder / f"spool-{name}") as rank:
        rank.run(args.steps, every=1)
        size, bare_s = statistics.median(rank.heard.bytes), statistics.median(rank.run(args.steps))
        disk_s = _disk_seconds(folder / "disk", int(size))
        print(f"{name}: {size:.0f} bytes; predicted durable after {disk_s * 1000:.1f} ms, step {bare_s * 1000:.1f} ms")
        return {
            "bytes": size,
            "predicted_durable_s": disk_s,
            "disk_bytes_per_s": size / disk_s,
            "every": {str(every): _pairs(rank, args, every) for every in args.every},
        }


def _pairs(rank: _Rank, args: argparse.Namespace, every: int) -> dict[str, Any]:
    """Both runs of a pair see the same machine; the median step of each, so that one hiccup decides nothing."""
    rank.heard.clear()
    ratios, means, steps = [], [], []
    for _ in range(args.pairs):
        without, having = rank.run(args.steps), rank.run(args.steps, every)
        ratios.append(statistics.median(having) / statistics.median(without))
        means.append(sum(having) / sum(without))
        steps.append(statistics.median(having))
    return {
        "ratio_of_median_steps": spread(ratios),
        "ratio_of_whole_runs": spread(means),
        "step_s": spread(steps),
        "durable_s": spread(rank.heard.durable_s),
        "written": len(rank.heard.bytes),
        "dropped_because_the_disk_was_slow": rank.heard.dropped,
    }


def _disk_seconds(folder: Path, size: int) -> float:
    """Until that many bytes are durable, without a model: the file, its name, two fsyncs."""
    spool, data, times = SpoolFolder(folder, 1 << 40), os.urandom(size), []
    for step in range(30):
        since = time.monotonic()
        path = spool.write("disk", step, data)
        times.append(time.monotonic() - since)
        spool.remove("disk", keep=path)
    return statistics.median(times)


@dataclass
class _Heard:
    """What the spool said, and when."""

    asked: dict[int, float] = field(default_factory=dict)
    durable_s: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    dropped: int = 0

    def clear(self) -> None:
        self.durable_s.clear()
        self.bytes.clear()
        self.dropped = 0


@dataclass
class _Rank:
    """An executor with its spool, as a worker holds them, and the scheduler's end of the spool's socket."""

    executor: Executor
    card: Card
    asked: dict[str, Any]
    channel: Channel[FromScheduler, ToScheduler]
    heard: _Heard
    changed: threading.Condition

    def run(self, steps: int, every: int = 0) -> list[float]:
        """Seconds of each step of one request, one step an item, what is in line at the end not counted."""
        asked = SamplingParams(prompt="a red circle moving right", seed=1, num_inference_steps=steps, **self.asked)
        request = Request("bench", self.card.check(asked))
        self.executor.run(Encode(0, (0,), (request,)))
        layout, seconds = Config().layout, []
        for step in range(1, steps + 1):
            since = time.monotonic()
            self.executor.run(Denoise(0, (0,), layout, (request.id,), 1))
            if every and step % every == 0:
                with self.changed:
                    self.heard.asked[step] = time.monotonic()
                self.executor.run(Checkpoint(0, (0,), (request.id,)))
            seconds.append(time.monotonic() - since)
        with self.changed:
            self.changed.wait_for(lambda: not self.heard.asked)
        self.executor.run(Release(0, (0,), (request.id,)))
        return seconds

    def listen(self, ended: threading.Event) -> None:
        while not ended.is_set():
            received = self.channel.receive(0.1)
            now = time.monotonic()
            with self.changed:
                match received.message if received is not None else None:
                    case Checkpointed(_, _, saved):
                        self.heard.durable_s.append(now - self.heard.asked.pop(saved.step))
                        self.heard.bytes.append(saved.bytes)
                    case CheckpointFailed() as failure:
                        self.heard.asked.pop(failure.step)
                        self.heard.dropped += 1
                self.changed.notify()


@contextmanager
def _rank(model: Path, asked: dict[str, Any], folder: Path) -> Iterator[_Rank]:
    configs, config = read_configs(model), Config(device="cpu")
    with tempfile.TemporaryDirectory(prefix="framemesh-") as sockets:
        channel: Channel[FromScheduler, ToScheduler] = Channel.bind(f"ipc://{sockets}/scheduler", ToScheduler)
        seat = Seat(channel.endpoint, incarnation("worker0"), 0, 1, 0, 0, "here", os.getpid())
        card, sender = card_for(configs), FrameSender(seat.identity)
        executor, _, precisions = build_executor(config, model, card, CPU, 0, 0, sender)
        executor.spool = Spool(seat, folder, 1 << 40, digest((configs, precisions, "cpu")))
        executor.spool.start()
        rank, ended = _Rank(executor, card, asked, channel, _Heard(), threading.Condition()), threading.Event()
        listener = threading.Thread(target=rank.listen, args=(ended,))
        listener.start()
        try:
            yield rank
        finally:
            executor.spool.close(timeout_s=10.0)
            ended.set()
            listener.join()
            sender.close()
            channel.close()


def _larger(folder: Path) -> Path:
    """The demo model with a larger denoiser. Its VAE does not fit any more: nothing is decoded here."""
    demo, model = resolve_model("demo"), folder / "larger"
    shutil.copytree(demo, model, ignore=shutil.ignore_patterns("transformer"))
    config = json.loads((demo / "transformer" / "config.json").read_text())
    WanTransformer3DModel.from_config({**config, **LARGER}).save_pretrained(model / "transformer")
    return model


if __name__ == "__main__":
    main()
