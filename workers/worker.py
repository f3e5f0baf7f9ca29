"""One rank's life: take an item, run it, report. Decides nothing."""

from __future__ import annotations

import threading
import time
import traceback

from runtime.log import get_logger
from runtime.protocol import (
    Denoise,
    Done,
    FromScheduler,
    Heartbeat,
    ItemFailed,
    Release,
    Shutdown,
    Welcome,
    WorkItem,
)
from runtime.wire import Channel
from workers.executor import Executor
from workers.seat import Seat, WorkerChannel

HEARTBEAT_S = 1.0
MAX_REASON = 300
"""Characters of an error that travel; the log has all of it."""

log = get_logger("worker")


class GroupBroken(Exception):
    """A multi-rank forward raised here: posted sends and receives may wait for ever, only a restart is safe."""


class Heart(threading.Thread):
    """Tells the scheduler once a second that the process lives, from a socket of its own."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(name="heart", daemon=True)
        self._seat = seat
        self.busy_seq = -1

    def run(self) -> None:
        seat = self._seat
        channel: WorkerChannel = Channel.connect(seat.scheduler, FromScheduler, seat.identity + b"/heart")
        channel.set_epoch(seat.epoch)
        while True:
            channel.send(Heartbeat(seat.rank, seat.generation, self.busy_seq))
            time.sleep(HEARTBEAT_S)


class Worker:
    """The control loop of one rank."""

    def __init__(self, rank: int, channel: WorkerChannel, executor: Executor, heart: Heart) -> None:
        self._rank = rank
        self._channel = channel
        self._executor = executor
        self._heart = heart

    def run(self) -> None:
        """Until Shutdown.

        Raises:
            GroupBroken: after it was reported; the process must exit.
        """
        while True:
            received = self._channel.receive()
            assert received is not None
            match received.message:
                case Shutdown():
                    return
                case Release() as item:
                    # The stream is ordered: nothing after it can need the state, so nobody waits for a report.
                    self._executor.run(item)
                case Welcome():
                    pass
                case item if isinstance(item, WorkItem):
                    self._work(item)

    def _work(self, item: WorkItem) -> None:
        self._heart.busy_seq = item.seq
        started = time.monotonic()
        try:
            self._executor.run(item)
        except Exception as error:
            broken = isinstance(item, Denoise) and len(item.ranks) > 1
            log.error("item failed", seq=item.seq, error=str(error), trace=traceback.format_exc())
            reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
            self._channel.send(ItemFailed(self._rank, item.seq, failure_code(error), reason, broken))
            if broken:
                raise GroupBroken(reason) from error
        else:
            self._channel.send(Done(self._rank, item.seq, started, time.monotonic()))
        finally:
            self._heart.busy_seq = -1


def failure_code(error: Exception) -> str:
    """A stable word for what a client may want to act on."""
    return "out_of_memory" if "out of memory" in str(error).lower() else "internal_error"
