"""A server under Poisson load with a random kill every half minute: nothing lost, nothing twice, nothing that grows.

The load is a share of the measured capacity: what the same mix, clients and kills leave when there is always work in
line. Memory is judged within lives: a process that was started anew starts small.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil

from bench.chaos import Bench, Case, served
from bench.clients import Clients, Spec
from bench.report import machine, save, spread
from bench.server import ROLES, Server

VICTIMS = ("worker0", "worker1", "scheduler", "gateway", "torchrun")
MIX = (
    *(Spec(prompt=f"a red circle moving {way}", steps=20, frames=5, seed=1) for way in ("left", "right", "up")),
    *(Spec(prompt=f"a blue square, {state}", steps=12, frames=1, seed=2, key="b") for state in ("still", "growing")),
    Spec(prompt="a green triangle", steps=40, frames=17, seed=3),
    Spec(prompt="a yellow star", steps=30, frames=33, seed=4, key="c", guidance=1.0),
)
SAMPLE_S = 5.0
WARM_S = 30.0
"""Of a life, before its memory counts."""
ALWAYS_WAITING = 24
"""Jobs under way while the capacity is measured."""
DRAIN_S = 900.0
"""What is left at the end may take so long."""
PICTURE = Path(__file__).parent.parent / "docs" / "soak.png"
MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    at: float
    role: str
    pid: int
    age_s: float
    rss_mib: float
    files: int
    sockets: int


@dataclass
class Watch:
    """Looks at every process and at the spool until it is told to stop."""

    server: Server
    began: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)
    spool_files: list[tuple[float, int]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE_S):
            now = time.monotonic() - self.began
            for role, pid in self.server.pids().items():
                with suppress(psutil.Error, OSError):
                    self.samples.append(look(now, role, psutil.Process(pid)))
            self.spool_files.append((now, len(list(self.server.spool.glob("*")))))


FOR_THE_RECORD_MIN = 15
"""A shorter run shows no slope of anything's memory."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds on the mean, half to one and a half")
    parser.add_argument("--calibrate-minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    where, random_ = machine(), random.Random(args.seed)
    with served(MIX) as bench:
        killer = Killer(bench.server, args.kill_every, random_)
        capacity = _capacity(bench, args.calibrate_minutes * 60, killer, random_)
        killer.kills.clear()
        watch = Watch(bench.server)
        watcher = threading.Thread(target=watch.run)
        watcher.start()
        try:
            case, jobs = _soak(bench, args.minutes * 60, args.load * capacity, killer, random_)
        finally:
            watch.stopped.set()
            watcher.join()
        bench.finish()
    broken = case.broken + bench.broken
    figures: dict[str, Any] = {
        "minutes": args.minutes,
        "capacity_per_s": capacity,
        "load": args.load,
        "jobs": jobs,
        "completed": case.completed,
        "failed": case.failed,
        "kills": {role: killer.kills.count(role) for role in VICTIMS},
        "reposts": case.reposts,
        "largest_difference_of_outputs_in_255": case.largest_difference,
        "broken": broken,
        "processes": {role: _summary([s for s in watch.samples if s.role == role]) for role in ROLES},
        "spool_files": spread([count for _, count in watch.spool_files]),
    }
    if args.minutes >= FOR_THE_RECORD_MIN:
        save("soak", where, figures)
        with suppress(ImportError):
            plot(watch, PICTURE)
    else:
        print(figures)
    sys.exit(1 if broken else 0)


class Killer:
    """Kills one process every so often, from half to one and a half of that time."""

    def __init__(self, server: Server, every_s: float, random_: random.Random) -> None:
        self._server, self._every_s, self._random = server, every_s, random_
        self.next_at = time.monotonic() + every_s / 2
        self.kills: list[str] = []

    def kill_if_due(self) -> None:
        """Nobody, if the victim is not there because it is being started."""
        if time.monotonic() < self.next_at:
            return
        self.next_at = time.monotonic() + self._every_s * self._random.uniform(0.5, 1.5)
        role = self._random.choice(VICTIMS)
        pid = self._server.pids().get(role)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.kills.append(role)


def _capacity(bench: Bench, seconds: float, killer: Killer, random_: random.Random) -> float:
    """Jobs per second that end while there is always one waiting."""
    clients = Clients(bench.server.url, seconds + DRAIN_S)
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        waiting = len(clients.jobs) - clients.ended
        clients.start(*(_pick(random_) for _ in range(ALWAYS_WAITING - waiting)))
        killer.kill_if_due()
        time.sleep(0.2)
    rate = clients.ended / (time.monotonic() - began)
    clients.join()
    case = Case("none", "capacity")
    bench.judge(case, bench.take(clients, case))
    return rate


def _soak(bench: Bench, seconds: float, rate: float, killer: Killer, random_: random.Random) -> tuple[Case, int]:
    """(verdict, how many jobs there were)."""
    clients, case = Clients(bench.server.url, seconds + DRAIN_S), Case("soak", "any")
    began = time.monotonic()
    next_job = began
    while time.monotonic() < began + seconds:
        if time.monotonic() >= next_job:
            clients.start(_pick(random_))
            next_job += random_.expovariate(rate)
        killer.kill_if_due()
        time.sleep(max(min(next_job, killer.next_at, began + seconds) - time.monotonic(), 0.0))
    clients.join()
    jobs = bench.take(clients, case)
    bench.judge(case, jobs)
    bench.judge_processes(case)
    return case, len(jobs)


def _pick(random_: random.Random) -> Spec:
    """One of the mix, followed or polled."""
    return replace(random_.choice(MIX), follow=random_.random() < 0.5)


def look(at: float, role: str, process: psutil.Process) -> Sample:
    """Raises psutil.Error or OSError if it is gone."""
    links = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()]
    sockets = sum(link.startswith("socket:") for link in links)
    age_s = time.time() - process.create_time()
    return Sample(at, role, process.pid, age_s, process.memory_info().rss / MIB, len(links), sockets)


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """One role over all its lives."""
    if not samples:
        return {}
    figures: dict[str, Any] = {
        "lives": len({s.pid for s in samples}),
        "rss_mib": spread([s.rss_mib for s in samples]),
        "files": spread([s.files for s in samples]),
        "sockets": spread([s.sockets for s in samples]),
    }
    slope = slope_within_lives(samples)
    if slope is not None:
        figures["rss_mib_per_hour"], figures["rss_mib_per_hour_95"] = slope
    return figures


