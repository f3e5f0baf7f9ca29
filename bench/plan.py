"""What one decision costs: `Scheduler.plan()` with 1,000 queued requests on 64 ranks, under a virtual clock.

Predicted: most plans see one free rank and look at the active requests and the first in each key's line, some 100 us;
the dearest follow a denoising item, when all 64 ranks are free for decodes. The garbage collector stays on.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from dataclasses import dataclass, field

import msgspec

from bench.report import machine, save, spread
from launch.weights import resolve_model
from runtime.cost import CostModel
from runtime.layout import Layout
from runtime.models.card import card_for, read_configs
from runtime.protocol import Completed, Decode, Release, Request
from runtime.sampling import ResolvedParams, SamplingParams
from runtime.scheduler import Scheduler

GATEWAY = b"gateway"
SHAPES = ((64, 64, 17), (128, 128, 33), (256, 256, 49), (480, 832, 81))
"""Height, width, frames."""


@dataclass
class Mesh:
    """Ranks that only take time, and a gateway that consumes at once; the line is kept as long as it was."""

    scheduler: Scheduler
    shapes: list[ResolvedParams]
    keys: int
    random_: random.Random
    now: float = 0.0
    submitted: int = 0
    reports: list[tuple[float, int, int, float]] = field(default_factory=list)
    """(when, rank, item, seconds)."""
    plan_ms: list[float] = field(default_factory=list)
    deciding_ms: list[float] = field(default_factory=list)
    """The plans that started something: most reports of a denoising item leave other ranks to wait for."""
    deciding_cpu_ms: list[float] = field(default_factory=list)
    """The same without what other processes of the machine took."""
    event_ms: list[float] = field(default_factory=list)
    items: int = 0

    def submit(self) -> None:
        params = msgspec.structs.replace(
            self.random_.choice(self.shapes), num_inference_steps=self.random_.choice((4, 20, 50))
        )
        key = f"key {self.random_.randrange(self.keys)}"
        request = Request(f"r{self.submitted}", params, key=key, priority=self.random_.choice((0, 0, 0, 1)))
        self.submitted += 1
        self.scheduler.submit(GATEWAY, (request,), self.now)

    def plan(self) -> None:
        """Timed, with what its items start."""
        started, cpu = time.perf_counter(), time.thread_time()
        items = self.scheduler.plan(self.now)
        cpu, spent = time.thread_time() - cpu, time.perf_counter() - started
        self.plan_ms.append(1000 * spent)
        if items:
            self.deciding_ms.append(1000 * spent)
            self.deciding_cpu_ms.append(1000 * cpu)
        for item in items:
            if not isinstance(item, Release):
                self.items += 1
                seconds = self.scheduler.running[item.seq].predicted_s * self.random_.uniform(0.9, 1.1)
                for rank in item.ranks:
                    heapq.heappush(self.reports, (self.now + seconds, rank, item.seq, seconds))

    def step(self) -> None:
        """One rank reports."""
        self.now, rank, seq, seconds = heapq.heappop(self.reports)
        item = self.scheduler.running[seq].item
        started = time.perf_counter()
        self.scheduler.completed(rank, seq, seconds, self.now)
        self.event_ms.append(1000 * (time.perf_counter() - started))
        if isinstance(item, Decode):
            self.scheduler.granted(GATEWAY, item.chunks)
            self.scheduler.stored(b"gateway", item.request_id, self.now)
        for _, news in self.scheduler.take_news():
            if isinstance(news, Completed):
                self.submit()
        self.plan()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--queued", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--plans", type=int, default=200_000)
    parser.add_argument("--budget-gib", type=float, default=64.0, help="memory of a rank for states; 0: not known")
    args = parser.parse_args()
    where = machine()
    card = card_for(read_configs(resolve_model("demo")))
    wanted = (SamplingParams(prompt="a cat", seed=1, height=h, width=w, num_frames=frames) for h, w, frames in SHAPES)
    scheduler = Scheduler(card, Layout(1, 1, args.ranks), CostModel(card))
    scheduler.gateway_joined(GATEWAY, "ipc://gateway", 1000)
    mesh = Mesh(scheduler, [card.check(params) for params in wanted], args.keys, random.Random(1))
    for _ in range(args.queued):
        mesh.submit()
    scheduler.group_ready(int(args.budget_gib * 2**30) or None)
    mesh.plan()
    while len(mesh.plan_ms) < args.plans:
        mesh.step()
    figures = {
        "wanted_ms": 1.0,
        "p99_ms": _p99(mesh.deciding_ms),
        "p99_cpu_ms": _p99(mesh.deciding_cpu_ms),
        "p99_ms_of_all_plans": _p99(mesh.plan_ms),
        "deciding_ms": spread(mesh.deciding_ms),
        "deciding_cpu_ms": spread(mesh.deciding_cpu_ms),
        "plan_ms": spread(mesh.plan_ms),
        "event_ms": spread(mesh.event_ms),
        "items": mesh.items,
        "queued": args.queued,
        "ranks": args.ranks,
        "keys": args.keys,
    }
    save("plan", where, figures)


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


if __name__ == "__main__":
    main()
