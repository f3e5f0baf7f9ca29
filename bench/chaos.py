"""Kill or suspend every process of a server in every phase, under load, and see that nothing is lost and nothing twice.

Each case: several jobs over HTTP, an event of one of them as the trigger, one signal, wait until all jobs have ended,
look. Held against one undisturbed run of the same jobs: every accepted job ends completed or failed with a reason; one
row, one ending, one file for each; the same frames, but for what another company in a batch may change; denoising steps
are done again only behind a checkpoint; no orphan, no file in the spool, nothing in the temporary folder.

Predicted: a killed rank costs the import of torch, loading and warm-up (8 s on two quiet cores); a suspended one 6 s of
silence more; a scheduler or a gateway the start of a light process (1 to 2 s), and 6 s more if it was suspended; a
launcher all of these in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
from numpy.typing import NDArray

from bench.clients import Clients, Happening, Job, Spec
from bench.report import machine, save
from bench.server import ROLES, Server, Stuck, until
from gateway.media.mp4 import read_frames
from runtime.checkpoints import find_saved
from runtime.trace import TraceLine, read_trace

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
FAULTS = tuple(f"{name} {role}" for name in SIGNALS for role in ROLES)
PHASES = ("encode", "denoise", "decode")
CHECKPOINT_STEPS = 5
RANKS = 2
FLAGS = (
    *("--checkpoint-every-steps", str(CHECKPOINT_STEPS), "--crash-limit", "1000"),
    # What arrives together is encoded together: a phase long enough to be met.
    *("--batching-delay-ms", "20"),
)
SPECS = (
    Spec(prompt="a red circle moving right", steps=60, seed=1),
    Spec(prompt="a green square moving left", steps=60, seed=2),
    Spec(prompt="a blue triangle moving up", steps=90, seed=3, guidance=1.0, key="b"),
    Spec(prompt="a yellow star growing", steps=50, frames=81, seed=4),
    Spec(prompt="a large white circle", steps=12, frames=1, seed=5, key="b", follow=False),
    Spec(prompt="a purple square moving down", steps=36, frames=33, size="96x96", seed=6, key="c", follow=False),
)
TRIGGER_S = 120.0
REPLACED_S = 60.0
"""How long a suspended process may go unnoticed."""
CASE_S = 300.0
"""A case that takes longer has lost something."""
LEFT_S = 60.0
"""How long the last files may take to go: a request whose gateway died is given up after half a minute."""
WORST_MEAN, WORST_PIXEL = 1 / 255, 16 / 255
"""How far H.264 may take frames apart that were within 1/255 before it: on the mean, and anywhere."""

Frames = NDArray[np.uint8]


@dataclass
class Case:
    """One fault in one phase: what came of it."""

    fault: str
    phase: str
    landed: str = ""
    """What the ranks had done for the triggering job when the signal was sent."""
    completed: int = 0
    failed: list[str] = field(default_factory=list)
    reposts: int = 0
    """POSTs that were sent again, with their key, because nobody answered."""
    ranks_silent_s: float | None = None
    """The longest time after the signal in which no rank finished an item: how long it took to recover."""
    clients_silent_s: float | None = None
    """The same for what the clients were told."""
    losses: int = 0
    """Worker groups and schedulers that were lost."""
    steps_again: int = 0
    """Denoising steps that were done a second time."""
    largest_difference: int = 0
    """Of a pixel after H.264, in 1/255."""
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS, metavar="FAULT", help=str(FAULTS))
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    where = machine()
    cases = [(fault, phase) for _ in range(args.rounds) for fault in args.faults for phase in args.phases]
    random.Random(args.seed).shuffle(cases)
    with served() as bench:
        for fault, phase in cases:
            print(row(bench.strike(fault, phase)), file=sys.stderr, flush=True)
        bench.finish()
    bench.cases.sort(key=lambda case: (FAULTS.index(case.fault), PHASES.index(case.phase)))
    print("\n".join([*HEAD, *map(row, bench.cases)]))
    broken = [f"{case.fault} in {case.phase}: {what}" for case in bench.cases for what in case.broken] + bench.broken
    if not sys.argv[1:]:
        save("chaos", where, {"cases": [asdict(case) for case in bench.cases], "broken": broken})
    print("\n".join(broken) or f"{len(bench.cases)} cases, nothing lost, nothing twice", file=sys.stderr)
    sys.exit(1 if broken else 0)


HEAD = (
    "| fault | phase | landed | completed | failed | ranks silent s | clients silent s | losses | steps again "
    "| pixels apart | s | broken |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def row(case: Case) -> str:
    """A line of the table."""
    times = [f"{s:.1f}" if s is not None else "-" for s in (case.ranks_silent_s, case.clients_silent_s)]
    cells: list[Any] = [case.fault, case.phase, case.landed, case.completed, "; ".join(case.failed) or 0, *times]
    cells += [case.losses, case.steps_again, case.largest_difference, f"{case.seconds:.0f}"]
    return f"| {' | '.join(map(str, [*cells, '; '.join(case.broken) or '-']))} |"


@contextlib.contextmanager
def served(specs: Sequence[Spec] = SPECS, environment: Mapping[str, str] | None = None) -> Iterator[Bench]:
    """A server with its undisturbed run behind it; every process of it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="fmchaos") as folder:
        server = Server(Path(folder), *FLAGS, environment=environment)
        try:
            bench = Bench(server.start(), specs)
            bench.run_undisturbed()
            yield bench
        finally:
            server.kill()


