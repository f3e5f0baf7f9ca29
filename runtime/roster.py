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
STRANGER_LIMIT_S = 30.0
"""A rank that beats for an earlier epoch, and does not join this one in that time, hangs in an item of the earlier."""


@dataclass
class Rank:
    """One that joined."""

    identity: bytes
    hello: WorkerHello
    last_seen: float
    ready: bool = False
    memory_budget: int = 0
    peak_bytes: int = 0
    """Most memory that it held during its last item."""


@dataclass(frozen=True)
class Trouble:
    """Ranks that have to be killed, by host, and why."""

    reason: str
    fences: tuple[tuple[str, Fence], ...]


@dataclass
class Roster:
    """The worker group of one replica, one generation at a time."""

    size: int
    ranks: dict[int, Rank] = field(default_factory=dict)
    _generation: int = -1
    _strangers: dict[bytes, tuple[Heartbeat, float]] = field(default_factory=dict)
    """Ranks that still work for an earlier epoch: what they said first, and when."""

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
        """A heartbeat for an earlier epoch."""
        if not any(rank.identity == identity for rank in self.ranks.values()):
            self._strangers.setdefault(identity, (beat, now))

    def trouble(self, running: Iterable[Running], now: float) -> Trouble | None:
        """A rank whose heartbeat stopped, or ranks that live but do not come to the end of an item."""
        for rank in self.ranks.values():
            if rank.ready and now - rank.last_seen > HEARTBEAT_LIMIT_S:
                return self._trouble([rank], f"was silent for {now - rank.last_seen:.1f} s")
        for item in running:
            limit = OVERDUE_FACTOR * item.predicted_s + OVERDUE_S
            if item.measured and now - item.started > limit:
                late = [self.ranks[number] for number in sorted(item.waiting & self.ranks.keys())]
                what = f"an item of {item.predicted_s:.1f} s"
                return self._trouble(late, f"is not done with {what} after {now - item.started:.1f} s")
        return None

    def left_over(self, now: float) -> list[tuple[str, Fence]]:
        """Strangers that did not join in time, with their hosts."""
        stuck = [peer for peer, (_, since) in self._strangers.items() if now - since > STRANGER_LIMIT_S]
        beats = [self._strangers.pop(peer)[0] for peer in stuck]
        return [(beat.host, Fence(beat.rank, beat.pid, "it hangs in an item of an earlier epoch")) for beat in beats]

    def _trouble(self, ranks: list[Rank], what: str) -> Trouble:
        reason = f"rank {', '.join(str(rank.hello.rank) for rank in ranks)} {what}"
        return Trouble(reason, tuple((r.hello.host, Fence(r.hello.rank, r.hello.pid, reason)) for r in ranks))
