"""The scheduler process's loop: sockets and time around the pure scheduler. step(): receive -> schedule -> send."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import PeerGone
from runtime.log import get_logger
from runtime.protocol import (
    Cancel,
    Done,
    Drain,
    Fence,
    FromScheduler,
    GatewayHello,
    Grant,
    Heartbeat,
    ItemFailed,
    MeshState,
    ModelInfo,
    Observe,
    Ready,
    Shutdown,
    Stored,
    Submit,
    SupervisorHello,
    ToScheduler,
    Welcome,
    WorkerHello,
    WorkItem,
)
from runtime.scheduler import Scheduler
from runtime.status import StepTimes, take_status
from runtime.wire import Channel, Received

HEARTBEAT_LIMIT_S = 6.0
"""A ready rank that is silent for so long is taken for dead; it beats once a second from a thread of its own."""

GATEWAY_PROBE_S = 1.0
"""How often a gateway is written to, news or not: only a send shows that it is gone."""

log = get_logger("engine")


@dataclass
class _Rank:
    identity: bytes
    hello: WorkerHello
    last_seen: float
    ready: bool = False
    memory_budget: int = 0


class Engine:
    """One replica's control plane."""

    def __init__(
        self,
        channel: Channel[FromScheduler, ToScheduler],
        scheduler: Scheduler,
        epoch: int,
        trace: Callable[[Done], None] | None = None,
    ) -> None:
        self._channel = channel
        self._scheduler = scheduler
        self._epoch = epoch
        channel.set_epoch(epoch)
        self._ranks: dict[int, _Rank] = {}
        self._gateways: set[bytes] = set()
        self._supervisors: dict[bytes, str] = {}
        self._model: ModelInfo | None = None
        self._generation = -1
        self._reason = "the workers are starting"
        self._losses = 0
        self._probed = 0.0
        self._trace = trace
        self._step_times = StepTimes()
        self.stale = 0
        self.stopped = False

    def step(self) -> None:
        """Receive everything that waits, let the scheduler decide, send what it decided."""
        received = self._channel.receive(self._patience())
        now = time.monotonic()
        while received is not None:
            self._hear(received, now)
            received = self._channel.receive(0)
        self._watch(now)
        self._probe_gateways(now)
        for item in self._scheduler.plan(now):
            self._start(item, now)
        for gateway, news in self._scheduler.take_news():
            self._tell_gateway(gateway, news, now)
        self._stop_when_drained()

    def _patience(self) -> float | None:
        """Seconds that the loop may sleep: for ever without peers, else until a heartbeat or a deadline is due."""
        limits = [1.0] if self._ranks or self._gateways else []
        deadline = self._scheduler.next_deadline()
        if deadline is not None:
            limits.append(max(deadline - time.monotonic(), 0.0))
        return min(limits, default=None)

    def _hear(self, received: Received[ToScheduler], now: float) -> None:
        message, sender = received.message, received.sender
        is_hello = isinstance(message, GatewayHello | WorkerHello | SupervisorHello | Observe)
        if not is_hello and received.epoch != self._epoch:
            self.stale += 1
            log.warning("dropped: stale epoch", sender=sender, message=type(message).__name__)
            return
        match message:
            case GatewayHello():
                self._gateways.add(sender)
                self._scheduler.gateway_joined(sender, message.frames_endpoint, message.credits)
                self._greet(sender)
            case SupervisorHello():
                self._supervisors[sender] = message.host
                self._greet(sender)
            case WorkerHello():
                self._worker_joined(sender, message, now)
            case Submit():
                self._scheduler.submit(sender, message.requests, now)
            case Cancel():
                self._scheduler.cancel(message.request_id, message.reason, now)
            case Stored():
                self._scheduler.stored(message.request_id, now)
            case Grant():
                self._scheduler.granted(sender, message.credits)
            case Drain():
                self._scheduler.draining = True
            case Observe():
                self._answer(sender, message, now)
            case Ready() | Heartbeat() | Done() | ItemFailed():
                self._hear_rank(sender, message, now)

    def _hear_rank(self, sender: bytes, message: Ready | Heartbeat | Done | ItemFailed, now: float) -> None:
        rank = self._ranks.get(message.rank)
        # A heartbeat comes from the rank's thread, whose identity extends the rank's own.
        if rank is None or not sender.startswith(rank.identity):
            self.stale += 1
            return
        rank.last_seen = now
        match message:
            case Ready():
                rank.ready = True
                rank.memory_budget = message.memory_budget
                self._scheduler.calibrate(message.measurements)
                self._model = message.model or self._model
                self._check_group()
            case Done():
                if self._trace is not None:
                    self._trace(message)
                seconds = message.finished - message.started
                self._step_times.note(self._scheduler.running.get(message.seq), seconds)
                self._scheduler.completed(message.rank, message.seq, seconds, now)
            case ItemFailed() if message.group_broken:
                self._group_lost(f"rank {message.rank}: {message.reason}", now)
            case ItemFailed():
                self._scheduler.failed(message.rank, message.seq, message.code, message.reason, now)
            case Heartbeat():
                pass

    def _worker_joined(self, sender: bytes, hello: WorkerHello, now: float) -> None:
        if hello.num_ranks != self._scheduler.layout.num_ranks:
            log.error("refused a worker", theirs=hello.num_ranks, ours=str(self._scheduler.layout))
            return
        # A torchrun that was started anew counts its generations from 0 again, but its ranks are new.
        if hello.generation > self._generation or hello.rank in self._ranks:
            self._group_lost("the worker group was restarted", now)
        if self._ranks and hello.generation < self._generation:
            self.stale += 1
            return
        self._generation = hello.generation
        self._ranks[hello.rank] = _Rank(sender, hello, now)
        self._send(sender, Welcome(self._epoch))

    def _check_group(self) -> None:
        if len(self._ranks) == self._scheduler.layout.num_ranks and all(r.ready for r in self._ranks.values()):
            self._reason = "ready"
            budget = min(rank.memory_budget for rank in self._ranks.values())
            self._scheduler.group_ready(budget or None)
        self._announce()

    def _group_lost(self, reason: str, now: float) -> None:
        """One recovery path: forget the ranks, fail what ran, wait for the group to come back."""
        if not self._ranks:
            return
        log.error("worker group lost", reason=reason)
        self._ranks.clear()
        self._losses += 1
        self._reason = f"the workers are restarting: {reason}"
        self._scheduler.group_lost(f"a worker was lost ({reason})", now)
        self._announce()

    def _watch(self, now: float) -> None:
        """A ready rank whose heartbeat stopped hangs or is dead: have it killed, so that its group restarts."""
        silent = [r for r in self._ranks.values() if r.ready and now - r.last_seen > HEARTBEAT_LIMIT_S]
        for rank in silent[:1]:
            reason = f"rank {rank.hello.rank} was silent for {now - rank.last_seen:.1f} s"
            for supervisor, host in self._supervisors.items():
                if host == rank.hello.host:
                    self._send(supervisor, Fence(rank.hello.rank, rank.hello.pid, reason))
            self._group_lost(reason, now)

    def _probe_gateways(self, now: float) -> None:
        """A request that waits for its gateway makes no news, so that nobody would see the gateway die."""
        if now - self._probed > GATEWAY_PROBE_S:
            self._probed = now
            for gateway in tuple(self._gateways):
                self._tell_gateway(gateway, Welcome(self._epoch), now)

    def _start(self, item: WorkItem, now: float) -> None:
        for rank in item.ranks:
            if rank not in self._ranks:
                continue
            try:
                self._channel.send(item, to=self._ranks[rank].identity)
            except PeerGone:
                self._group_lost(f"rank {rank} is gone", now)
                return

    def _tell_gateway(self, gateway: bytes, news: FromScheduler, now: float) -> None:
        if not self._send(gateway, news):
            self._gateways.discard(gateway)
            self._scheduler.gateway_lost(gateway, now)

    def _greet(self, peer: bytes) -> None:
        self._send(peer, Welcome(self._epoch))
        self._send(peer, self._state())

    def _answer(self, observer: bytes, question: Observe, now: float) -> None:
        """One snapshot for one question. Observers are not kept: whoever went away is not missed."""
        dropped = self._channel.dropped.malformed + self._channel.dropped.wrong_version
        status = take_status(
            self._scheduler,
            self._ranks,
            self._state(),
            question.prefix,
            now,
            epoch=self._epoch,
            step_times=self._step_times.latest,
            stale=self.stale,
            dropped=dropped,
        )
        self._send(observer, Welcome(self._epoch))
        self._send(observer, status)

    def _announce(self) -> None:
        for peer in [*self._gateways, *self._supervisors]:
            self._send(peer, self._state())

    def _state(self) -> MeshState:
        ready = sum(rank.ready for rank in self._ranks.values())
        return MeshState(
            self._scheduler.ready,
            self._reason,
            ready,
            self._scheduler.layout.num_ranks,
            self._model,
            self._losses,
        )

    def _stop_when_drained(self) -> None:
        if self._scheduler.draining and self._scheduler.idle and not self.stopped:
            self.stopped = True
            for rank in self._ranks.values():
                self._send(rank.identity, Shutdown())

    def _send(self, peer: bytes, message: FromScheduler) -> bool:
        try:
            self._channel.send(message, to=peer)
        except PeerGone:
            return False
        return True
