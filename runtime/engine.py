"""The scheduler process's loop: sockets and time around the pure scheduler. step(): receive -> schedule -> send."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from runtime.diary import Diary
from runtime.errors import PeerGone
from runtime.log import get_logger
from runtime.protocol import (
    Cancel,
    Cancelled,
    Checkpointed,
    CheckpointFailed,
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
from runtime.request import Stage
from runtime.roster import Roster, Trouble
from runtime.scheduler import Scheduler
from runtime.status import StepTimes, take_status
from runtime.trace import Trace
from runtime.wire import Channel, Received

BEAT_S = 1.0
"""How often gateways and supervisors are written to, news or not: only a send shows who is gone, and only silence
tells them that we are."""

BACKLOG_CHANGE = 0.1
"""Gateways hear of the backlog when it has changed by this part, with a beat."""

MOST_TOLD = 1000
"""Senders of stale messages that are remembered, and gateways that were given up."""

log = get_logger("engine")


class Engine:
    """One replica's control plane."""

    def __init__(
        self,
        channel: Channel[FromScheduler, ToScheduler],
        scheduler: Scheduler,
        epoch: int,
        trace: Trace | None = None,
    ) -> None:
        self._channel = channel
        self._scheduler = scheduler
        self._epoch = epoch
        channel.set_epoch(epoch)
        self._roster = Roster(scheduler.layout.num_ranks)
        self._gateways: set[bytes] = set()
        self._given_up: dict[bytes, None] = {}
        """Gateways that could not be reached and have not come back, the latest last."""
        self._supervisors: dict[bytes, str] = {}
        self._model: ModelInfo | None = None
        self._reason = "the workers are starting"
        self._beaten = 0.0
        self._backlog_told = 0.0
        self._trace = trace
        self._step_times = StepTimes()
        self._diary = Diary()
        self._told: set[bytes] = set()
        """Whose stale messages were in the log."""
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
        self._beat(now)
        for item in self._scheduler.plan(now):
            self._start(item, now)
        for gateway, news in self._scheduler.take_news():
            self._diary.told(news)
            self._tell_gateway(gateway, news, now)
        self._stop_when_drained(now)

    def _patience(self) -> float | None:
        """Seconds that the loop may sleep: for ever without peers, else until a heartbeat or a deadline is due."""
        limits = [BEAT_S] if self._roster.needs_watching or self._gateways or self._supervisors else []
        deadline = self._scheduler.next_deadline()
        if deadline is not None:
            limits.append(max(deadline - time.monotonic(), 0.0))
        return min(limits, default=None)

    def _hear(self, received: Received[ToScheduler], now: float) -> None:
        message, sender = received.message, received.sender
        is_hello = isinstance(message, GatewayHello | WorkerHello | SupervisorHello | Observe)
        if not is_hello and received.epoch != self._epoch:
            self._hear_stale(sender, message, now)
            return
        match message:
            case GatewayHello():
                self._gateways.add(sender)
                self._given_up.pop(sender, None)
                self._scheduler.gateway_joined(sender, message.frames_endpoint, message.credits)
                self._greet(sender, now)
            case SupervisorHello():
                self._supervisors[sender] = message.host
                self._greet(sender, now)
            case WorkerHello():
                self._worker_joined(sender, message, now)
            case Submit():
                self._diary.submitted(message.requests)
                self._scheduler.submit(sender, message.requests, now)
            case Cancel():
                self._cancel(sender, message, now)
            case Stored():
                self._scheduler.stored(sender, message.request_id, now)
            case Grant():
                self._scheduler.granted(sender, message.credits)
            case Drain():
                self._scheduler.drain(message.timeout_s, now)
                self._reason = "draining"
                self._announce(now)
            case Observe():
                self._answer(sender, message, now)
            case Checkpointed():
                # It is as good as it was when its writer died since.
                self._scheduler.checkpointed(message.request_id, message.saved)
            case _:
                self._hear_rank(sender, message, now)

    def _cancel(self, sender: bytes, message: Cancel, now: float) -> None:
        """A gateway always hears that its request is over, known or not, or another gateway's since: it may wait for
        that word. One that was given up still speaks for nobody else."""
        gateway = sender if sender in self._gateways or sender in self._given_up else None
        record = self._scheduler.requests.get(message.request_id)
        self._scheduler.cancel(message.request_id, message.reason, now, gateway)
        if gateway is not None:
            over = record is None or record.gateway != gateway
        else:
            # An observer is told what it ended; what is not found may just as well be complete.
            over = record is not None and record.stage is Stage.CANCELLED
        if over:
            self._send(sender, Cancelled(message.request_id, message.reason))

    def _hear_stale(self, sender: bytes, message: ToScheduler, now: float) -> None:
        """Somebody who knew our predecessor: it learns our epoch and says hello again."""
        self.stale += 1
        # A rank's heart and its writer have sockets of their own, whose identities extend the rank's.
        peer, _, organ = sender.partition(b"/")
        if not organ:
            self._complain_once(sender, message)
        elif isinstance(message, Heartbeat):
            self._roster.hear_stranger(peer, message, now)
        self._send(peer, Welcome(self._epoch))

    def _complain_once(self, sender: bytes, message: ToScheduler) -> None:
        """Whoever does not learn the epoch would fill the log."""
        if sender not in self._told:
            if len(self._told) >= MOST_TOLD:
                self._told.clear()
            self._told.add(sender)
            log.warning("dropped: stale epoch", sender=sender, message=type(message).__name__)

    def _hear_rank(
        self, sender: bytes, message: Ready | Heartbeat | Done | ItemFailed | CheckpointFailed, now: float
    ) -> None:
        rank = self._roster.hear(sender, message.rank, now)
        if rank is None:
            self.stale += 1
            if isinstance(message, Heartbeat):
                # Of a group that was given up, whose fence may not have arrived.
                self._roster.hear_stranger(sender.partition(b"/")[0], message, now)
            return
        match message:
            case Ready():
                rank.ready, rank.memory_budget = True, message.memory_budget
                rank.device_memory = message.device_memory
                self._scheduler.calibrate(message.measurements)
                self._model = message.model or self._model
                self._check_group(now)
            case Done():
                running = self._scheduler.running.get(message.seq)
                if self._trace is not None and running is not None:
                    steps = {record.id: record.step for record in self._scheduler.requests.values()}
                    self._trace.note(message, running.item, steps)
                seconds = message.finished - message.started
                self._step_times.note(running, seconds)
                rank.peak_bytes = message.peak_bytes
                self._scheduler.completed(message.rank, message.seq, seconds, now, message.peak_bytes)
            case ItemFailed() if message.group_broken:
                self._group_lost(f"rank {message.rank}: {message.reason}", now, (message.seq, message.code))
            case ItemFailed():
                self._scheduler.failed(message.rank, message.seq, message.code, message.reason, now)
            case CheckpointFailed():
                facts = {"step": message.step, "reason": message.reason} | self._diary.trace(message.request_id)
                log.warning("no checkpoint", request=message.request_id, **facts)
                self._scheduler.checkpoint_failed(message.request_id)
            case Heartbeat():
                pass

    def _worker_joined(self, sender: bytes, hello: WorkerHello, now: float) -> None:
        if hello.num_ranks != self._scheduler.layout.num_ranks:
            log.error("refused a worker", theirs=hello.num_ranks, ours=str(self._scheduler.layout))
            return
        if self._roster.replaces(sender, hello):
            self._group_lost("the worker group was restarted", now)
        if self._roster.join(sender, hello, now):
            self._send(sender, Welcome(self._epoch))
        else:
            self.stale += 1

    def _check_group(self, now: float) -> None:
        if self._roster.complete:
            self._reason = "draining" if self._scheduler.draining else "ready"
            self._scheduler.limits.device_memory = self._roster.device_memory or None
            self._scheduler.group_ready(self._roster.memory_budget or None)
        self._announce(now)

    def _group_lost(self, reason: str, now: float, culprit: tuple[int, str] | None = None) -> None:
        """One recovery path: forget the ranks, send what ran back into the line, wait for the group to come back."""
        if not self._roster.ranks:
            return
        log.error("worker group lost", reason=reason)
        self._roster.ranks.clear()
        self._reason = f"the workers are restarting: {reason}"
        self._scheduler.group_lost(f"a worker was lost ({reason})", now, culprit)
        self._announce(now)

    def _watch(self, now: float) -> None:
        """Have ranks killed that hang, so that their group restarts."""
        self._fence(self._roster.left_over(now))
        trouble = self._roster.trouble(self._scheduler.running.values(), now)
        if trouble is not None:
            self._give_up_group(trouble, now)

    def _give_up_group(self, trouble: Trouble, now: float) -> None:
        """Ranks that live on would beat for ever and never join again: whoever is in trouble is killed."""
        self._fence(trouble.fences)
        self._group_lost(trouble.reason, now, trouble.culprit)

    def _fence(self, fences: Iterable[tuple[str, Fence]]) -> None:
        for host, fence in fences:
            for supervisor, its_host in self._supervisors.items():
                if its_host == host:
                    self._send(supervisor, fence)

    def _beat(self, now: float) -> None:
        if now - self._beaten > BEAT_S:
            self._beaten = now
            for gateway in tuple(self._gateways):
                self._tell_gateway(gateway, Welcome(self._epoch), now)
            self._tell_backlog(now)
            for supervisor in self._supervisors:
                self._send(supervisor, Welcome(self._epoch))

    def _tell_backlog(self, now: float) -> None:
        backlog = self._scheduler.backlog_s
        if abs(backlog - self._backlog_told) > BACKLOG_CHANGE * self._backlog_told:
            self._backlog_told = backlog
            news = msgspec.structs.replace(self._state(now), model=None)
            for gateway in tuple(self._gateways):
                self._tell_gateway(gateway, news, now)

    def _start(self, item: WorkItem, now: float) -> None:
        for rank in item.ranks:
            if rank not in self._roster.ranks:
                continue
            try:
                self._channel.send(item, to=self._roster.ranks[rank].identity)
            except PeerGone:
                self._give_up_group(self._roster.unreachable(rank), now)
                return

    def _tell_gateway(self, gateway: bytes, news: FromScheduler, now: float) -> None:
        if not self._send(gateway, news):
            self._gateways.discard(gateway)
            self._given_up[gateway] = None
            if len(self._given_up) > MOST_TOLD:
                del self._given_up[next(iter(self._given_up))]
            self._scheduler.gateway_lost(gateway, now)

    def _greet(self, peer: bytes, now: float) -> None:
        self._send(peer, Welcome(self._epoch))
        self._send(peer, self._state(now))

    def _answer(self, observer: bytes, question: Observe, now: float) -> None:
        """One snapshot for one question. Observers are not kept: whoever went away is not missed."""
        counts = self._channel.dropped
        dropped = counts.malformed + counts.wrong_version + counts.refused
        status = take_status(
            self._scheduler,
            self._roster.ranks,
            self._state(now),
            question.prefix,
            now,
            epoch=self._epoch,
            step_times=self._step_times.latest,
            stale=self.stale,
            dropped=dropped,
        )
        self._send(observer, Welcome(self._epoch))
        self._send(observer, status)

    def _announce(self, now: float) -> None:
        for peer in [*self._gateways, *self._supervisors]:
            self._send(peer, self._state(now))

    def _state(self, now: float) -> MeshState:
        scheduler = self._scheduler
        return MeshState(
            scheduler.ready and not scheduler.draining,
            self._reason,
            self._roster.num_ready,
            scheduler.layout.num_ranks,
            self._model,
            scheduler.losses.total,
            scheduler.draining,
            scheduler.losses.crash_loop(now),
            scheduler.backlog_s,
        )

    def _stop_when_drained(self, now: float) -> None:
        if self._scheduler.drained(now) and not self.stopped:
            self.stopped = True
            for rank in self._roster.ranks.values():
                self._send(rank.identity, Shutdown())

    def _send(self, peer: bytes, message: FromScheduler) -> bool:
        try:
            self._channel.send(message, to=peer)
        except PeerGone:
            return False
        return True
