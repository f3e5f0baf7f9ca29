"""What a person sees of running meshes: the live view, the list of requests, the end of one. Knows no sockets."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.observe import ANSWER_S, MeshFile, Observer, Outcome, cancel_request, observe_meshes
from runtime.errors import NotReady
from runtime.protocol import JobStatus, RankStatus, Status, StepTime

REFRESH_S = 1.0
PIPE_WIDTH = 160
"""Columns of a table that goes into a file or another program."""
SILENT_S = 3.0
"""A rank that was not heard for so long is marked; ranks beat once a second."""
MIB, GIB = 1 << 20, 1 << 30


@dataclass
class _Watched:
    """A mesh, and what it said last."""

    observer: Observer
    status: Status
    heard: float
    """Monotonic seconds."""

    def view(self) -> RenderableType:
        return view(self.status, self.observer.about, self.observer.place, time.monotonic() - self.heard)


def top(place: str | None, *, once: bool) -> int:
    """Follow a mesh, or all there are, until q or Ctrl-C, or print one snapshot.

    Raises:
        FramemeshError: there is no mesh, or the last one has stopped.
    """
    console = _console()
    with observe_meshes(place) as meshes:
        watched = [_Watched(observer, status, time.monotonic()) for observer, status in meshes]
        if once or not console.is_terminal:
            console.print(_picture(watched))
            return 0
        with contextlib.suppress(KeyboardInterrupt):
            _follow(console, watched)
    return 0


def jobs(place: str | None, *, as_json: bool) -> int:
    """Print the active requests and the first of the queue."""
    with observe_meshes(place) as meshes:
        if as_json:
            listed = [
                msgspec.structs.asdict(job) | {"mesh": observer.place}
                for observer, status in meshes
                for job in status.jobs
            ]
            print(msgspec.json.format(msgspec.json.encode(listed)).decode())
        for observer, status in meshes if not as_json else ():
            if len(meshes) > 1:
                _console().print(Text(_clean(observer.place), "bold"))
            if status.jobs:
                _console().print(_job_table(status.jobs))
        more = sum(_left_out(status) for _, status in meshes)
        if more or not any(status.jobs for _, status in meshes):
            print(f"{more} more are queued" if more else "no requests", file=sys.stderr)
    return 0


def cancel(place: str | None, prefix: str) -> int:
    """End the request whose id begins so."""
    request_id, outcome = cancel_request(place, prefix, "cancelled by the operator")
    match outcome:
        case Outcome.CANCELLED:
            print(f"cancelled {request_id}")
        case Outcome.ENDED:
            print(f"{request_id} has ended")
        case Outcome.RUNNING:
            print(f"{request_id} ends when its work item does")
    return 0


def _follow(console: Console, watched: list[_Watched]) -> None:
    with _keyboard() as quit_pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_picture(watched), refresh=True)
            if quit_pressed(REFRESH_S):
                return
            for mesh in watched:
                mesh.observer.ask()
            until = time.monotonic() + ANSWER_S
            for mesh in tuple(watched):
                answer = mesh.observer.answer(max(until - time.monotonic(), 0))
                if answer is not None:
                    mesh.status, mesh.heard = answer, time.monotonic()
                elif mesh.observer.stopped and len(watched) > 1:
                    watched.remove(mesh)
                elif mesh.observer.stopped:
                    raise NotReady(f"the mesh at {mesh.observer.place} has stopped")


def _picture(watched: list[_Watched]) -> RenderableType:
    parts: list[RenderableType] = []
    for mesh in watched:
        parts += [Text(), mesh.view()] if parts else [mesh.view()]
    return Group(*parts)


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds and says whether q was pressed meanwhile, which nobody has to confirm."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()

    def quit_pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while select.select([keyboard], [], [], max(until - time.monotonic(), 0))[0]:
            pressed = os.read(keyboard, 64)
            # Nothing to read: the terminal was closed.
            if not pressed or b"q" in pressed.lower():
                return True
        return False

    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield quit_pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


# ---- the picture -------------------------------------------------------------------------------------------------


def view(status: Status, about: MeshFile | None, place: str, silent_s: float = 0.0) -> RenderableType:
    """One snapshot; `silent_s` is its age if the scheduler stopped answering."""
    middle = Table.grid(padding=(0, 6))
    middle.add_row(_step_table(status.step_times), _key_table(status))
    parts: list[RenderableType] = [_headline(status, about, silent_s), _facts(status, about, place), Text()]
    parts += [_rank_table(status.ranks), Text(), middle, Text()]
    if status.jobs:
        parts.append(_job_table(status.jobs))
    more = _left_out(status)
    if more or not status.jobs:
        parts.append(Text(f"{more} more are queued" if more else "no requests", "dim"))
    return Group(*parts)


def _headline(status: Status, about: MeshFile | None, silent_s: float) -> Text:
    name = status.model or (about.model if about is not None else "")
    said, style = ("ready", "bold green") if status.ready else (status.reason, "bold yellow")
    if status.draining:
        said, style = "draining", "bold yellow"
    if silent_s > 2 * REFRESH_S:
        said, style = f"the scheduler has not answered for {silent_s:.0f} s", "bold red"
    return Text.assemble(("framemesh ", "bold"), (_clean(name), "bold cyan"), "  ", (_clean(said), style))


def _facts(status: Status, about: MeshFile | None, place: str) -> Text:
    error = "none measured yet" if status.cost_error is None else f"{status.cost_error:.0%}"
    url = [about.url] if about is not None and about.url else []
    first = [*url, place, str(status.layout)]
    second = [
        f"policy {status.policy}",
        f"prediction error {error}",
        f"worker losses {status.losses}",
        f"messages dropped {status.dropped}, stale {status.stale}",
    ]
    return Text(f"{'  ·  '.join(map(_clean, first))}\n{'  ·  '.join(second)}", "dim")


def _rank_table(ranks: Iterable[RankStatus]) -> Table:
    table = _table("RANK", "PID>", "HOST~", "NOW~", "RUNS / PREDICTED>", "MEMORY>")
    for rank in ranks:
        late = rank.running_s > max(3 * rank.predicted_s, 1.0)
        runs = f"{rank.running_s:.2f} / {rank.predicted_s:.2f} s" if rank.request_ids else ""
        doing, style = rank.doing, "green" if rank.request_ids else "dim"
        if rank.silent_s > SILENT_S:
            doing, style = f"{doing}, silent for {rank.silent_s:.0f} s", "red"
        table.add_row(
            Text(str(rank.rank)),
            Text(str(rank.pid or "-")),
            _name(rank.host),
            _name(doing, style),
            Text(runs, "red" if late else ""),
            Text(_memory(rank.held_bytes, rank.budget_bytes)),
        )
    return table


def _step_table(times: Iterable[StepTime]) -> Table:
    units = {"encode": "prompt", "denoise": "step", "first_decode": "chunk", "decode": "chunk"}
    table = _table("LATEST", "BATCH>", "TIME>", "PREDICTED>", "OFF BY>")
    for time_ in times:
        off = time_.predicted_s / time_.seconds - 1 if time_.seconds > 0 else 0.0
        table.add_row(
            Text(f"{time_.kind.replace('_', ' ')} {units.get(time_.kind, '')}"),
            Text(str(time_.batch)),
            Text(_milliseconds(time_.seconds)),
            Text(_milliseconds(time_.predicted_s)),
            Text(f"{off:+.0%}", "yellow" if abs(off) > 0.25 else ""),
        )
    return table


def _key_table(status: Status) -> Table:
    running = Counter(job.key for job in status.jobs if job.stage != "queued")
    table = _table("KEY~", "RUNNING>", "QUEUED>")
    for key in sorted(running.keys() | status.queued.keys()):
        table.add_row(_name(key or "-"), Text(str(running[key])), Text(str(status.queued.get(key, 0))))
    return table


def _job_table(listed: Iterable[JobStatus]) -> Table:
    table = _table("ID~", "KEY~", "STAGE", "DONE>", "ETA>", "WAITED>", "PRIO>")
    for job in listed:
        stage, style = ("cancelling", "yellow") if job.cancelling else (job.stage, "dim" if _waits(job) else "green")
        table.add_row(
            _name(job.id),
            _name(job.key or "-"),
            Text(stage, style),
            Text("" if _waits(job) else f"{job.step}/{job.total}"),
            Text(_duration(job.eta_s)),
            Text(_duration(job.waited_s)),
            Text(str(job.priority)),
        )
    return table


def _table(*columns: str) -> Table:
    """Columns by their headings: those that end in > are numbers, those that end in ~ give way on a narrow terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in columns:
        justify: JustifyMethod = "right" if heading.endswith(">") else "left"
        table.add_column(heading.rstrip(">~"), justify=justify, no_wrap=not heading.endswith("~"))
    return table


def _name(text: str, style: str = "") -> Text:
    """A cell that is cut rather than wrapped, without anything that a terminal would obey: clients choose the ids."""
    return Text(_clean(text), style, no_wrap=True, overflow="ellipsis")


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _waits(job: JobStatus) -> bool:
    return job.stage == "queued"


def _left_out(status: Status) -> int:
    """Queued requests that the snapshot does not name."""
    return sum(status.queued.values()) - sum(map(_waits, status.jobs))


def _clean(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _memory(held: int, budget: int) -> str:
    return f"{_bytes(held)} / {_bytes(budget)} {held / budget:4.0%}" if budget else _bytes(held)


def _bytes(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