class Bench:
    """One server, the jobs that every case gives it, and what they have to come to."""

    def __init__(self, server: Server, specs: Sequence[Spec]) -> None:
        self.server = server
        self.cases: list[Case] = []
        self.broken: list[str] = []
        """What belongs to no case."""
        self._specs = specs
        self._expected: dict[Spec, Frames] = {}
        """However its client follows it."""
        self._keys: list[str] = []
        self._owners: dict[str, str] = {}
        """Job -> the case that it was of."""
        self._store = server.outputs / "jobs.sqlite3"
        with _transaction(self._store) as store:
            store.executescript(COUNT_ENDINGS)

    def run_undisturbed(self) -> None:
        """Remember the frames of every job.

        Raises:
            Stuck: one did not complete.
        """
        clients = Clients(self.server.url, CASE_S).start(*self._specs)
        case = Case("none", "none")
        clients.join()
        for job in self.take(clients, case):
            if not job.content:
                raise Stuck(f"the undisturbed run: {job.problem or job.video}")
            self._expected[replace(job.spec, follow=True)] = frames_of(job.content)

    def strike(self, fault: str, phase: str) -> Case:
        """One case from its jobs to its verdict."""
        case = Case(fault, phase)
        self.cases.append(case)
        began, pids, log = time.monotonic(), self.server.wait_whole(), self.server.log
        clients = Clients(self.server.url, CASE_S).start(*self._specs)
        name, role = fault.split()
        try:
            trigger = clients.wait_for(*TRIGGERS[phase], TRIGGER_S)
            os.kill(pids[role], SIGNALS[name])
            struck = time.monotonic()
            if fault == "kill launcher":
                self._start_again(case)
            clients.join()
            ended = time.monotonic()
            if role != "launcher":
                # The work may be done before it is missed.
                until(lambda: not psutil.pid_exists(pids[role]), REPLACED_S, f"the {role} is replaced")
        except (Stuck, ProcessLookupError) as error:
            case.broken.append(str(error))
            return case
        finally:
            if fault == "stop launcher":
                os.kill(pids[role], signal.SIGCONT)
        case.losses = count_losses(self.server.log) - count_losses(log)
        jobs = self.take(clients, case)
        self.judge(case, jobs)
        self._judge_work(case, jobs, trigger, struck, ended, clients.happenings)
        self.judge_processes(case)
        case.seconds = time.monotonic() - began
        return case

    def finish(self) -> None:
        """Drain; nothing may be left anywhere."""
        server = self.server
        left: dict[str, Any] = {}

        def empty() -> bool:
            left.clear()
            left.update(find_saved(server.spool))
            return not left

        with contextlib.suppress(Stuck):
            until(empty, LEFT_S, "an empty spool")
        self.broken += [f"a checkpoint is left of a job of {self._owners.get(name, '?')}" for name in left]
        self.broken += self._doubles()
        code = server.stop()
        if code != 0:
            self.broken.append(f"the server ended with {code}: {server.log[-500:]}")
        with contextlib.suppress(Stuck):
            until(lambda: not server.marked(), 10.0, "no process is left")
        self.broken += [f"a process is left: {name}" for name in server.orphans()]
        self.broken += [f"left in the temporary folder: {name}" for name in server.left_in_temporary()]
        self.broken += [f"left in the spool: {path.name}" for path in server.spool.glob("*") if not left]

    def _start_again(self, case: Case) -> None:
        """What the operator's service manager does when the launcher died."""
        before = {process.pid for process in self.server.marked()}
        self.server.process.communicate()
        with contextlib.suppress(Stuck):
            until(lambda: not self.server.marked(), 10.0, "the launcher's children are gone")
        case.broken += [f"an orphan of a killed launcher: {p.pid}" for p in self.server.marked() if p.pid in before]
        self.server.start()

    def take(self, clients: Clients, case: Case) -> list[Job]:
        self._keys += [job.idempotency_key for job in clients.jobs]
        self._owners |= {job.id: f"{case.fault} in {case.phase}" for job in clients.jobs}
        return clients.jobs

    def judge(self, case: Case, jobs: Sequence[Job]) -> None:
        """Every job ended, once, with its frames or with a reason."""
        case.reposts = sum(job.posts - 1 for job in jobs if job.posts)
        for job in jobs:
            name, video = job.spec.prompt, job.video
            if job.problem:
                case.broken.append(f"{name}: {job.problem}")
            elif video is None:
                case.broken.append(f"{name}: lost")
            elif video["status"] == "completed":
                case.completed += 1
                self._compare(case, job)
            elif video["status"] == "failed" and video["error"]["code"] and video["error"]["message"]:
                case.failed.append(f"{video['error']['code']}: {video['error']['message']}")
            else:
                case.broken.append(f"{name} ended {video['status']}: {video['error']}")

    def _compare(self, case: Case, job: Job) -> None:
        expected, frames = self._expected[replace(job.spec, follow=True)], frames_of(job.content)
        if frames.shape != expected.shape:
            case.broken.append(f"{job.spec.prompt}: {frames.shape} where {expected.shape} was expected")
            return
        apart = np.abs(frames.astype(np.int16) - expected)
        case.largest_difference = max(case.largest_difference, int(apart.max()))
        if apart.mean() > 255 * WORST_MEAN or apart.max() > 255 * WORST_PIXEL:
            case.broken.append(
                f"{job.spec.prompt}: other frames, {apart.mean():.2f} on the mean, at most {apart.max()}"
            )

    def _judge_work(
        self,
        case: Case,
        jobs: Sequence[Job],
        trigger: Happening,
        struck: float,
        ended: float,
        happenings: Sequence[Happening],
    ) -> None:
        """When the work went on, and that none was done twice without need."""
        lines = read_trace(self.server.trace)
        done = [line for line in lines if trigger.job.id in line.requests and line.finished < struck]
        case.landed = f"after {done[-1].kind.lower()}" if done else "before its encode was done"
        case.ranks_silent_s = longest_pause([line.finished for line in lines], struck, ended)
        case.clients_silent_s = longest_pause([h.at for h in happenings], struck, ended)
        for job in jobs:
            again, wrong = steps_again(lines, job.id, job.spec.steps, case.losses)
            case.steps_again += again
            if wrong and job.video is not None and job.video["status"] == "completed":
                case.broken.append(f"{job.spec.prompt}: {wrong}")

    def judge_processes(self, case: Case) -> None:
        try:
            self.server.wait_whole()
        except Stuck as error:
            case.broken.append(f"{error}: there are {self.server.pids()}")
        case.broken += [f"an orphan: {name}" for name in self.server.orphans()]

    def _doubles(self) -> list[str]:
        """Keys that made several jobs, jobs that ended several times, files that nobody asked for."""
        with _transaction(self._store) as store:
            keys = dict(store.execute("SELECT idempotency_key, count(*) FROM jobs GROUP BY 1").fetchall())
            endings = dict(store.execute("SELECT id, count(*) FROM endings GROUP BY 1").fetchall())
            files = {name for (name,) in store.execute("SELECT output_file FROM jobs WHERE status = 'completed'")}
        wrong = [f"{count} jobs of one key" for count in keys.values() if count != 1]
        wrong += [f"{name} of {self._owners.get(name)} ended {n} times" for name, n in endings.items() if n != 1]
        wrong += [f"{len(keys)} jobs in the store, {len(self._keys)} accepted"] if len(keys) != len(self._keys) else []
        on_disk = {path.name for path in (self.server.outputs / "videos").iterdir()}
        return wrong + [f"a file too many or too few: {name}" for name in sorted(on_disk ^ files)]


TRIGGERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "encode": ("stage", lambda data: data["stage"] == "encode"),
    "denoise": ("step", lambda data: data["step"] >= 3),
    "decode": ("frames", lambda data: data["total"] > data["count"]),
}

COUNT_ENDINGS = """
CREATE TABLE endings (id TEXT, status TEXT);
CREATE TRIGGER count_endings AFTER UPDATE OF status ON jobs WHEN NEW.status NOT IN ('queued', 'in_progress')
BEGIN INSERT INTO endings VALUES (NEW.id, NEW.status); END;
"""


@contextlib.contextmanager
def _transaction(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as store, store:
        yield store


def frames_of(content: bytes) -> Frames:
    """(n, height, width, 3) of an MP4."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(content)
        file.flush()
        return read_frames(Path(file.name))


def count_losses(log: str) -> int:
    """Worker groups that were lost and schedulers that were started, as the server's log has them."""
    return log.count("worker group lost") + log.count("listening")


def longest_pause(times: Sequence[float], begin: float, end: float) -> float | None:
    """Seconds between two of these times, or the begin and the first; None if there are none."""
    within = [begin, *sorted(at for at in times if begin < at < end)]
    return max((after - before for before, after in itertools.pairwise(within)), default=None)


def steps_again(lines: Sequence[TraceLine], job_id: str, total: int, losses: int) -> tuple[int, str]:
    """Denoising steps of a job that were done more than once, and what no loss explains."""
    items: dict[tuple[int, int], list[TraceLine]] = {}
    for line in lines:
        if line.kind == "Denoise" and job_id in line.requests:
            items.setdefault((line.epoch, line.seq), []).append(line)
    at, again, returns = 0, 0, 0
    # What not every rank had finished did not count.
    whole = (ranks[0] for ranks in items.values() if len(ranks) == RANKS)
    for item in sorted(whole, key=lambda line: line.started):
        first = item.requests[job_id]
        if first > at:
            return again, f"step {first} came after step {at}"
        if first < at:
            again, returns = again + at - first, returns + 1
        at = first + item.units
    if at != total:
        return again, f"{at} steps were done, of {total}"
    return again, f"it began again {returns} times for {losses} losses" if returns > losses else ""


if __name__ == "__main__":
    main()
