"""A rank's place in the mesh: who it is, and the hello that makes the scheduler know it. Imports no torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace

from runtime.protocol import FromScheduler, FromWorker, Welcome, WorkerHello
from runtime.wire import Channel, incarnation

ASK_AGAIN_S = 5.0

WorkerChannel = Channel[FromWorker, FromScheduler]


@dataclass(frozen=True)
class Seat:
    """One life of one rank."""

    scheduler: str
    """The scheduler's endpoint."""
    identity: bytes
    rank: int
    num_ranks: int
    generation: int
    """How often torchrun restarted the group."""
    epoch: int
    """The scheduler's, when the seat was taken."""
    host: str
    pid: int

    @property
    def hello(self) -> WorkerHello:
        return WorkerHello(self.rank, self.num_ranks, self.generation, self.host, self.pid)


def take_seat(scheduler: str) -> tuple[Seat, WorkerChannel]:
    """Say hello with what torchrun's environment says, and wait for the scheduler to answer."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generation = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    identity = incarnation(f"worker{rank}")
    seat = Seat(scheduler, identity, rank, num_ranks, generation, 0, socket.gethostname(), os.getpid())
    channel: WorkerChannel = Channel.connect(scheduler, FromScheduler, identity)
    received = None
    while received is None:
        # A scheduler that died with our hello has a successor that knows nothing of us.
        channel.send(seat.hello)
        received = channel.receive(ASK_AGAIN_S)
    assert isinstance(received.message, Welcome), received.message
    channel.set_epoch(received.message.epoch)
    return replace(seat, epoch=received.message.epoch), channel
