"""Who runs next: a pure function of what it was told. No clock, no socket, no torch, no randomness.

Events go in (`submit`, `cancel`, `completed`, `failed`, `stored`, `group_ready`, `group_lost`), work items come out
of `plan(now)`, news for the gateways out of `take_news()`. The engine and the simulator drive this same class.

First policy: one fixed layout over all ranks; requests in order of arrival; several may be active, and the decoding
of one alternates with the denoising of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.cost import CostModel
from runtime.layout import Layout
from runtime.models.card import Card
from runtime.protocol import (
    Cancelled,
    Completed,
    Decode,
    Denoise,
    Encode,
    Failed,
    Progress,
    Release,
    Request,
    WorkItem,
)
from runtime.request import ACTIVE, ENDED, RequestRecord, Stage

ITEM_SECONDS = 0.1
"""An item lasts about this long by prediction: the bound for cancel and for another request's turn."""
MAX_ACTIVE = 8
"""Requests whose state the ranks hold at once."""

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
class _Running:
    item: Encode | Denoise | Decode
    waiting: set[int]
    seconds: float = 0.0
    failure: tuple[str, str] | None = None


@dataclass
class Scheduler:
    """The queue, the ranks and the policy of one replica."""

    card: Card
    layout: Layout
    cost: CostModel
    item_seconds: float = ITEM_SECONDS
    draining: bool = False
    ready: bool = False
    _requests: dict[str, RequestRecord] = field(default_factory=dict)
    _gateways: dict[bytes, _Gateway] = field(default_factory=dict)
    _running: dict[int, _Running] = field(default_factory=dict)
    _releases: list[str] = field(default_factory=list)
    _news: list[tuple[bytes, News]] = field(default_factory=list)
    _turn: tuple[Stage, Stage] = (Stage.DENOISE, Stage.DECODE)
    _seq: int = 0

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
        for request in requests:
            if request.id in self._requests:
                continue
            record = RequestRecord(request, gateway, now, len(self.card.decode_chunks(request.params)))
            self._requests[request.id] = record
            if self.draining:
                self._fail(record, "draining", "the server is shutting down and takes no new work", now)
            elif gateway not in self._gateways:
                self._fail(record, "gateway_lost", "its gateway was given up; nobody would take the frames", now)
            else:
                self._report(record)

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
        running = self._running.get(seq)
        if running is None:
            return
        running.waiting.discard(rank)
        running.seconds = max(running.seconds, seconds)
        if not running.waiting:
            del self._running[seq]
            self._finish(running, now)

    def failed(self, rank: int, seq: int, code: str, reason: str, now: float) -> None:
        """A rank could not do its item, but the group lives: the item's requests end when all its ranks reported."""
        running = self._running.get(seq)
        if running is not None:
            running.failure = (code, reason)
            self.completed(rank, seq, 0.0, now)

    def group_ready(self) -> None:
        self.ready = True

    def group_lost(self, reason: str, now: float) -> None:
        """The ranks and every state they held are gone. What was active fails; what was queued waits."""
        self.ready = False
        self._running.clear()
        self._releases.clear()
        for gateway in self._gateways.values():
            # What was under way has arrived, or died with its rank.
            gateway.credits = gateway.limit
        for record in self._active():
            record.running = False
            self._fail(record, "worker_lost", f"{reason} in {self._where(record)}", now)

    # ---- decisions -------------------------------------------------------------------------------------------

    def plan(self, now: float) -> list[WorkItem]:
        """Items to start now, in the one global order."""
        items: list[WorkItem] = []
        if self._releases:
            items.append(Release(self._next_seq(), self._all_ranks(), tuple(self._releases)))
            self._releases.clear()
        while self.ready and (item := self._next_item(now)) is not None:
            self._running[item.seq] = _Running(item, set(item.ranks))
            items.append(item)
        return items

    def take_news(self) -> list[tuple[bytes, News]]:
        """(gateway, message) pairs since the last call."""
        news, self._news = self._news, []
        return news

    @property
    def idle(self) -> bool:
        return not self._requests and not self._running

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def _next_item(self, now: float) -> Encode | Denoise | Decode | None:
        # A rank waits for the others of its last item: whether that one failed decides what comes next.
        busy = {rank for running in self._running.values() for rank in running.item.ranks}
        free = [rank for rank in self._all_ranks() if rank not in busy]
        mesh_free = len(free) == self.layout.num_ranks
        if mesh_free and (encode := self._plan_encode(now)) is not None:
            return encode
        for stage in self._turn:
            waiting = [r for r in self._requests.values() if r.stage is stage and not r.running]
            if not waiting:
                continue
            if stage is Stage.DECODE:
                decode = self._plan_decode(waiting, free)
                if decode is not None:
                    self._turn = (Stage.DENOISE, Stage.DECODE)
                    return decode
            elif mesh_free:
                self._turn = (Stage.DECODE, Stage.DENOISE)
                return self._plan_denoise(waiting[0])
            else:
                # The whole mesh is due for a denoise item: starting another decode on a free rank would starve it.
                return None
        return None

    def _plan_encode(self, now: float) -> Encode | None:
        room = MAX_ACTIVE - len(self._active())
        batch = [r for r in self._requests.values() if r.stage is Stage.QUEUED][: max(room, 0)]
        if not batch:
            return None
        for record in batch:
            record.move(Stage.ENCODE, now)
            record.running = True
            self._report(record)
        return Encode(self._next_seq(), self._all_ranks(), tuple(record.request for record in batch))

    def _plan_denoise(self, record: RequestRecord) -> Denoise:
        record.running = True
        left = record.total_steps - record.step
        steps = self._units_per_item("denoise", record, left)
        return Denoise(self._next_seq(), self._all_ranks(), self.layout, (record.id,), steps)

    def _plan_decode(self, waiting: list[RequestRecord], free: list[int]) -> Decode | None:
        taken = {r.decode_rank for r in self._requests.values() if r.stage is Stage.DECODE}
        for record in waiting:
            gateway = self._gateways[record.gateway]
            ranks = [r for r in free if r == record.decode_rank or (record.decode_rank is None and r not in taken)]
            if not ranks or gateway.credits < 1:
                continue
            left = record.total_chunks - record.chunk
            # The first chunk goes alone, so that the first frame does not wait for its neighbours.
            chunks = min(1 if record.chunk == 0 else self._units_per_item("decode", record, left), gateway.credits)
            gateway.credits -= chunks
            record.decode_rank = ranks[0]
            record.running = True
            return Decode(self._next_seq(), (ranks[0],), record.id, chunks, gateway.endpoint)
        return None

    def _units_per_item(self, kind: str, record: RequestRecord, left: int) -> int:
        seconds = self.cost.predict(kind, record.request.params, self.layout)
        return max(1, min(left, round(self.item_seconds / seconds)))

    # ---- bookkeeping -----------------------------------------------------------------------------------------

    def _finish(self, running: _Running, now: float) -> None:
        item = running.item
        for record in self._records_of(item):
            record.running = False
            if running.failure is not None:
                if isinstance(item, Decode) and record.gateway in self._gateways:
                    self._gateways[record.gateway].give_back(item.chunks)
                self._fail(record, *running.failure, now)
            elif record.cancel_reason is not None:
                self._end(record, Stage.CANCELLED, Cancelled(record.id, record.cancel_reason), now)
            else:
                self._advance(record, item, running.seconds, now)
                self._report(record)
                self._end_if_stored(record, now)

    def _advance(self, record: RequestRecord, item: Encode | Denoise | Decode, seconds: float, now: float) -> None:
        params = record.request.params
        match item:
            case Encode():
                self.cost.observe("encode", params, self.layout, len(item.requests), seconds)
                record.move(Stage.DENOISE, now)
            case Denoise():
                self.cost.observe("denoise", params, self.layout, item.steps, seconds)
                record.step += item.steps
                if record.step == record.total_steps:
                    record.move(Stage.DECODE, now)
            case Decode():
                self.cost.observe("decode", params, self.layout, item.chunks, seconds)
                record.chunk += item.chunks
                if record.chunk == record.total_chunks:
                    record.move(Stage.DELIVER, now)

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
        held = record.stage in ACTIVE
        record.move(stage, now)
        assert stage in ENDED
        del self._requests[record.id]
        if held and self.ready:
            self._releases.append(record.id)
        self._news.append((record.gateway, news))

    def _report(self, record: RequestRecord) -> None:
        done, total = record.step, record.total_steps
        if record.stage in {Stage.DECODE, Stage.DELIVER}:
            done, total = record.chunk, record.total_chunks
        position, eta = self._outlook(record)
        self._news.append((record.gateway, Progress(record.id, str(record.stage), done, total, eta, position)))

    def _outlook(self, record: RequestRecord) -> tuple[int, float]:
        """(requests ahead in the queue, predicted seconds until its last frame if nothing else arrives)."""
        eta, position = 0.0, 0
        for other in self._requests.values():
            eta += self._remaining(other)
            if other is record:
                break
            position += other.stage is Stage.QUEUED
        return (position + 1 if record.stage is Stage.QUEUED else 0), eta

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

    def _active(self) -> list[RequestRecord]:
        return [r for r in self._requests.values() if r.stage in ACTIVE]

    def _all_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.layout.num_ranks))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq
