"""Who runs next: a pure function of what it was told. No clock, no socket, no torch, no randomness.

Events go in (`submit`, `cancel`, `completed`, `failed`, `stored`, `group_ready`, `group_lost`), work items come out
of `plan(now)`, news for the gateways out of `take_news()`. The engine and the simulator drive this same class.

Requests join and leave a running batch at step boundaries, each at its own timestep. Between API keys the share is
fair; within a key the policy decides (runtime/fairness.py). Every item lasts about `item_seconds`, and whoever is first
when it ends runs next: that is all there is to pre-emption.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from runtime.batching import BatchLimits, batch_budget
from runtime.cost import CostModel
from runtime.fairness import FairShare, WaitingLine, order, turn
from runtime.layout import Layout
from runtime.memory import MemoryLedger
from runtime.models.card import Card
from runtime.predictions import Predictions
from runtime.protocol import (
    Cancelled,
    Completed,
    Decode,
    Denoise,
    Encode,
    Failed,
    Measurement,
    Progress,
    Release,
    Request,
    WorkItem,
)
from runtime.request import ACTIVE, ENDED, RequestRecord, Stage

ITEM_SECONDS = 0.1
"""An item lasts about this long by prediction: the bound for cancel and for another request's turn."""
MAX_ACTIVE = 64
"""Requests whose state the ranks hold at once, memory allowing."""

News = Progress | Completed | Failed | Cancelled
Waiting = dict[str, list[RequestRecord]]


@dataclass
class _Gateway:
    endpoint: str
    credits: int
    limit: int
    """Its credits when nothing is under way to it."""

    def give_back(self, credits: int) -> None:
        """Chunks that were consumed or that will never come. Some may be given back twice, so it ends at the limit."""
        self.credits = min(self.credits + credits, self.limit)


@dataclass
class Running:
    """An item that ranks work on."""

    item: Encode | Denoise | Decode
    started: float
    predicted_s: float
    waiting: set[int]
    seconds: float = 0.0
    failure: tuple[str, str] | None = None


