"""Which ranks there are and how they fare: joined, ready, silent, late, left over from an earlier epoch. No sockets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.protocol import Fence, Heartbeat, WorkerHello
from runtime.running import Running

HEARTBEAT_LIMIT_S = 6.0
"""A ready rank that is silent for so long is taken for dead; it beats once a second from a thread of its own."""
OVERDUE_FACTOR, OVERDUE_S = 1.5, 8.0
"""An item whose length was measured before hangs after this many times its prediction and so many seconds more."""
UNMEASURED_FACTOR, UNMEASURED_S = 10.0, 120.0
"""The same for one whose length is only guessed: the guess may be far off, and its kernels are new to the rank."""
STRANGER_LIMIT_S = 30.0
"""A rank that beats but is not of the group, and does not join it in that time: it hangs in an item of an earlier
epoch, or belongs to a group that was given up."""


@dataclass
class Rank:
    """One that joined."""

    identity: bytes
    hello: WorkerHello
    last_seen: float
    ready: bool = False
    memory_budget: int = 0
    device_memory: int = 0
    peak_bytes: int = 0
    """Most memory that it held during its last item."""


@dataclass(frozen=True)
class Trouble:
    """Ranks that have to be killed, by host, and why."""

    reason: str
    fences: tuple[tuple[str, Fence], ...]
    culprit: tuple[int, str] | None = None
    """The item that brought them there, with its error's code, if one is known to."""


@dataclass
class Roster:
    """The worker group of one replica, one generation at a time."""

    size: int
    ranks: dict[int, Rank] = field(default_factory=dict)
    _generation: int = -1
    _strangers: dict[bytes, tuple[Heartbeat, float]] = field(default_factory=dict)
    """Ranks that live though they are not of this group: what they said first, and when."""

    @property
    def complete(self) -> bool:
        return len(self.ranks) == self.size and self.num_ready == self.size

    @property
    def num_ready(self) -> int:
        return sum(rank.ready for rank in self.ranks.values())

    @property
    def memory_budget(self) -> int:
        """Bytes that the poorest rank has for states; 0: not known."""
        return min(rank.memory_budget for rank in self.ranks.values())

    @property
    def device_memory(self) -> int:
        """Bytes in all of the smallest device; 0: not known."""
        return min(rank.device_memory for rank in self.ranks.values())

    @property
    def needs_watching(self) -> bool:
        return bool(self.ranks or self._strangers)

    def replaces(self, identity: bytes, hello: WorkerHello) -> bool:
        """Whether this rank belongs to a new group, so that the one that we know is gone."""
        # A torchrun that was started anew counts its generations from 0 again, but its ranks are new.
        known = self.ranks.get(hello.rank)
        return bool(self.ranks) and (
            hello.generation > self._generation or (known is not None and known.identity != identity)
        )

    def join(self, identity: bytes, hello: WorkerHello, now: float) -> bool:
        """False if it belongs to a group that is gone."""
        self._strangers.pop(identity, None)
        if self.ranks and hello.generation < self._generation:
            return False
        self._generation = hello.generation
        if hello.rank not in self.ranks:
            self.ranks[hello.rank] = Rank(identity, hello, now)
        return True

    def hear(self, identity: bytes, number: int, now: float) -> Rank | None:
        """The rank that says something, or None for one that is not of this group."""
        rank = self.ranks.get(number)
        # A heartbeat comes from the rank's thread, whose identity extends the rank's own.
        if rank is None or not identity.startswith(rank.identity):
            return None
        rank.last_seen = now
        return rank

    def hear_stranger(self, identity: bytes, beat: Heartbeat, now: float) -> None:
        """A heartbeat of a rank that is not of this group, `identity` being the rank's own."""
        if not any(rank.identity == identity for rank in self.ranks.values()):
            self._strangers.setdefault(identity, (beat, now))

    def trouble(self, running: Iterable[Running], now: float) -> Trouble | None:
        """A rank whose heartbeat stopped, or ranks that live but do not come to the end of an item."""
        for rank in self.ranks.values():
            if rank.ready and now - rank.last_seen > HEARTBEAT_LIMIT_S:
                return self._trouble([rank], f"was silent for {now - rank.last_seen:.1f} s")
        for item in running:
            # Whoever has failed alone leaves the others in a collective, however new their kernels are.
            known = item.measured or item.failure is not None
            factor, more_s = (OVERDUE_FACTOR, OVERDUE_S) if known else (UNMEASURED_FACTOR, UNMEASURED_S)
            if now - item.started > factor * item.predicted_s + more_s:
                late = [self.ranks[number] for number in sorted(item.waiting & self.ranks.keys())]
                what = f"is not done with an item of {item.predicted_s:.1f} s after {now - item.started:.1f} s"
                if item.failure is None:
                    return self._trouble(late, what)
                code, reason = item.failure
                return self._trouble(late, f"{what}, in which another failed: {reason}", (item.item.seq, code))
        return None

    def unreachable(self, number: int) -> Trouble:
        """A rank to which nothing can be sent. It may live on: for the others of its group it is as good as dead."""
        return self._trouble([self.ranks[number]], "is gone")

    def left_over(self, now: float) -> list[tuple[str, Fence]]:
        """Strangers that did not join in time, with their hosts."""
        stuck = [peer for peer, (_, since) in self._strangers.items() if now - since > STRANGER_LIMIT_S]
        beats = [self._strangers.pop(peer)[0] for peer in stuck]
        return [(beat.host, Fence(beat.rank, beat.pid, "it lives on in a group that is gone")) for beat in beats]

    def _trouble(self, ranks: list[Rank], what: str, culprit: tuple[int, str] | None = None) -> Trouble:
        reason = f"rank {', '.join(str(rank.hello.rank) for rank in ranks)} {what}"
        fences = tuple((r.hello.host, Fence(r.hello.rank, r.hello.pid, reason)) for r in ranks)
        return Trouble(reason, fences, culprit)
