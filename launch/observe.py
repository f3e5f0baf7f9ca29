"""Which meshes run on this host, and a connection that looks at one. Starts and stops nothing.

A launcher holds a lock on the folder of its sockets as long as it lives, and says in `mesh.json` what it runs. The
kernel gives the lock back even after `kill -9`: a folder with a mesh.json that nobody locks is a dead mesh's.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from runtime.config import Config, load_frozen
from runtime.errors import FramemeshError, InvalidInput, NotReady, PeerGone
from runtime.protocol import (
    Cancel,
    Cancelled,
    Drain,
    FromObserver,
    FromScheduler,
    JobStatus,
    Observe,
    Status,
    ToObserver,
    Welcome,
)
from runtime.wire import Channel, incarnation

FOLDER_PREFIX = "framemesh-"
MESH_FILE = "mesh.json"
CONFIG_FILE = "config.json"
MESH, GATEWAY, TUNE = "mesh", "gateway", "tune"
"""What a run folder may be of."""
ANSWER_S = 1.0
"""A scheduler that takes longer does not count as alive."""
GONE_S = 5.0
"""A draining scheduler that has not answered for so long has left."""
ASK_EVERY_S = 0.5
"""While a drain goes on."""
CANCEL_S = 3.0
"""How long a cancelled request is watched; it ends with its item, which is shorter almost always."""


class MeshFile(msgspec.Struct, frozen=True):
    """What a launcher tells about its mesh."""

    pid: int
    model: str
    started: float
    """Seconds since the epoch."""
    url: str = ""
    """Of the HTTP server, once it listens."""
    scheduler: str = ""
    """Endpoint of the scheduler; empty: the socket in the folder."""
    role: str = MESH


class RunFolder:
    """A folder of the launcher's own: private, locked, described."""

    def __init__(self, model: str, *, scheduler: str = "", role: str = MESH) -> None:
        # mkdtemp makes it 0700: nobody else on the host can reach the sockets in it.
        self.path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._about = MeshFile(os.getpid(), model, time.time(), scheduler=scheduler, role=role)
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def tell_url(self, url: str) -> None:
        self._about = msgspec.structs.replace(self._about, url=url)
        self._write()

    def remove(self) -> None:
        """Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _write(self) -> None:
        new = self.path / f"{MESH_FILE}.new"
        new.write_bytes(msgspec.json.encode(self._about))
        new.replace(self.path / MESH_FILE)


def run_folders() -> tuple[list[Path], list[Path]]:
    """This user's run folders: (of launchers that live, of dead ones)."""
    folders = _described_folders()
    dead = [folder for folder in folders if _is_dead(folder)]
    return [folder for folder in folders if folder not in dead], dead


def is_abandoned(folder: Path) -> bool:
    """Whether no launcher holds this run folder any more; it may be gone itself."""
    return not folder.exists() or _is_dead(folder)


def sweep_dead_folders() -> None:
    """Remove what launchers of this user left behind when they were killed."""
    for folder in _described_folders():
        with _lock_of_dead(folder) as dead:
            if dead:
                shutil.rmtree(folder, ignore_errors=True)


class Outcome(enum.IntEnum):
    """What became of a request that was to be cancelled; where several meshes had it, the largest counts."""

    CANCELLED = 0
    ENDED = 1
    """Nobody says how: it may have been complete before the word arrived."""
    RUNNING = 2
    """It ends with its item."""