@dataclass
class Scheduler:
    """The queue, the ranks and the policy of one replica."""

    card: Card
    layout: Layout
    cost: CostModel
    policy: str = "srpt"
    limits: BatchLimits = field(default_factory=BatchLimits)
    max_active: int = MAX_ACTIVE
    item_seconds: float = ITEM_SECONDS
    weights: dict[str, float] = field(default_factory=dict)
    """Shares of the API keys; 1 for a key that is not here."""
    draining: bool = False
    ready: bool = False
    memory: MemoryLedger = field(init=False)
    predictions: Predictions = field(init=False)
    running: dict[int, Running] = field(default_factory=dict)
    _requests: dict[str, RequestRecord] = field(default_factory=dict)
    _active: dict[str, RequestRecord] = field(default_factory=dict)
    _lines: dict[str, WaitingLine] = field(default_factory=dict)
    _joinable: dict[Hashable, dict[str, WaitingLine]] = field(default_factory=dict)
    """The same requests by the batch that their first step could join."""
    _fair: FairShare = field(init=False)
    _heirs: dict[str, RequestRecord] = field(default_factory=dict)
    """Requests that start again for another gateway as soon as the item that they are in is over."""
    _deadlines: list[tuple[float, str]] = field(default_factory=list)
    _gateways: dict[bytes, _Gateway] = field(default_factory=dict)
    _releases: list[str] = field(default_factory=list)
    _news: list[tuple[bytes, News]] = field(default_factory=list)
    _budget_changed: bool = False
    _groups: int = 0
    _seq: int = 0

    def __post_init__(self) -> None:
        self.memory = MemoryLedger(self.card)
        self.predictions = Predictions(self.cost, self.layout)
        self._fair = FairShare(self.weights)

    # ---- events ----------------------------------------------------------------------------------------------

    def gateway_joined(self, gateway: bytes, endpoint: str, credits: int) -> None:
        self._gateways[gateway] = _Gateway(endpoint, credits, credits)

    def gateway_lost(self, gateway: bytes, now: float) -> None:
        """Nobody is left to take the frames: its requests end."""
        if self._gateways.pop(gateway, None) is not None:
            for record in [r for r in self._requests.values() if self._heirs.get(r.id, r).gateway == gateway]:
                self.cancel(record.id, "its gateway is gone", now)

    def submit(self, gateway: bytes, requests: tuple[Request, ...], now: float) -> None:
        """Queue what arrived together. A known id changes nothing, unless it comes from another gateway."""
        self._groups += 1
        for request in requests:
            record = RequestRecord(request, gateway, now, self._groups)
            if request.id in self._requests:
                self._take_over(record, now)
            else:
                self._take(record, now)

    def cancel(self, request_id: str, reason: str, now: float) -> None:
        """Queued work ends now, running work when its item does."""
        record = self._requests.get(request_id)
        if record is None:
            return
        self._heirs.get(request_id, record).cancel_reason = reason
        if not record.running:
            self._end(record, Stage.CANCELLED, Cancelled(record.id, reason), now)

    def stored(self, request_id: str, now: float) -> None:
        """The gateway has all the frames; it may say so before the rank says that it sent the last."""
        record = self._requests.get(request_id)
        if record is not None and record.stage in {Stage.DECODE, Stage.DELIVER}:
            record.stored = True
            self._end_if_stored(record, now)

    def granted(self, gateway: bytes, credits: int) -> None:
        if gateway in self._gateways:
            self._gateways[gateway].give_back(credits)

    def completed(self, rank: int, seq: int, seconds: float, now: float) -> None:
        """A rank is done with an item; the item is over when all its ranks are."""
        running = self.running.get(seq)
        if running is None:
            return
        running.waiting.discard(rank)
        running.seconds = max(running.seconds, seconds)
        if not running.waiting:
            del self.running[seq]
            self._finish(running, now)

    def failed(self, rank: int, seq: int, code: str, reason: str, now: float) -> None:
        """A rank could not do its item, but the group lives: the item's requests end when all its ranks reported."""
        running = self.running.get(seq)
        if running is not None:
            running.failure = (code, reason)
            self.completed(rank, seq, 0.0, now)

    def calibrate(self, measurements: tuple[Measurement, ...]) -> None:
        """What the ranks measured while they warmed up."""
        for measured in measurements:
            self.cost.observe(measured.kind, measured.params, self.layout, 1, measured.seconds, measured.batch)

    def group_ready(self, memory_budget: int | None = None) -> None:
        """Every rank has the model; `memory_budget` is what the poorest of them has for states, bytes."""
        self.ready = True
        self.memory.budget = memory_budget
        self._budget_changed = True

    def group_lost(self, reason: str, now: float) -> None:
        """The ranks and every state they held are gone. What was active fails; what was queued waits."""
        self.ready = False
        self.running.clear()
        self._releases.clear()
        for gateway in self._gateways.values():
            # What was under way has arrived, or died with its rank.
            gateway.credits = gateway.limit
        for record in list(self._active.values()):
            record.running = False
            self._fail(record, "worker_lost", f"{reason} in {self._where(record)}", now)

    # ---- decisions -------------------------------------------------------------------------------------------

    def plan(self, now: float) -> list[WorkItem]:
        """Items to start now, in the one global order."""
        self._expire(now)
        self._refuse_too_large(now)
        items: list[WorkItem] = []
        if self._releases:
            items.append(Release(self._next_seq(), self._all_ranks(), tuple(self._releases)))
            self._releases.clear()
        # A rank waits for the others of its last item: whether that one failed decides what comes next.
        busy = {rank for running in self.running.values() for rank in running.item.ranks}
        free = [rank for rank in self._all_ranks() if rank not in busy]
        waiting = self._waiting(now) if self.ready and free else {}
        while waiting and free and (item := self._next_item(waiting, free, now)) is not None:
            predicted = self.predictions.seconds(item, next(self._records_of(item)).request.params)
            self._charge(item, predicted)
            self.running[item.seq] = Running(item, now, predicted, set(item.ranks))
            free = [rank for rank in free if rank not in item.ranks]
            for key in {record.key for record in self._records_of(item)} & waiting.keys():
                waiting[key] = [record for record in waiting[key] if not record.running]
                if not waiting[key]:
                    del waiting[key]
            items.append(item)
        return items

    def take_news(self) -> list[tuple[bytes, News]]:
        """(gateway, message) pairs since the last call."""
        news, self._news = self._news, []
        return news

    @property
    def idle(self) -> bool:
        return not self._requests and not self.running

    @property
    def requests(self) -> dict[str, RequestRecord]:
        """Every request that has not ended."""
        return self._requests

    def next_deadline(self) -> float | None:
        """When `plan` has to be called at the latest though nothing happened."""
        return self._deadlines[0][0] if self._deadlines else None

    def _next_item(self, waiting: Waiting, free: list[int], now: float) -> Encode | Denoise | Decode | None:
        self._fair.wait(set(waiting))
        admitting = True
        for record in self._in_turn(waiting):
            item: Encode | Denoise | Decode | None = None
            if record.stage is Stage.DECODE:
                item = self._plan_decode(record, free)
                if item is None:
                    continue
            elif record.stage is Stage.QUEUED and not (admitting and self._has_room(record)):
                # Whoever finds no room holds the door shut behind itself, or it would wait for ever.
                admitting = False
                continue
            elif len(free) < self.layout.num_ranks:
                # The whole mesh is due for this one: work for a single free rank would keep it waiting.
                return None
            elif record.stage is Stage.QUEUED:
                item = self._plan_encode(record, now)
            else:
                item = self._plan_denoise(record, waiting, admitting, now)
            self._fair.serve(record.key)
            return item
        return None

    def _waiting(self, now: float) -> Waiting:
        """Requests that could run, by key, in their turn; of those in line only each key's first."""
        waiting: Waiting = {}
        for record in self._active.values():
            if not record.running and self._wants_ranks(record):
                waiting.setdefault(record.key, []).append(record)
        for key, line in self._lines.items():
            waiting.setdefault(key, []).append(line.first(now))
        for records in waiting.values():
            if len(records) > 1:
                records.sort(key=lambda record: turn(record, self.policy, now))
        return waiting

    def _wants_ranks(self, record: RequestRecord) -> bool:
        if record.stage is Stage.DECODE:
            return self._gateways[record.gateway].credits > 0
        return record.stage is not Stage.DELIVER

    def _in_turn(self, waiting: Waiting) -> Iterator[RequestRecord]:
        """First the key that is furthest behind."""
        keys = [(self._fair.clocks[key], key) for key in waiting]
        heapq.heapify(keys)
        while keys:
            _, key = heapq.heappop(keys)
            yield from waiting[key]

    def _has_room(self, record: RequestRecord) -> bool:
        return len(self._active) < self.max_active and self.memory.admits(record)

    def _plan_encode(self, first: RequestRecord, now: float) -> Encode:
        """The first in line, with what was submitted together with it."""
        group = (record for record in self._lines[first.key] if record.group == first.group and record is not first)
        return self._encode(chain([first], group), self.max_active, now)

    def _plan_denoise(self, first: RequestRecord, waiting: Waiting, admitting: bool, now: float) -> Encode | Denoise:
        """A batch around the first; whoever could join it from the line is encoded before, if the door is open."""
        params = first.request.params
        key = self.card.batch_key(params, first.step)
        budget = batch_budget(self.cost, self.limits, params, self.layout)
        batch = [first]
        if budget > 1:
            keys = self._sharing(first, key, waiting)
            shared = [r for k in keys for r in waiting[k] if r is not first and self._fits(r, key)]
            batch += [r for r in shared if r.stage is Stage.DENOISE][: budget - 1]
            lines = self._joinable.get(key, {})
            keys = [k for k in keys if k in lines]
            joining = next((r for k in keys for r in lines[k]), None) if admitting and len(batch) < budget else None
            if joining is not None and self._has_room(joining):
                return self._encode(chain.from_iterable(lines[k] for k in keys), budget - len(batch), now)
        left = min(record.total_steps - record.step for record in batch)
        steps = self._units(self.cost.predict("denoise", params, self.layout, len(batch)), left)
        for record in batch:
            record.running = True
        return Denoise(self._next_seq(), self._all_ranks(), self.layout, tuple(r.id for r in batch), steps)

    def _fits(self, record: RequestRecord, key: Hashable) -> bool:
        if record.stage is Stage.DENOISE:
            return self.card.batch_key(record.request.params, record.step) == key
        return record.stage is Stage.QUEUED and record.batch_key == key

    def _sharing(self, first: RequestRecord, key: Hashable, waiting: Waiting) -> list[str]:
        """Keys that may share the first one's batch: those whose own first could, or they would be served past it, and
        that are at most an item further ahead than a key that cannot and has to wait for the batch."""
        clocks = self._fair.clocks
        can = [k for k in waiting if k == first.key or self._fits(waiting[k][0], key)]
        kept_waiting = min((clocks[k] for k in waiting.keys() - set(can)), default=math.inf)
        # Whoever is behind the first has no room yet; it gains if all share while it waits.
        ceiling = max(kept_waiting, clocks[first.key]) + self.item_seconds * self.layout.num_ranks
        return sorted((k for k in can if clocks[k] <= ceiling), key=lambda k: (clocks[k], k))

    def _encode(self, candidates: Iterable[RequestRecord], most: int, now: float) -> Encode:
        """From the line into the ranks' memory, as many as find room and an item lasts; the first of them does."""
        first, *others = islice(candidates, min(most, self.max_active))
        most = self._units(self.cost.predict("encode", first.request.params, self.layout), most)
        entered: list[Request] = []
        for record in [first, *others]:
            if len(entered) < most and self._has_room(record):
                self._leave_line(record)
                self._active[record.id] = record
                self.memory.enter(record)
                record.move(Stage.ENCODE, now)
                record.running = True
                self._report(record)
                entered.append(record.request)
        return Encode(self._next_seq(), self._all_ranks(), tuple(entered))

    def _plan_decode(self, record: RequestRecord, free: list[int]) -> Decode | None:
        """The next chunks, on the rank where the decode is open, or on a free one with room for it."""
        gateway = self._gateways[record.gateway]
        if gateway.credits < 1:
            return None
        if record.decode_rank is None:
            # If the rank with the most room has too little, every other has.
            rank = min(free, key=self.memory.held)
            if self.memory.budget is None:
                rank = next((r for r in free if self.memory.may_open_decode(record, r)), rank)
            if not self.memory.may_open_decode(record, rank):
                return None
            record.decode_rank = rank
            self.memory.open_decode(record, rank)
        elif record.decode_rank not in free:
            return None
        seconds = self.cost.predict("decode", record.request.params, self.layout)
        # The first chunk goes alone, so that the first frame does not wait for its neighbours.
        chunks = 1 if record.chunk == 0 else self._units(seconds, record.total_chunks - record.chunk)
        chunks = min(chunks, gateway.credits)
        gateway.credits -= chunks
        record.running = True
        return Decode(self._next_seq(), (record.decode_rank,), record.id, chunks, gateway.endpoint)

    def _units(self, seconds: float, left: int) -> int:
        return max(1, min(left, round(self.item_seconds / seconds)))

    def _charge(self, item: Encode | Denoise | Decode, seconds: float) -> None:
        """Book the item's predicted rank-seconds on its requests' keys."""
        records = list(self._records_of(item))
        for record in records:
            self._fair.charge(record.key, seconds * len(item.ranks) / len(records))

    def _expire(self, now: float) -> None:
        """Requests past their timeout end, running ones when their item does."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            record = self._requests.get(request_id)
            # The id may have ended and started again since.
            if record is not None and record.deadline <= now and record.cancel_reason is None:
                timeout = record.request.timeout_s
                self.cancel(request_id, f"its timeout of {timeout:g} s passed in {self._where(record)}", now)

    def _refuse_too_large(self, now: float) -> None:
        """What was taken before the ranks told their budget, and does not fit it, would wait for ever."""
        if not self._budget_changed:
            return
        self._budget_changed = False
        for record in [r for r in self._requests.values() if r.stage is Stage.QUEUED]:
            too_large = self.memory.refusal(record)
            if too_large is not None:
                self._fail(record, "out_of_memory", too_large, now)

    # ---- bookkeeping -----------------------------------------------------------------------------------------

    def _take(self, record: RequestRecord, now: float) -> None:
        """A new request: into its key's line, or refused."""
        self._requests[record.id] = record
        record.total_chunks = len(self.card.decode_chunks(record.request.params))
        record.batch_key = self.card.batch_key(record.request.params, 0)
        record.remaining_s = self.predictions.remaining(record)
        self.memory.measure(record)
        if record.cancel_reason is not None:
            self._end(record, Stage.CANCELLED, Cancelled(record.id, record.cancel_reason), now)
            return
        refusal = self._refusal(record)
        if refusal is not None:
            self._fail(record, *refusal, now)
            return
        if record.request.timeout_s is not None:
            heapq.heappush(self._deadlines, (record.deadline, record.id))
        self._lines.setdefault(record.key, WaitingLine(self.policy)).add(record)
        self._joinable.setdefault(record.batch_key, {}).setdefault(record.key, WaitingLine(self.policy)).add(record)
        self._report(record)

    def _take_over(self, heir: RequestRecord, now: float) -> None:
        """A gateway that was started anew hands in the jobs that it still owes: what runs for the old one ends unheard
        and starts again. From the same gateway, or from one that was given up, it is the same request again."""
        record = self._requests[heir.id]
        if heir.gateway == self._heirs.get(heir.id, record).gateway or heir.gateway not in self._gateways:
            return
        self._heirs[heir.id] = heir
        record.cancel_reason = "another gateway took it over"
        if not record.running:
            self._end(record, Stage.CANCELLED, Cancelled(record.id, record.cancel_reason), now)

    def _refusal(self, record: RequestRecord) -> tuple[str, str] | None:
        """(code, reason) for what cannot be taken."""
        if self.draining:
            return "draining", "the server is shutting down and takes no new work"
        if record.gateway not in self._gateways:
            return "gateway_lost", "its gateway was given up; nobody would take the frames"
        too_large = self.memory.refusal(record)
        return ("out_of_memory", too_large) if too_large is not None else None

    def _leave_line(self, record: RequestRecord) -> None:
        joinable = self._joinable[record.batch_key]
        for lines in (self._lines, joinable):
            lines[record.key].remove(record)
            if not len(lines[record.key]):
                del lines[record.key]
        if not joinable:
            del self._joinable[record.batch_key]

    def _finish(self, running: Running, now: float) -> None:
        item = running.item
        records = list(self._records_of(item))
        if running.failure is None and records:
            self.predictions.observe(item, records[0].request.params, running.seconds)
        for record in records:
            record.running = False
            if running.failure is not None:
                if isinstance(item, Decode) and record.gateway in self._gateways:
                    self._gateways[record.gateway].give_back(item.chunks)
                self._fail(record, *running.failure, now)
            elif record.cancel_reason is not None:
                self._end(record, Stage.CANCELLED, Cancelled(record.id, record.cancel_reason), now)
            else:
                self._advance(record, item, now)
                self._report(record)
                self._end_if_stored(record, now)

    def _advance(self, record: RequestRecord, item: Encode | Denoise | Decode, now: float) -> None:
        match item:
            case Encode():
                record.move(Stage.DENOISE, now)
            case Denoise():
                record.step += item.steps
                if record.step == record.total_steps:
                    record.move(Stage.DECODE, now)
            case Decode():
                record.chunk += item.chunks
                if record.chunk == record.total_chunks:
                    self.memory.close_decode(record)
                    record.move(Stage.DELIVER, now)
        record.remaining_s = self.predictions.remaining(record)

    def _records_of(self, item: Encode | Denoise | Decode) -> Iterator[RequestRecord]:
        match item:
            case Encode():
                ids = tuple(request.id for request in item.requests)
            case Denoise():
                ids = item.request_ids
            case Decode():
                ids = (item.request_id,)
        return (self._requests[request_id] for request_id in ids if request_id in self._requests)

    def _end_if_stored(self, record: RequestRecord, now: float) -> None:
        if record.stored and record.stage is Stage.DELIVER:
            self._end(record, Stage.COMPLETED, Completed(record.id, record.timings(now)), now)

    def _fail(self, record: RequestRecord, code: str, reason: str, now: float) -> None:
        self._end(record, Stage.FAILED, Failed(record.id, code, reason), now)

    def _end(self, record: RequestRecord, stage: Stage, news: News, now: float) -> None:
        assert stage in ENDED
        if record.key in self._lines and record in self._lines[record.key]:
            self._leave_line(record)
        if record.stage in ACTIVE:
            del self._active[record.id]
            self.memory.leave(record)
            if self.ready:
                self._releases.append(record.id)
        record.move(stage, now)
        del self._requests[record.id]
        heir = self._heirs.pop(record.id, None)
        if heir is None:
            self._news.append((record.gateway, news))
        else:
            self._take(heir, now)

    def _report(self, record: RequestRecord) -> None:
        done, total = record.step, record.total_steps
        if record.stage in {Stage.DECODE, Stage.DELIVER}:
            done, total = record.chunk, record.total_chunks
        position, eta = self.outlook(record)
        self._news.append((record.gateway, Progress(record.id, str(record.stage), done, total, eta, position)))

    def _stretch(self, record: RequestRecord, wanted: int, budget: int) -> float:
        """How many times longer a step takes when so many want to share it than alone."""
        params = record.request.params
        batch = min(wanted, budget)
        alone = self.cost.predict("denoise", params, self.layout)
        return self.cost.predict("denoise", params, self.layout, batch) / alone * wanted / batch

    def outlook(self, record: RequestRecord) -> tuple[int, float]:
        """(place in its key's line, predicted seconds until its last frame if nothing else arrives)."""
        mine = order(record, self.policy)
        queued = record.stage is Stage.QUEUED
        others = [r for r in self._active.values() if r is not record]
        # Whoever shares its forwards makes them slower, but does not run before it.
        budget = batch_budget(self.cost, self.limits, record.request.params, self.layout)
        alike = (r for r in others if r.batch_key == record.batch_key and r.stage in {Stage.ENCODE, Stage.DENOISE})
        mates = {r.id for r in alike} if budget > 1 else set()
        rivals = (r for r in others if r.id not in mates and (queued or order(r, self.policy) < mine))
        eta = record.remaining_s * self._stretch(record, 1 + len(mates), budget) + sum(r.remaining_s for r in rivals)
        if not queued:
            return 0, eta
        position, before_s = self._lines[record.key].ahead_of(record)
        # The other keys' lines take their turns in between.
        return position, eta + before_s * len(self._lines)

    def _where(self, record: RequestRecord) -> str:
        if record.stage is Stage.DENOISE:
            return f"denoising, after step {record.step} of {record.total_steps}"
        if record.stage is Stage.DECODE:
            return f"decoding, after chunk {record.chunk} of {record.total_chunks}"
        return f"the {record.stage} stage"

    def _all_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.layout.num_ranks))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq
