"""The folder of checkpoints, and the thread that writes it: compute never waits for a disk. Plans nothing.

A file appears under its final name only when all of it is on the disk. Files are named by a digest of the request's id
and the step, so that an id cannot leave the folder and every rank and every life finds them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from runtime.errors import NotCheckpointable, PeerGone
from runtime.log import get_logger
from runtime.protocol import Checkpointed, CheckpointFailed, FromScheduler, SavedState
from runtime.wire import Channel
from workers.checkpoint import Snapshot, capture, digest, encode, restore
from workers.seat import Seat, WorkerChannel
from workers.state import RequestState

MAX_WAITING = 64
"""Snapshots in line, at most one per request: each may keep tensors alive that no state refers to any more."""

MAX_REASON = 300
"""Characters of an error that travel."""

FINAL, TEMPORARY = ".safetensors", ".tmp"

log = get_logger("spool")


class SpoolFull(Exception):
    """One file more would exceed the spool's limit; the message is for the scheduler."""


class SpoolFolder:
    """The files; every method may raise OSError.

    Args:
        path: made with the first file and never again, since a folder that vanished may be a mount that was lost.
        max_bytes: of all that is in it, whoever wrote it.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path.absolute()
        self._max_bytes = max_bytes
        self._made = self._path.is_dir()

    def write(self, request_id: str, step: int, data: bytes) -> Path:
        """The file of this step, once it is durable.

        Raises:
            SpoolFull: it would exceed `max_bytes`.
        """
        if not self._made:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._made = True
        used = self.used_bytes()
        if used + len(data) > self._max_bytes:
            raise SpoolFull(f"the spool is full: {used} bytes and {len(data)} more, of {self._max_bytes}")
        final = self._path / f"{digest(request_id)}-{step}{FINAL}"
        with self._open_temporary(final) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, final)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        self._sync()
        return final

    def remove(self, request_id: str, *, keep: Path | None = None) -> None:
        """The request's files, of whatever step and life; all but one."""
        for file in self._path.glob(f"{digest(request_id)}-*{FINAL}"):
            if file != keep:
                file.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what processes that were killed left half written."""
        for temporary in self._path.glob(f"*{TEMPORARY}"):
            with contextlib.suppress(FileNotFoundError), open(temporary, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                temporary.unlink(missing_ok=True)

    def _open_temporary(self, final: Path) -> BinaryIO:
        """A new file, locked so that a sweep can tell it from one whose writer is dead."""
        while True:
            file = open(self._path / f"{final.name}.{secrets.token_hex(4)}{TEMPORARY}", "xb")  # noqa: SIM115
            with contextlib.suppress(OSError):
                # Some network file systems have no locks; nobody can sweep there either.
                fcntl.flock(file, fcntl.LOCK_EX)
            if Path(file.name).exists():
                return file
            # A sweep was faster than the lock.
            file.close()

    def used_bytes(self) -> int:
        """Of every file, those of other ranks and of earlier lives too."""
        total = 0
        with os.scandir(self._path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
        return total

    def _sync(self) -> None:
        """Make the renaming durable."""
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Spool(threading.Thread):
    """Takes snapshots in the compute thread; writes, removes and reports in its own.

    Args:
        model: digest of what has to be equal for a resume.
    """

    def __init__(self, seat: Seat, folder: Path, max_bytes: int, model: str, max_waiting: int = MAX_WAITING) -> None:
        super().__init__(name="spool", daemon=True)
        self.epoch = seat.epoch
        """The scheduler's; the worker changes it."""
        self._seat = seat
        self._folder = SpoolFolder(folder, max_bytes)
        self._model = model
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._failures: deque[CheckpointFailed] = deque()
        self._released: deque[str] = deque()
        self._waiting: dict[str, Snapshot] = {}
        """By request, in the order of arrival."""
        self._closing = False
        self._explained: set[str] = set()
        """Reasons that the log has: what a solver cannot do is the same at every step."""

    # ---- in the compute thread: nothing here waits -------------------------------------------------------------

    def save(self, state: RequestState) -> None:
        """Have the state as it is now written; the scheduler hears how it ended."""
        try:
            self._queue(capture(state, self._model))
        except NotCheckpointable as error:
            reason = str(error)
            if reason not in self._explained:
                log.warning("no checkpoints", request=state.request.id, reason=reason)
                self._explained.add(reason)
            self._report(CheckpointFailed(self._seat.rank, state.request.id, state.step, reason))

    def resume(self, state: RequestState, saved: SavedState) -> None:
        """Put a freshly prepared state where the saved one was.

        Raises:
            CheckpointUnusable: the file is damaged, or of something else.
        """
        restore(state, Path(saved.path), saved.step, self._model)

    def release(self, request_ids: tuple[str, ...]) -> None:
        """Remove the requests' files; what of them is still in line is never written."""
        with self._changed:
            for request_id in request_ids:
                self._waiting.pop(request_id, None)
                self._released.append(request_id)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Write what is in line, then end; waits at most so many seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join(timeout_s)

    def _queue(self, snapshot: Snapshot) -> None:
        """In line, in the place of an older one of the same request if that still waits."""
        request_id = snapshot.header.request_id
        with self._changed:
            if request_id in self._waiting or len(self._waiting) < self._max_waiting:
                dropped, reason = self._waiting.get(request_id), f"step {snapshot.header.step} took its place in line"
                self._waiting[request_id] = snapshot
            else:
                dropped, reason = snapshot, f"{len(self._waiting)} checkpoints are in line before it"
            self._changed.notify()
        if dropped is not None:
            self._fail(request_id, dropped.header.step, f"the disk is slow: {reason}")

    def _fail(self, request_id: str, step: int, reason: str) -> None:
        log.warning("checkpoint lost", request=request_id, step=step, reason=reason)
        self._report(CheckpointFailed(self._seat.rank, request_id, step, reason))

    def _report(self, failure: CheckpointFailed) -> None:
        with self._changed:
            self._failures.append(failure)
            self._changed.notify()

    # ---- in the spool's own thread -----------------------------------------------------------------------------

    def run(self) -> None:
        channel: WorkerChannel = Channel.connect(self._seat.scheduler, FromScheduler, self._seat.identity + b"/spool")
        self._tidy(self._folder.sweep)
        while self._work(channel):
            pass
        channel.close(linger_s=1.0)

    def _work(self, channel: WorkerChannel) -> bool:
        """One job, and nothing of it is held on to; False at the end."""
        match self._next():
            case None:
                return False
            case CheckpointFailed() as failure:
                self._tell(channel, failure)
            case Snapshot() as snapshot:
                self._write(channel, snapshot)
            case request_id:
                self._tidy(partial(self._folder.remove, request_id))
        return True

    def _next(self) -> CheckpointFailed | str | Snapshot | None:
        """Bad news first, then what frees space; None at the end."""
        with self._changed:
            while not (self._failures or self._released or self._waiting or self._closing):
                self._changed.wait()
            if self._failures:
                return self._failures.popleft()
            if self._released:
                return self._released.popleft()
            return self._waiting.pop(next(iter(self._waiting))) if self._waiting else None

    def _write(self, channel: WorkerChannel, snapshot: Snapshot) -> None:
        """Whatever goes wrong with a disk or a device costs one checkpoint, never the rank."""
        request_id, step = snapshot.header.request_id, snapshot.header.step
        try:
            data = encode(snapshot)
            path = self._folder.write(request_id, step, data)
        except SpoolFull as error:
            self._fail(request_id, step, str(error))
        except OSError as error:
            self._fail(request_id, step, f"cannot write to the spool: {error.strerror}")
        except Exception as error:
            self._fail(request_id, step, f"{type(error).__name__}: {error}"[:MAX_REASON])
        else:
            self._tell(channel, Checkpointed(self._seat.rank, request_id, SavedState(step, str(path), len(data))))
            self._tidy(partial(self._folder.remove, request_id, keep=path))

    def _tell(self, channel: WorkerChannel, message: Checkpointed | CheckpointFailed) -> None:
        channel.set_epoch(self.epoch)
        try:
            channel.send(message)
        except PeerGone as error:
            log.warning("checkpoint not reported", request=message.request_id, error=str(error))

    def _tidy(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            log.warning("cannot tidy the spool", error=str(error))
