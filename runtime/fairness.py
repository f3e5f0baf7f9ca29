"""Whose turn it is: weighted virtual time per API key, and each key's waiting requests in order. Knows no ranks.

Start-time fair queuing (Goyal, Vin, Cheng, 1996): a key's clock advances by the predicted rank-seconds that it was
given; the key that is furthest behind goes first; a key that had nothing to run comes back at the present.

What that bounds (tests/test_properties.py holds it, with batches, weights, priorities, tight memory and losses):

* Lag. No item goes to a key that is more than an item (`item_seconds` times ranks, over its weight) ahead of another
  that could run instead. One exception: others may join a batch, for as many encodes as it has places, before the next
  step of those in it, however far ahead they are.
* Wait. From PATIENCE_S + R / AGEING seconds after its arrival a request of R predicted seconds is the first of its key,
  whoever comes with which priority (fifo: from its arrival on). Then it waits for the work left of those that hold the
  ranks' memory, for what its key is ahead of the others, for one more request that another key may get in before it,
  and for its own R seconds; all that once per key that has work, and again after each loss of the workers.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from runtime.request import RequestRecord

AGEING = 0.05
"""Seconds of predicted work that each second of waiting forgives: a request of R seconds waits at most about R / AGEING
for a stream of shorter ones."""
URGENT_S = 1.0
"""A request that must start within this many seconds to meet its deadline goes before all that have time; so does one
that is late by no more: predictions are not that exact."""

PATIENCE_S = 600.0
"""A request that has waited so long, and R / AGEING for its own R seconds, goes before every priority of its key."""
MANY_KEYS = 1000
"""Clocks are forgotten when there are so many more than twice those of the keys that wait."""

Rank = tuple[float, float, float]


@dataclass
class WaitingLine:
    """One key's queued requests in the policy's order.

    The order does not depend on the present: ageing and slack change for all by the same amount, so a sorted list
    stays sorted.
    """

    policy: str
    _entries: list[tuple[Rank, str]] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    """Predicted work of each entry."""
    _records: dict[str, tuple[Rank, RequestRecord]] = field(default_factory=dict)
    _by_slack: list[tuple[float, str]] = field(default_factory=list)
    """(latest start, id) of those with a deadline."""
    _by_patience: list[tuple[float, str]] = field(default_factory=list)
    """(when it has waited too long, id)."""

    def add(self, record: RequestRecord) -> None:
        rank = order(record, self.policy)
        place = bisect.bisect_left(self._entries, (rank, record.id))
        self._entries.insert(place, (rank, record.id))
        self._seconds.insert(place, record.remaining_s)
        self._records[record.id] = (rank, record)
        if record.deadline < math.inf:
            bisect.insort(self._by_slack, (record.deadline - record.remaining_s, record.id))
        bisect.insort(self._by_patience, (patient_until(record), record.id))

    def remove(self, record: RequestRecord) -> None:
        rank, _ = self._records.pop(record.id)
        place = bisect.bisect_left(self._entries, (rank, record.id))
        del self._entries[place], self._seconds[place]
        if record.deadline < math.inf:
            self._by_slack.remove((record.deadline - record.remaining_s, record.id))
        self._by_patience.remove((patient_until(record), record.id))

    def first(self, now: float, shut: Set[bytes] = frozenset()) -> RequestRecord | None:
        """Whoever has waited too long; else whoever has to start now to meet its deadline, but priority goes before
        that; else the policy's first. Nobody whose gateway is shut out."""
        oldest = next((entry for entry in self._by_patience if self._may_go(entry[1], shut)), None)
        if oldest is None:
            return None
        if oldest[0] <= now and self.policy != "fifo":
            return self._records[oldest[1]][1]
        head = next(self._records[name][1] for _, name in self._entries if self._may_go(name, shut))
        if self.policy == "srpt":
            place = bisect.bisect_right(self._by_slack, (now - URGENT_S, ""))
            for latest_start, request_id in self._by_slack[place:]:
                if latest_start >= now + URGENT_S:
                    break
                record = self._records[request_id][1]
                if record.request.priority == head.request.priority and record.gateway not in shut:
                    return record
        return head

    def _may_go(self, request_id: str, shut: Set[bytes]) -> bool:
        return self._records[request_id][1].gateway not in shut

    def ahead_of(self, record: RequestRecord) -> tuple[int, float]:
        """(its place, 1 for the first; predicted seconds of work before it)."""
        rank, _ = self._records[record.id]
        place = bisect.bisect_left(self._entries, (rank, record.id))
        return place + 1, sum(self._seconds[:place])

    def __iter__(self) -> Iterator[RequestRecord]:
        return (self._records[request_id][1] for _, request_id in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, record: object) -> bool:
        return isinstance(record, RequestRecord) and record.id in self._records


def order(record: RequestRecord, policy: str) -> Rank:
    """Smaller goes first; within a key. `remaining_s` and `arrived` make it independent of the present.

    fifo: arrival. srpt: priority, then least remaining work, aged. deadline: priority, then least slack, then srpt.
    """
    if policy == "fifo":
        return (0.0, 0.0, record.arrived)
    aged = record.remaining_s + AGEING * record.arrived
    slack = record.deadline - record.remaining_s if policy == "deadline" else 0.0
    return (-float(record.request.priority), slack, aged)


def patient_until(record: RequestRecord) -> float:
    """From then on it goes first: no stream of higher priorities or shorter requests keeps it waiting for ever."""
    return record.arrived + PATIENCE_S + record.remaining_s / AGEING


def turn(record: RequestRecord, policy: str, now: float) -> Rank:
    """`order` at the present: whoever has waited too long goes first, under srpt, within a priority, whoever has to
    start now."""
    if patient_until(record) <= now and policy != "fifo":
        return (-math.inf, 0.0, patient_until(record))
    priority, slack, aged = order(record, policy)
    if policy == "srpt" and abs(record.deadline - record.remaining_s - now) < URGENT_S:
        return (priority, -1.0, record.deadline - record.remaining_s)
    return (priority, slack, aged)


@dataclass
class FairShare:
    """The clocks of all keys."""

    weights: dict[str, float] = field(default_factory=dict)
    """A key of weight 2 is given twice the service of one of weight 1, which is the default."""
    clocks: dict[str, float] = field(default_factory=dict)
    _waiting: Set[str] = frozenset()
    _present: float = 0.0
    """The clock of whoever was served last, before its item."""

    def wait(self, keys: Set[str]) -> None:
        """All keys that could run something now. One that could not before gets no credit for that time: it was away,
        or all that it had was running, or its gateway took no frames."""
        for key in keys - self._waiting:
            self.clocks[key] = max(self.clocks.get(key, 0.0), self._present)
        self._waiting = keys
        if len(self.clocks) > MANY_KEYS + 2 * len(keys):
            # Whoever is away and not ahead comes back at the present, known or not.
            for key in [k for k, clock in self.clocks.items() if clock <= self._present and k not in keys]:
                del self.clocks[key]

    def serve(self, key: str) -> None:
        """It is this key's turn."""
        self._present = max(self._present, self.clocks[key])

    def charge(self, key: str, rank_seconds: float) -> None:
        self.clocks[key] = self.clocks.get(key, self._present) + rank_seconds / self.weights.get(key, 1.0)
