"""One rank's life: take an item, run it, report; begin anew when the scheduler does. Decides nothing."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import traceback

import torch

from runtime.diary import trace_of
from runtime.errors import CheckpointUnusable, PeerGone
from runtime.log import get_logger
from runtime.protocol import (
    Decode,
    Denoise,
    Done,
    Encode,
    FromScheduler,
    Heartbeat,
    ItemFailed,
    Ready,
    Release,
    Request,
    Shutdown,
    Welcome,
    WorkItem,
)
from runtime.wire import Channel
from workers.executor import Executor
from workers.peak import peak_bytes, reset_peak
from workers.seat import Seat, WorkerChannel
from workers.spool import Spool

HEARTBEAT_S = 1.0
MAX_REASON = 300
"""Characters of an error that travel; the log has all of it."""

log = get_logger("worker")


class GroupBroken(Exception):
    """Only a restart is safe: posted sends and receives of a multi-rank forward may wait for ever, or a GPU is lost."""


class Heart(threading.Thread):
    """Tells the scheduler once a second that the process lives, from a socket of its own."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(name="heart", daemon=True)
        self._seat = seat
        self.busy_seq = -1
        self.epoch = seat.epoch
        """The scheduler's; the worker changes it."""

    def run(self) -> None:
        seat = self._seat
        channel: WorkerChannel = Channel.connect(seat.scheduler, FromScheduler, seat.identity + b"/heart")
        while True:
            channel.set_epoch(self.epoch)
            # A scheduler that is away for hours fills the queue; the heart beats on for the next one.
            with contextlib.suppress(PeerGone):
                channel.send(Heartbeat(seat.rank, seat.generation, self.busy_seq, seat.host, seat.pid))
            time.sleep(HEARTBEAT_S)


class Worker:
    """The control loop of one rank.

    Args:
        ready: what this rank said when it had loaded the model; said again to every new scheduler.
    """

    def __init__(
        self, seat: Seat, channel: WorkerChannel, executor: Executor, heart: Heart, spool: Spool, ready: Ready
    ) -> None:
        self._seat = seat
        self._channel = channel
        self._executor = executor
        self._heart = heart
        self._spool = spool
        self._ready = ready
        self._epoch = seat.epoch
        self.stale = 0
        """Messages dropped because they were of another epoch."""

    def run(self) -> None:
        """Until Shutdown.

        Raises:
            GroupBroken: after it was reported; the process must exit.
        """
        while True:
            received = self._channel.receive()
            assert received is not None
            match received.message:
                case Welcome(epoch):
                    self._join(epoch)
                case message if received.epoch != self._epoch:
                    self.stale += 1
                    log.warning("dropped: stale epoch", message=type(message).__name__, stale=self.stale)
                case Shutdown():
                    return
                case Release() as item:
                    # The stream is ordered: nothing after it can need the state, so nobody waits for a report.
                    self._executor.run(item)
                case item if isinstance(item, WorkItem):
                    self._work(item)

    def _join(self, epoch: int) -> None:
        """Begin anew under a scheduler that knows nothing of us; its files in the spool stay for a resume."""
        if epoch == self._epoch:
            return
        log.warning("a new scheduler", epoch=epoch, released=len(self._executor.states))
        self._executor.states.clear()
        self._epoch = self._heart.epoch = self._spool.epoch = epoch
        self._channel.set_epoch(epoch)
        self._channel.send(self._seat.hello)
        self._channel.send(self._ready)

    def _work(self, item: WorkItem) -> None:
        self._heart.busy_seq = item.seq
        reset_peak()
        started = time.monotonic()
        try:
            self._executor.run(item)
        except Exception as error:
            self._failed(item, error)
        else:
            self._channel.send(Done(self._seat.rank, item.seq, started, time.monotonic(), peak_bytes()))
            self._log_stages(item)
        finally:
            self._heart.busy_seq = -1

    def _failed(self, item: WorkItem, error: Exception) -> None:
        """Report it, and go on where no other rank can wait for us."""
        code, reason = failure_code(error), describe(error)
        alone = not self._executor.in_collectives or len(item.ranks) == 1
        # After an error in a kernel every later call of the process fails too.
        broken = not alone or isinstance(error, torch.AcceleratorError)
        told = "".join(traceback.format_exception(error))
        log.error("item failed", seq=item.seq, error=str(error), traceback=told, requests=self._described(item))
        if not broken:
            _forget_tensors(error)
        self._channel.send(ItemFailed(self._seat.rank, item.seq, code, reason, broken))
        if broken:
            raise GroupBroken(reason) from error

    def _log_stages(self, item: WorkItem) -> None:
        """A line for each request that has come to the end of a stage with this item."""
        for request in self._requests_of(item):
            state = self._executor.states.get(request.id)
            if state is None:
                continue
            match item:
                case Encode():
                    stage = "encode"
                case Denoise() if state.step == state.params.num_inference_steps:
                    stage = "denoise"
                case Decode() if state.frames_sent == state.params.num_frames:
                    stage = "decode"
                case _:
                    continue
            seconds = round(state.timings.get(stage, 0.0), 4)
            log.debug("stage done", request=request.id, stage=stage, s=seconds, **trace_of(request))

    def _described(self, item: WorkItem) -> list[dict[str, str]]:
        """Of the item's requests their ids, and what ties them to the calls behind them."""
        return [{"request": request.id} | trace_of(request) for request in self._requests_of(item)]

    def _requests_of(self, item: WorkItem) -> list[Request]:
        """Those of an item that this rank knows."""
        match item:
            case Encode():
                return list(item.requests)
            case Decode():
                ids: tuple[str, ...] = (item.request_id,)
            case _:
                ids = item.request_ids
        return [self._executor.states[one].request for one in ids if one in self._executor.states]


def failure_code(error: Exception) -> str:
    """A stable word for what the scheduler or a client may want to act on."""
    if isinstance(error, CheckpointUnusable):
        return "checkpoint_unusable"
    words = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in words for sign in OUT_OF_MEMORY):
        return "out_of_memory"
    return "internal_error"


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
"""As CUDA, torch's CPU allocator and cuBLAS say it."""


def describe(error: Exception) -> str:
    """The error in at most `MAX_REASON` characters; of absolute paths only the last part, the log has the rest."""
    text = re.sub(r"(?<![\w.:/])/(?:[^\s/'\",:;]+/)+(?=[^\s/])", "", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:MAX_REASON]


def _forget_tensors(error: BaseException | None) -> None:
    """A traceback keeps every local variable of the frames that failed: gigabytes, of a forward."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