def slope_within_lives(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """(MiB per hour, half of its 95 % interval) by least squares over all lives with a level of their own each."""
    lives: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.age_s > WARM_S:
            lives[sample.pid].append(sample)
    enough = [life for life in lives.values() if len(life) >= 3]
    if not enough:
        return None
    hours = np.concatenate([_centred([s.at / 3600 for s in life]) for life in enough])
    memory = np.concatenate([_centred([s.rss_mib for s in life]) for life in enough])
    spread_of_time = float(hours @ hours)
    slope = float(hours @ memory) / spread_of_time
    free = max(len(hours) - len(enough) - 1, 1)
    error = float(np.sqrt(np.sum((memory - slope * hours) ** 2) / free / spread_of_time))
    return slope, 1.96 * error


def _centred(values: Sequence[float]) -> Any:
    return np.array(values) - np.mean(values)


def plot(watch: Watch, path: Path) -> None:
    """Memory and open files of every role over time, and the files in the spool."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, files, spool) = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for role, colour in zip(ROLES, itertools.cycle("C" + str(n) for n in range(10)), strict=False):
        mine = [s for s in watch.samples if s.role == role]
        minutes = [s.at / 60 for s in mine]
        memory.plot(minutes, [s.rss_mib for s in mine], ".", markersize=2, color=colour, label=role)
        files.plot(minutes, [s.files for s in mine], ".", markersize=2, color=colour)
    spool.plot([at / 60 for at, _ in watch.spool_files], [count for _, count in watch.spool_files], linewidth=1)
    for axes, title in ((memory, "resident memory, MiB"), (files, "open files"), (spool, "files in the spool")):
        axes.set_title(title)
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
    memory.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
