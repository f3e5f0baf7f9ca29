"""Who runs next: a pure function of what it was told. No clock, no socket, no torch, no randomness.

Events go in (`submit`, `cancel`, `completed`, `failed`, `stored`, `group_ready`, `group_lost`), work items come out
of `plan(now)`, news for the gateways out of `take_news()`. The engine and the simulator drive this same class.

Requests join and leave a running batch at step boundaries, each at its own timestep. Between API keys the share is
fair; within a key the policy decides (runtime/fairness.py). Every item lasts about `item_seconds`, and whoever is first
when it ends runs next: that is all there is to pre-emption.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from runtime.batching import BatchLimits, batch_budget
from runtime.cost import CostModel
from runtime.fairness import FairShare, WaitingLine, order
from runtime.layout import Layout
from runtime.memory import MemoryLedger
from runtime.models.card import Card
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
    draining: bool = False
    ready: bool = False
    memory: MemoryLedger = field(init=False)
    running: dict[int, Running] = field(default_factory=dict)
    _requests: dict[str, RequestRecord] = field(default_factory=dict)
    _active: dict[str, RequestRecord] = field(default_factory=dict)
    _lines: dict[str, WaitingLine] = field(default_factory=dict)
    _fair: FairShare = field(default_factory=FairShare)
    _joinable: dict[Hashable, dict[str, RequestRecord]] = field(default_factory=dict)
    """Queued requests by the batch that their first step could join."""
    _deadlines: list[tuple[float, str]] = field(default_factory=list)
    _gateways: dict[bytes, _Gateway] = field(default_factory=dict)
    _releases: list[str] = field(default_factory=list)
    _news: list[tuple[bytes, News]] = field(default_factory=list)
    _groups: int = 0
    _seq: int = 0

    def __post_init__(self) -> None:
        self.memory = MemoryLedger(self.card)

    # ---- events ----------------------------------------------------------------------------------------------

    def gateway_joined(self, gateway: bytes, endpoint: str, credits: int) -> None:
        self._gateways[gateway] = _Gateway(endpoint, credits, credits)

    def gateway_lost(self, gateway: bytes, now: float) -> None:
        """Nobody is left to take the frames: its requests end."""
        if self._gateways.pop(gateway, None) is not None:
            for record in [r for r in self._requests.values() if r.gateway == gateway]:
                self.cancel(record.id, "its gateway is gone", now)

    def submit(self, gateway: bytes, requests: tuple[Request, ...], now: float) -> None:
        """Queue what arrived together. A known id is the same request again and changes nothing."""
        self._groups += 1
        for request in requests:
            if request.id not in self._requests:
                self._take(RequestRecord(request, gateway, now, self._groups), now)

    def cancel(self, request_id: str, reason: str, now: float) -> None:
        """Queued work ends now, running work when its item does."""
        record = self._requests.get(request_id)
        if record is None:
            return
        record.cancel_reason = reason
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
        items: list[WorkItem] = []
        if self._releases:
            items.append(Release(self._next_seq(), self._all_ranks(), tuple(self._releases)))
            self._releases.clear()
        while self.ready and (item := self._next_item(now)) is not None:
            predicted = self._charge(item)
            self.running[item.seq] = Running(item, now, predicted, set(item.ranks))
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

    def _next_item(self, now: float) -> Encode | Denoise | Decode | None:
        # A rank waits for the others of its last item: whether that one failed decides what comes next.
        busy = {rank for running in self.running.values() for rank in running.item.ranks}
        free = [rank for rank in self._all_ranks() if rank not in busy]
        mesh_free = not busy
        admitting = True
        for record in self._in_order(now) if free else ():
            if record.stage is Stage.DECODE:
                decode = self._plan_decode(record, free)
                if decode is not None:
                    return decode
                continue
            if record.stage is Stage.QUEUED:
                # Whoever finds no room holds the door shut behind itself, or it would wait for ever.
                admitting = admitting and self._has_room(record)
                if not admitting:
                    continue
            if not mesh_free:
                # The whole mesh is due for this one: work for a single free rank would keep it waiting.
                return None
            plan = self._plan_encode if record.stage is Stage.QUEUED else self._plan_denoise
            return plan(record, now)
        return None

    def _in_order(self, now: float) -> Iterator[RequestRecord]:
        """Requests that could run, first the key that is furthest behind; of those in line only each key's first."""
        by_key: dict[str, list[RequestRecord]] = {}
        for record in self._active.values():
            if not record.running and record.stage is not Stage.DELIVER:
                by_key.setdefault(record.key, []).append(record)
        for key, line in self._lines.items():
            if len(line):
                by_key.setdefault(key, []).append(line.first(now))
        for key in sorted(by_key, key=lambda key: (self._fair.clocks[key], key)):
            yield from sorted(by_key[key], key=lambda record: order(record, self.policy))

    def _has_room(self, record: RequestRecord) -> bool:
        return len(self._active) < self.max_active and self.memory.admits(record, self._active.values())

    def _plan_encode(self, first: RequestRecord, now: float) -> Encode:
        """The first in line, with what was submitted together with it."""
        group = [record for record in self._lines[first.key] if record.group == first.group and record is not first]
        return self._encode([first, *group], len(group) + 1, now)

    def _plan_denoise(self, first: RequestRecord, now: float) -> Encode | Denoise:
        """A batch around the first; whoever could join it from the line is encoded before."""
        params = first.request.params
        key = self.card.batch_key(params, first.step)
        budget = batch_budget(self.cost, self.limits, params, self.layout)
        batch = [first]
        if budget > 1:
            others = (r for r in self._in_order(now) if r.stage is Stage.DENOISE and r is not first)
            batch += [r for r in others if self.card.batch_key(r.request.params, r.step) == key][: budget - 1]
            joining = [r for r in self._joinable.get(key, {}).values() if self._has_room(r)]
            if joining and len(batch) < budget:
                return self._encode(joining, budget - len(batch), now)
        left = min(record.total_steps - record.step for record in batch)
        steps = self._units(self.cost.predict("denoise", params, self.layout, len(batch)), left)
        for record in batch:
            record.running = True
        return Denoise(self._next_seq(), self._all_ranks(), self.layout, tuple(r.id for r in batch), steps)

    def _encode(self, candidates: list[RequestRecord], most: int, now: float) -> Encode:
        """From the line into the ranks' memory, as many as find room; the first of them does."""
        entered: list[Request] = []
        for record in candidates:
            if len(entered) < most and self._has_room(record):
                self._leave_line(record)
                self._active[record.id] = record
                record.move(Stage.ENCODE, now)
                record.running = True
                self._report(record)
                entered.append(record.request)
        return Encode(self._next_seq(), self._all_ranks(), tuple(entered))

    def _plan_decode(self, record: RequestRecord, free: list[int]) -> Decode | None:
        """The next chunks, on the rank where the decode is open, or on a free one with room for it."""
        gateway = self._gateways[record.gateway]
        if record.decode_rank is None:
            ranks = [r for r in free if self.memory.may_open_decode(record, r, self._active.values())]
            ranks.sort(key=lambda rank: self.memory.held(rank, self._active.values()))
        else:
            ranks = [r for r in free if r == record.decode_rank]
        if not ranks or gateway.credits < 1:
            return None
        seconds = self.cost.predict("decode", record.request.params, self.layout)
        # The first chunk goes alone, so that the first frame does not wait for its neighbours.
        chunks = 1 if record.chunk == 0 else self._units(seconds, record.total_chunks - record.chunk)
        chunks = min(chunks, gateway.credits)
        gateway.credits -= chunks
        record.decode_rank = ranks[0]
        record.running = True
        return Decode(self._next_seq(), (ranks[0],), record.id, chunks, gateway.endpoint)

    def _units(self, seconds: float, left: int) -> int:
        return max(1, min(left, round(self.item_seconds / seconds)))

    def _charge(self, item: Encode | Denoise | Decode) -> float:
        """Book the item's predicted rank-seconds on its requests' keys; returns its predicted seconds."""
        records = list(self._records_of(item))
        params = records[0].request.params
        match item:
            case Encode():
                seconds = len(records) * self.cost.predict("encode", params, self.layout)
            case Denoise():
                seconds = item.steps * self.cost.predict("denoise", params, self.layout, len(records))
            case Decode():
                seconds = item.chunks * self.cost.predict("decode", params, self.layout)
        for record in records:
            self._fair.charge(record.key, seconds * len(item.ranks) / len(records))
        return seconds

    def _expire(self, now: float) -> None:
        """Requests past their timeout end, running ones when their item does."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            record = self._requests.get(request_id)
            if record is not None and record.cancel_reason is None:
                timeout = record.request.timeout_s
                self.cancel(request_id, f"its timeout of {timeout:g} s passed in {self._where(record)}", now)

    # ---- bookkeeping -----------------------------------------------------------------------------------------

    def _take(self, record: RequestRecord, now: float) -> None:
        """A new request: into its key's line, or refused."""
        self._requests[record.id] = record
        record.total_chunks = len(self.card.decode_chunks(record.request.params))
        record.batch_key = self.card.batch_key(record.request.params, 0)
        record.remaining_s = self._remaining(record)
        self.memory.measure(record)
        refusal = self._refusal(record)
        if refusal is not None:
            self._fail(record, *refusal, now)
            return
        if record.request.timeout_s is not None:
            heapq.heappush(self._deadlines, (record.deadline, record.id))
        self._fair.arrive(record.key, {other.key for other in self._requests.values() if other is not record})
        self._lines.setdefault(record.key, WaitingLine(self.policy)).add(record)
        self._joinable.setdefault(record.batch_key, {})[record.id] = record
        self._report(record)

    def _refusal(self, record: RequestRecord) -> tuple[str, str] | None:
        """(code, reason) for what cannot be taken."""
        if self.draining:
            return "draining", "the server is shutting down and takes no new work"
        if record.gateway not in self._gateways:
            return "gateway_lost", "its gateway was given up; nobody would take the frames"
        too_large = self.memory.refusal(record)
        return ("out_of_memory", too_large) if too_large is not None else None

    def _leave_line(self, record: RequestRecord) -> None:
        self._lines[record.key].remove(record)
        self._joinable[record.batch_key].pop(record.id)
        if not self._joinable[record.batch_key]:
            del self._joinable[record.batch_key]

    def _finish(self, running: Running, now: float) -> None:
        item = running.item
        records = list(self._records_of(item))
        if running.failure is None and records:
            self._observe(item, records, running.seconds)
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

    def _observe(self, item: Encode | Denoise | Decode, records: list[RequestRecord], seconds: float) -> None:
        params = records[0].request.params
        match item:
            case Encode():
                self.cost.observe("encode", params, self.layout, len(item.requests), seconds)
            case Denoise():
                self.cost.observe("denoise", params, self.layout, item.steps, seconds, len(item.request_ids))
            case Decode():
                self.cost.observe("decode", params, self.layout, item.chunks, seconds)

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
                    record.move(Stage.DELIVER, now)
        record.remaining_s = self._remaining(record)

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
            if self.ready:
                self._releases.append(record.id)
        record.move(stage, now)
        del self._requests[record.id]
        self._news.append((record.gateway, news))

    def _report(self, record: RequestRecord) -> None:
        done, total = record.step, record.total_steps
        if record.stage in {Stage.DECODE, Stage.DELIVER}:
            done, total = record.chunk, record.total_chunks
        position, eta = self.outlook(record)
        self._news.append((record.gateway, Progress(record.id, str(record.stage), done, total, eta, position)))

    def outlook(self, record: RequestRecord) -> tuple[int, float]:
        """(place in its key's line, predicted seconds until its last frame if nothing else arrives)."""
        mine = order(record, self.policy)
        queued = record.stage is Stage.QUEUED
        rivals = (r for r in self._active.values() if r is not record and (queued or order(r, self.policy) < mine))
        eta = record.remaining_s + sum(r.remaining_s for r in rivals)
        if not queued:
            return 0, eta
        position, before_s = self._lines[record.key].ahead_of(record)
        # The other keys' lines take their turns in between.
        sharing = sum(1 for line in self._lines.values() if len(line))
        return position, eta + before_s * sharing

    def _remaining(self, record: RequestRecord) -> float:
        params = record.request.params
        units = {
            "encode": int(record.stage in {Stage.QUEUED, Stage.ENCODE}),
            "denoise": record.total_steps - record.step,
            "decode": record.total_chunks - record.chunk,
        }
        return sum(count * self.cost.predict(kind, params, self.layout) for kind, count in units.items())

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
