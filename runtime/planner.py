"""What runs next: chooses and changes nothing. No time but what it is given; the scheduler does what it chose."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain, islice

from runtime.batching import BatchLimits, batch_budget
from runtime.fairness import turn
from runtime.gateways import Gateways
from runtime.memory import MemoryLedger
from runtime.models.card import Card
from runtime.predictions import Predictions, text_of
from runtime.queue import Queue
from runtime.request import RequestRecord, Stage

Waiting = dict[str, list[RequestRecord]]

MOST_TOGETHER = 16
"""Requests of an encode item, be their texts equal: the noise of each is drawn."""


@dataclass(frozen=True)
class Enter:
    """Requests leave the line for the ranks' memory."""

    turn: RequestRecord
    """Whose turn it is; its key is served, whoever shares the item."""
    records: tuple[RequestRecord, ...]


@dataclass(frozen=True)
class Step:
    """Requests share denoising steps."""

    turn: RequestRecord
    records: tuple[RequestRecord, ...]
    steps: int


@dataclass(frozen=True)
class Emit:
    """One request's next chunks of frames, on the rank that holds its decode or is to open it."""

    turn: RequestRecord
    rank: int
    chunks: int


Choice = Enter | Step | Emit


@dataclass(frozen=True)
class _Door:
    """Who may enter the ranks' memory, as far as that has room."""

    slots: int
    shut: Set[bytes]
    """Gateways that have so many requests waiting for themselves that they get no more."""
    waived: bool
    """A key that has nothing inside needs no slot."""
    inside: Set[str]
    """Keys of those who are in."""

    def has_slot(self, record: RequestRecord, beside: Sequence[RequestRecord]) -> bool:
        """Whether it may enter after those that enter with it, as far as their number goes."""
        newcomer = record.key not in self.inside and all(other.key != record.key for other in beside)
        return len(beside) < self.slots or (self.waived and newcomer)


@dataclass(frozen=True)
class Planner:
    """The policy of one replica, over what the scheduler knows."""

    card: Card
    predictions: Predictions
    limits: BatchLimits
    policy: str
    max_active: int
    """Requests whose state the ranks hold at once. It binds a key only from its second request on, where the memory is
    known and bounds them anyway: a short one would wait for as many others to end. Those are left out that wait for
    their gateway: one that is slow to store would keep out all others. It may have a quarter as many waiting for itself
    before its own stay out."""
    item_seconds: float
    decode_on_all: bool
    active: Mapping[str, RequestRecord]
    queue: Queue
    clocks: Mapping[str, float]
    """Of every key that waits."""
    gateways: Gateways
    memory: MemoryLedger
    batch_caps: Mapping[Hashable, int]
    """The most that may share a forward, where more ran out of memory."""

    def waiting(self, now: float) -> Waiting:
        """Requests that could run, by key, in their turn; of those in line only each key's first."""
        waiting: Waiting = {}
        for record in self.active.values():
            if not record.running and not self._waits_for_gateway(record):
                waiting.setdefault(record.key, []).append(record)
        for record in self.queue.firsts(now, self._door().shut):
            waiting.setdefault(record.key, []).append(record)
        for records in waiting.values():
            if len(records) > 1:
                records.sort(key=lambda record: turn(record, self.policy, now))
        return waiting

    def choose(self, waiting: Waiting, free: list[int]) -> Choice | None:
        """The next item for these ranks; None if they have to stay idle."""
        door, admitting = self._door(), True
        for record in self._in_turn(waiting):
            if record.stage is Stage.QUEUED and not (admitting and self._has_room(record, door)):
                # Whoever finds no room holds the door shut behind itself, or it would wait for ever.
                admitting = False
                continue
            on_all = record.alone or record.stage is not Stage.DECODE or self.decode_on_all
            if on_all and len(free) < self.predictions.layout.num_ranks:
                # The whole mesh is due for this one: work for a single free rank would keep it waiting.
                return None
            if record.stage is Stage.QUEUED:
                return self._enter(record, self._together(record), self.max_active, door)
            if record.stage is not Stage.DECODE:
                return self._step(record, waiting, door if admitting else None)
            emit = self._emit(record, free)
            if emit is not None:
                return emit
        return None

    def _waits_for_gateway(self, record: RequestRecord) -> bool:
        """For room for its frames, or for the word that they are stored."""
        if record.stage is Stage.DECODE:
            return not record.running and self.gateways.credits(record.gateway) < 1
        return record.stage is Stage.DELIVER

    def _door(self) -> _Door:
        stalled = Counter(record.gateway for record in self.active.values() if self._waits_for_gateway(record))
        slots = self.max_active - len(self.active) + stalled.total()
        shut = {gateway for gateway, count in stalled.items() if count * 4 >= self.max_active}
        # One at a time means one at a time.
        waived = slots <= 0 and self.max_active > 1 and self.memory.budget is not None
        return _Door(slots, shut, waived, {record.key for record in self.active.values()} if waived else set())

    def _in_turn(self, waiting: Waiting) -> Iterator[RequestRecord]:
        """First the key that is furthest behind."""
        keys = [(self.clocks[key], key) for key in waiting]
        heapq.heapify(keys)
        while keys:
            _, key = heapq.heappop(keys)
            yield from waiting[key]

    def _has_room(self, record: RequestRecord, door: _Door, beside: Sequence[RequestRecord] = ()) -> bool:
        """Whether it may enter, after those that enter with it."""
        return door.has_slot(record, beside) and record.gateway not in door.shut and self.memory.admits(record, beside)

    def _together(self, first: RequestRecord) -> Iterator[RequestRecord]:
        """The first in line, then what was submitted together with it."""
        line = self.queue.line(first.key)
        return chain([first], (r for r in line if r.group == first.group and r is not first))

    def _enter(self, turn: RequestRecord, candidates: Iterable[RequestRecord], most: int, door: _Door) -> Enter:
        """As many as find room and an item lasts; the first of them does. One text is encoded once, however many
        want it, but for `MOST_TOGETHER`."""
        first, *others = candidates
        max_texts = self._units(self.predictions.unit("encode", first.request.params), most)
        chosen, texts = [first], {text_of(first.request)}
        for record in others:
            if len(chosen) == min(most, MOST_TOGETHER):
                break
            wanted = texts | {text_of(record.request)}
            if len(wanted) <= max_texts and self._has_room(record, door, chosen):
                chosen.append(record)
                texts = wanted
        for record in self._of_equal_text(chosen):
            if len(chosen) < MOST_TOGETHER and self._has_room(record, door, chosen):
                chosen.append(record)
        return Enter(turn, tuple(chosen))

    def _of_equal_text(self, chosen: Sequence[RequestRecord]) -> list[RequestRecord]:
        """Others that were submitted together with one of these and have its text."""
        groups, ids = {record.group for record in chosen}, {record.id for record in chosen}
        texts = {(record.group, text_of(record.request)) for record in chosen}
        lines = chain.from_iterable(self.queue.line(key) for key in {record.key: None for record in chosen})
        mates = [record for record in lines if record.group in groups and record.id not in ids]
        return [record for record in mates if (record.group, text_of(record.request)) in texts]

    def _step(self, first: RequestRecord, waiting: Waiting, door: _Door | None) -> Enter | Step:
        """A batch around the first; whoever could join it from the line is encoded before, if there is a door."""
        params = first.request.params
        key = self.card.batch_key(params, first.step)
        budget = self._batch_budget(first, key)
        batch = [first]
        if budget > 1:
            keys = self._sharing(first, key, waiting)
            shared = [r for k in keys for r in waiting[k] if r is not first and self._fits(r, key)]
            batch += [r for r in shared if r.stage is Stage.DENOISE][: budget - 1]
            enter = self._join(first, key, keys, budget - len(batch), door) if door is not None else None
            if enter is not None:
                return enter
        left = min(record.next_stop - record.step for record in batch)
        return Step(first, tuple(batch), self._units(self.predictions.unit("denoise", params, len(batch)), left))

    def _join(self, first: RequestRecord, key: Hashable, keys: list[str], most: int, door: _Door) -> Enter | None:
        """Those in these keys' lines that could share the batch of the first."""
        lines = self.queue.joinable(key)
        could = (r for k in keys if k in lines for r in lines[k] if r.gateway not in door.shut)
        candidates = list(islice(could, most))
        if not candidates or not self._has_room(candidates[0], door):
            return None
        return self._enter(first, candidates, most, door)

    def _batch_budget(self, first: RequestRecord, key: Hashable) -> int:
        if first.alone:
            return 1
        params = first.request.params
        layout = self.predictions.runs_on("denoise", params)
        budget = batch_budget(self.predictions.cost, self.limits, params, layout)
        return min(budget, self.batch_caps.get(key, budget))

    def _fits(self, record: RequestRecord, key: Hashable) -> bool:
        if record.alone:
            return False
        if record.stage is Stage.DENOISE:
            return self.card.batch_key(record.request.params, record.step) == key
        return record.stage is Stage.QUEUED and record.batch_key == key

    def _sharing(self, first: RequestRecord, key: Hashable, waiting: Waiting) -> list[str]:
        """Keys that may share the first one's batch: those whose own first could, or they would be served past it, and
        that are at most an item further ahead than a key that has to wait for the batch: it cannot share, or is still
        in line."""
        clocks = self.clocks
        can = [k for k in waiting if k == first.key or self._fits(waiting[k][0], key)]
        sharing = {k for k in can if waiting[k][0].stage is Stage.DENOISE}
        kept_waiting = min((clocks[k] for k in waiting.keys() - sharing), default=math.inf)
        # Whoever is behind the first has no room yet; it gains if all share while it waits.
        ceiling = max(kept_waiting, clocks[first.key]) + self.item_seconds * self.predictions.layout.num_ranks
        return sorted((k for k in can if clocks[k] <= ceiling), key=lambda k: (clocks[k], k))

    def _emit(self, record: RequestRecord, free: list[int]) -> Emit | None:
        """The next chunks, on the rank where the decode is open, or on a free one with room for it.

        A decode on all ranks is booked on the first: no other holds more.
        """
        credits = self.gateways.credits(record.gateway)
        if credits < 1:
            return None
        rank = record.decode_rank if record.decode_rank is not None else self._rank_for(record, free)
        if rank not in free:
            return None
        # The first chunk goes alone, so that the first frame does not wait for its neighbours.
        chunks = 1
        if record.chunk > 0:
            seconds = self.predictions.unit("decode", record.request.params)
            chunks = min(self._units(seconds, record.total_chunks - record.chunk), credits)
        return Emit(record, rank, chunks)

    def _rank_for(self, record: RequestRecord, free: list[int]) -> int | None:
        """Where a decode may be opened."""
        # If the rank with the most room has too little, every other has.
        rank = free[0] if self.decode_on_all else min(free, key=self.memory.held)
        if self.memory.budget is None and not self.decode_on_all:
            rank = next((r for r in free if self.memory.may_open_decode(record, r)), rank)
        return rank if self.memory.may_open_decode(record, rank) else None

    def _units(self, seconds: float, left: int) -> int:
        return max(1, min(left, round(self.item_seconds / seconds)))