class Observer:
    """A connection to one mesh's scheduler. Asks one question at a time."""

    def __init__(self, endpoint: str, folder: Path | None = None) -> None:
        self.folder = folder
        self._channel: Channel[FromObserver, FromScheduler] = Channel.connect(
            endpoint, ToObserver, incarnation("observer")
        )
        self.place = str(folder) if folder is not None else endpoint
        self._cancelled: set[str] = set()
        """What the scheduler said it cancelled."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    @property
    def about(self) -> MeshFile | None:
        """What the launcher says now; None for a scheduler without one."""
        return read_mesh_file(self.folder) if self.folder is not None else None

    @property
    def stopped(self) -> bool:
        """Whether the mesh's launcher has removed its folder, or was killed."""
        folder = self.folder
        return folder is not None and (not folder.exists() or (self.about is not None and _is_dead(folder)))

    def ask(self, prefix: str = "") -> None:
        self._channel.send(Observe(prefix))

    def answer(self, timeout_s: float = ANSWER_S) -> Status | None:
        """The newest Status that has arrived or arrives in time."""
        until = time.monotonic() + timeout_s
        status: Status | None = None
        while received := self._channel.receive(0 if status is not None else max(until - time.monotonic(), 0)):
            match received.message:
                case Welcome(epoch=epoch):
                    self._channel.set_epoch(epoch)
                case Status():
                    status = received.message
                case Cancelled(request_id=request_id):
                    self._cancelled.add(request_id)
        return status

    def look(self, prefix: str = "") -> Status:
        """How the mesh stands, with the requests whose ids begin with `prefix`.

        Raises:
            NotReady: the scheduler did not answer within a second.
        """
        self.ask(prefix)
        status = self.answer()
        if status is None:
            raise NotReady(f"the mesh at {self.place} does not answer")
        return status

    def cancel(self, prefix: str, reason: str) -> tuple[str, Outcome]:
        """(id of the request, what is known of it after a while).

        Raises:
            InvalidInput: several requests begin so.
            FramemeshError: no request begins so, or nobody answers.
        """
        job = self._job(prefix)
        self._channel.send(Cancel(job.id, reason))
        until, certain = time.monotonic() + CANCEL_S, False
        # A request of which this id is only the beginning is another one.
        while left := [listed for listed in self.look(job.id).jobs if listed.id == job.id]:
            # In the decode its frames may be stored, and so it may be complete, before its item ends.
            certain = left[0].cancelling and left[0].stage in {"encode", "denoise"}
            if time.monotonic() > until:
                return job.id, Outcome.RUNNING
            time.sleep(0.05)
        return job.id, Outcome.CANCELLED if certain or job.id in self._cancelled else Outcome.ENDED

    def drain(self, timeout_s: float) -> Iterator[Status]:
        """Have the mesh end when its work has, at most `timeout_s` from now; how it stands until it is gone.

        A launcher that looks after the scheduler has to end too, a scheduler without one only itself.
        """
        until, answered, draining = time.monotonic() + timeout_s, time.monotonic(), False
        while not self.stopped:
            # Said again until it is heard: a scheduler that was started anew knows nothing of it.
            if not draining:
                self._channel.send(Drain(max(until - time.monotonic(), 0.0)))
            with contextlib.suppress(PeerGone):
                self.ask()
            status = self.answer(ASK_EVERY_S)
            if status is not None:
                answered, draining = time.monotonic(), status.draining
                yield status
                time.sleep(ASK_EVERY_S)
            elif self.folder is None and time.monotonic() - answered > GONE_S:
                return

    def _job(self, prefix: str) -> JobStatus:
        found = self.look(prefix).jobs if prefix else ()
        if not found:
            raise FramemeshError(f"no request of the mesh at {self.place} has an id that begins with {prefix!r}")
        if len(found) > 1:
            raise _ambiguous(prefix, [job.id for job in found])
        return found[0]


@contextlib.contextmanager
def observe_meshes(place: str | None) -> Iterator[list[tuple[Observer, Status]]]:
    """The mesh at a place (its folder, or its scheduler's endpoint), or all of this user on this host, and how they
    stand; at least one.

    Raises:
        InvalidInput: there is no such folder.
        FramemeshError: no mesh runs, or the one that was named does not answer.
    """
    with contextlib.ExitStack() as stack:
        if place is not None:
            observer = stack.enter_context(_observer_at(place))
            yield [(observer, observer.look())]
            return
        folders = [folder for folder in _described_folders() if not _is_dead(folder) and _is_mesh(folder)]
        observers = [stack.enter_context(_observer_of(folder)) for folder in folders]
        for observer in observers:
            observer.ask()
        until = time.monotonic() + ANSWER_S
        answers = [(observer, observer.answer(max(until - time.monotonic(), 0))) for observer in observers]
        alive = [(observer, status) for observer, status in answers if status is not None]
        if not alive:
            silent = f"; {len(folders)} in {tempfile.gettempdir()} did not answer" if folders else ""
            raise FramemeshError(f"no mesh is running{silent}")
        yield alive


@contextlib.contextmanager
def observe_mesh(place: str | None) -> Iterator[tuple[Observer, Status]]:
    """The same for one mesh.

    Raises:
        InvalidInput: also if several meshes run and none was named.
    """
    with observe_meshes(place) as meshes:
        if len(meshes) > 1:
            raise _name_one([observer for observer, _ in meshes])
        yield meshes[0]


def cancel_request(place: str | None, prefix: str, reason: str) -> tuple[str, Outcome]:
    """As `Observer.cancel`, in whichever mesh has the request.

    Raises:
        InvalidInput: several requests begin so.
        FramemeshError: none does, or nobody answers.
    """
    with observe_meshes(place) as meshes:
        observers = [observer for observer, _ in meshes]
        found = {observer: [job.id for job in observer.look(prefix).jobs] for observer in observers if prefix}
        ids = sorted({request_id for listed in found.values() for request_id in listed})
        if len(ids) > 1:
            raise _ambiguous(prefix, ids)
        if not ids:
            places = ", ".join(observer.place for observer in observers)
            raise FramemeshError(f"no request of the mesh at {places} has an id that begins with {prefix!r}")
        # One that moves from a mesh to another is in both for a moment.
        ended = [observer.cancel(ids[0], reason) for observer, listed in found.items() if listed]
        return ended[0][0], max(outcome for _, outcome in ended)


def drain_mesh(place: str | None, timeout_s: float | None, say: Callable[[str], None]) -> None:
    """Let a mesh, or all of one launcher, finish what it has, take no more, and stop; returns when it is gone.

    `timeout_s` is what running work gets to end before it is checkpointed, by default what the mesh was started with.

    Raises:
        InvalidInput: a negative time, no such mesh, or meshes of several launchers and none was named.
        FramemeshError: no mesh runs, or the one that was named does not answer.
    """
    if timeout_s is not None and timeout_s < 0:
        raise InvalidInput("--timeout", f"{timeout_s:g} is negative; take 0 or more seconds")
    with observe_meshes(place) as meshes:
        observers = [observer for observer, _ in meshes]
        if len({about.pid for observer in observers if (about := observer.about)}) > 1:
            raise _name_one(observers)
        time_s = _config_of(observers[0].folder).drain_timeout if timeout_s is None else timeout_s
        told = ""
        for statuses in _together([observer.drain(time_s) for observer in observers]):
            if (left := describe_work(statuses)) != told:
                say(f"draining: {left}")
                told = left
        say("stopped")


def _together(drains: list[Iterator[Status]]) -> Iterator[list[Status]]:
    """The latest of each that has not ended."""
    while drains:
        latest = [(drain, next(drain, None)) for drain in drains]
        drains = [drain for drain, status in latest if status is not None]
        if drains:
            yield [status for _, status in latest if status is not None]


def _name_one(observers: list[Observer]) -> InvalidInput:
    lines = "\n".join(f"  {_describe(observer)}" for observer in observers)
    return InvalidInput("--mesh", f"{len(observers)} meshes are running, name one of them:\n{lines}")


def _ambiguous(prefix: str, ids: list[str]) -> InvalidInput:
    names = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
    return InvalidInput("ID", f"{prefix!r} is the beginning of several ids: {names}")


def describe_work(statuses: Sequence[Status]) -> str:
    running = sum(job.stage != "queued" for status in statuses for job in status.jobs)
    return f"{running} running, {sum(sum(status.queued.values()) for status in statuses)} queued"


def work_left(endpoints: Sequence[str]) -> str:
    """What schedulers still have, in words; nothing if none says so within a second."""
    statuses = []
    for endpoint in endpoints:
        with contextlib.suppress(FramemeshError), Observer(endpoint) as observer:
            statuses.append(observer.look())
    return describe_work(statuses) if statuses else ""


def read_mesh_file(folder: Path) -> MeshFile | None:
    """None if there is none that can be read."""
    try:
        return msgspec.json.decode((folder / MESH_FILE).read_bytes(), type=MeshFile)
    except (OSError, msgspec.DecodeError):
        return None


def _config_of(folder: Path | None) -> Config:
    """What the launcher of this folder was started with."""
    return load_frozen(folder / CONFIG_FILE) if folder is not None else Config()


def _observer_at(place: str) -> Observer:
    if "://" in place:
        return Observer(place)
    folder = Path(place)
    about = read_mesh_file(folder)
    if not (folder / "scheduler").exists() and not (about is not None and about.scheduler):
        raise InvalidInput("--mesh", f"{place} is no folder of a running mesh, nor a scheduler's endpoint")
    return _observer_of(folder)


def _observer_of(folder: Path) -> Observer:
    about = read_mesh_file(folder)
    endpoint = about.scheduler if about is not None else ""
    return Observer(endpoint or f"ipc://{folder}/scheduler", folder)


def _is_mesh(folder: Path) -> bool:
    about = read_mesh_file(folder)
    return about is None or about.role == MESH


def _describe(observer: Observer) -> str:
    about = observer.about
    facts = [] if about is None else [about.model, about.url, f"pid {about.pid}"]
    return "  ".join(filter(None, [observer.place, *facts]))


def _described_folders() -> list[Path]:
    """Run folders of this user that say what they are; anything else of that name is not ours to touch."""
    found = []
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*")):
        with contextlib.suppress(OSError):
            state = folder.lstat()
            if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and (folder / MESH_FILE).exists():
                found.append(folder)
    return found


def _is_dead(folder: Path) -> bool:
    with _lock_of_dead(folder) as dead:
        return dead


@contextlib.contextmanager
def _lock_of_dead(folder: Path) -> Iterator[bool]:
    """Whether the folder's launcher is gone; if so, nobody else takes the folder while this goes on."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dead = True
    except OSError:
        dead = False
    try:
        yield dead
    finally:
        os.close(handle)
