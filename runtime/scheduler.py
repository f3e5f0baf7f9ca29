"""Who runs next: a pure function of what it was told. No clock, no socket, no torch, no randomness.

Events go in (`submit`, `cancel`, `completed`, `failed`, `stored`, `group_ready`, `group_lost`), work items come out
of `plan(now)`, news for the gateways out of `take_news()`. The engine and the simulator drive this same class. The
planner chooses what runs next (runtime/planner.py) and changes nothing; whatever changes, changes here.

Requests join and leave a running batch at step boundaries, each at its own timestep. Between API keys the share is
fair; within a key the policy decides (runtime/fairness.py). Every item lasts about `item_seconds`, and whoever is first
when it ends runs next: that is all there is to pre-emption.

A request whose state is lost, with the worker group or with a failed item, goes back into the line and on from its
checkpoint; under suspicion it runs alone, and what fails alone fails for good: that is all there is to recovery.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from runtime.batching import BatchLimits
from runtime.checkpoints import Leftovers
from runtime.cost import CostModel
from runtime.errands import Errands
from runtime.fairness import FairShare
from runtime.gateways import Gateways
from runtime.layout import Layout
from runtime.memory import MemoryLedger
from runtime.models.card import Card
from runtime.outlook import outlook
from runtime.planner import Choice, Emit, Enter, Planner, Step, Waiting
from runtime.predictions import Predictions, item_size
from runtime.protocol import (
    CANCELLED,
    TIMED_OUT,
    Cancelled,
    Completed,
    Decode,
    Denoise,
    Encode,
    Failed,
    Measurement,
    PreviewTo,
    Progress,
    Request,
    SavedState,
    WorkItem,
)
from runtime.queue import Queue
from runtime.recovery import GUILTY_AFTER, OUT_OF_MEMORY, SUSPECT_AFTER, LossLog, Verdict, judge
from runtime.request import ACTIVE, ENDED, RequestRecord, Stage
from runtime.running import Running, request_ids
from runtime.totals import Tally

ITEM_SECONDS = 0.1
"""An item lasts about this long by prediction: the bound for cancel and for another request's turn."""
MAX_ACTIVE = 64
"""Requests whose state the ranks hold at once, memory allowing."""
ORPHAN_S = 30.0
"""How long a request whose gateway is gone waits for another one to take it."""
REJOIN_S = 10.0
"""How long a drain that finds the ranks not ready waits for gateways to hand in what an earlier life accepted."""
SAVE_S = 10.0
"""How long a drain that ran out of time waits for the last checkpoints."""

News = Progress | Completed | Failed | Cancelled


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
    checkpoint_every: int = 0
    """Steps between two checkpoints of a request; 0: none."""
    decode_on_all: bool = False
    """Every decode runs on all ranks, each of which has a strip of every frame."""
    found: Leftovers = field(default_factory=Leftovers)
    """Checkpoints of an earlier life."""
    losses: LossLog = field(default_factory=LossLog)
    draining: bool = False
    ready: bool = False
    memory: MemoryLedger = field(init=False)
    predictions: Predictions = field(init=False)
    running: dict[int, Running] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    _requests: dict[str, RequestRecord] = field(default_factory=dict)
    _active: dict[str, RequestRecord] = field(default_factory=dict)
    _queue: Queue = field(init=False)
    _fair: FairShare = field(init=False)
    _planner: Planner = field(init=False)
    _gateways: Gateways = field(default_factory=Gateways)
    _deadlines: list[tuple[float, str]] = field(default_factory=list)
    _batch_caps: dict[Hashable, int] = field(default_factory=dict)
    """Batches that ran out of memory, halved."""
    _errands: Errands = field(default_factory=Errands)
    _drain_until: float = math.inf
    _rejoin_until: float = -math.inf
    _time_up: bool = False
    """The drain's time is over: no item is started any more."""
    _news: list[tuple[bytes, News]] = field(default_factory=list)
    _budget_changed: bool = False
    _groups: int = 0
    _seq: int = 0

    def __post_init__(self) -> None:
        self.memory = MemoryLedger(self.card)
        self.predictions = Predictions(self.cost, self.card, self.layout, self.decode_on_all)
        self._queue = Queue(self.policy)
        self._fair = FairShare(self.weights)
        self._planner = Planner(
            self.card,
            self.predictions,
            self.limits,
            self.policy,
            self.max_active,
            self.item_seconds,
            self.decode_on_all,
            self._active,
            self._queue,
            self._fair.clocks,
            self._gateways,
            self.memory,
            self._batch_caps,
        )

    # ---- events ----------------------------------------------------------------------------------------------

    def gateway_joined(self, gateway: bytes, endpoint: str, credits: int) -> None:
        self._gateways.join(gateway, endpoint, credits)
        # One that we lost sight of for a moment.
        for record in self._requests.values():
            if record.gateway == gateway:
                record.orphaned_until = math.inf

    def gateway_lost(self, gateway: bytes, now: float) -> None:
        """Its requests go on, but no frames are made for it; those that no other takes over in time end, wherever they
        are, and their checkpoints with them."""
        if self._gateways.lose(gateway):
            for record in [r for r in self._requests.values() if r.gateway == gateway]:
                record.orphaned_until = now + ORPHAN_S
                heapq.heappush(self._deadlines, (record.orphaned_until, record.id))

    def submit(self, gateway: bytes, requests: tuple[Request, ...], now: float) -> None:
        """Queue what arrived together. A known id changes nothing, unless it comes from another gateway."""
        self._groups += 1
        for request in requests:
            record = self._requests.get(request.id)
            if record is None:
                self._take(RequestRecord(request, gateway, now, self._groups, attempt=request.attempt), now)
            elif gateway != record.gateway and gateway in self._gateways:
                self._adopt(record, gateway, request.attempt, now)

    def cancel(
        self, request_id: str, reason: str, now: float, gateway: bytes | None = None, code: str = CANCELLED
    ) -> None:
        """Queued work ends now, running work when its item does.

        A gateway cancels what is its own: one from which another took a request over has nothing to say about it.
        """
        record = self._requests.get(request_id)
        if record is None:
            self._forget_saved(request_id)
            return
        if gateway not in {None, record.gateway}:
            return
        record.cancel_reason, record.cancel_code = reason, code
        self._settle(record, now)

    def stored(self, gateway: bytes, request_id: str, now: float) -> None:
        """The gateway has all the frames; it may say so before the rank says that it sent the last."""
        record = self._requests.get(request_id)
        if record is None:
            self._forget_saved(request_id)
        if record is None or record.gateway != gateway:
            return
        if record.stage in {Stage.DECODE, Stage.DELIVER} or record.restarted:
            record.stored = True
            self._settle(record, now)

    def granted(self, gateway: bytes, credits: int) -> None:
        self._gateways.give_back(gateway, credits)

    def checkpointed(self, request_id: str, saved: SavedState) -> None:
        """A request's state is durable, whatever became of the rank that wrote it."""
        self._errands.saved(request_id)
        record = self._requests.get(request_id)
        if record is not None and saved.step > record.resume_step:
            queued = record in self._queue
            if queued:
                self._queue.remove(record)
            record.saved = saved
            if queued:
                record.step = record.saved_upto = saved.step
                self._line_up(record)

    def checkpoint_failed(self, request_id: str) -> None:
        """The request goes on with the checkpoint that it has, or with none."""
        self._errands.saved(request_id)

    def drain(self, timeout_s: float | None, now: float) -> None:
        """Take no new work; after the timeout start no item any more either, and save what has not ended."""
        if not self.draining and not self.ready:
            self._rejoin_until = now + REJOIN_S
        self.draining = True
        if timeout_s is not None:
            self._drain_until = min(self._drain_until, now + timeout_s)

    def drained(self, now: float) -> bool:
        """Nothing is left, or the time is up and what is left was saved."""
        if not self.draining or self.running:
            return False
        done = not self._requests and now >= self._rejoin_until
        saved = not self._errands.saving or now >= self._drain_until + SAVE_S
        return done or (self._time_up and saved)

    def completed(self, rank: int, seq: int, seconds: float, now: float, peak_bytes: int = 0) -> None:
        """A rank is done with an item; the item is over when all its ranks are."""
        running = self.running.get(seq)
        if running is None:
            return
        running.waiting.discard(rank)
        running.seconds = max(running.seconds, seconds)
        running.peak_bytes = max(running.peak_bytes, peak_bytes)
        if not running.waiting:
            del self.running[seq]
            if 0 in running.item.ranks:
                self._errands.reported(seq)
            self._finish(running, now)

    def failed(self, rank: int, seq: int, code: str, reason: str, now: float) -> None:
        """A rank could not do its item, but the group lives: the item's requests end when all its ranks reported."""
        running = self.running.get(seq)
        if running is not None:
            # That memory ran out explains what the others say.
            if running.failure is None or code == OUT_OF_MEMORY:
                running.failure = (code, reason)
            self.completed(rank, seq, 0.0, now)

    def calibrate(self, measurements: tuple[Measurement, ...]) -> None:
        """What the ranks measured while they warmed up."""
        for measured in measurements:
            self.predictions.learn(measured.kind, measured.params, 1, measured.seconds, measured.batch)

    def group_ready(self, memory_budget: int | None = None) -> None:
        """Every rank has the model; `memory_budget` is what the poorest of them has for states, bytes."""
        self.ready = True
        self.memory.budget = memory_budget
        self._budget_changed = True

    def group_lost(self, reason: str, now: float, culprit: tuple[int, str] | None = None) -> None:
        """The ranks and every state they held are gone: whatever was active goes back into the line.

        `culprit` is the item, with its error's code, that broke the group, if one is known to.
        """
        lost = list(self.running.values())
        self.ready = False
        self.running.clear()
        self._errands.group_lost(self._requests)
        self._gateways.refill()
        for record in self._active.values():
            record.running = False
        if culprit is not None and culprit[1] == OUT_OF_MEMORY:
            self.losses.total += 1
            for running in (r for r in lost if r.item.seq == culprit[0]):
                self._item_failed(running.item, list(self._records_of(running.item)), OUT_OF_MEMORY, reason, now)
        else:
            loss = self.losses.note(now)
            for record in (record for running in lost for record in self._records_of(running.item)):
                record.losses.append(loss)
        for record in list(self._active.values()):
            if len(record.losses) >= GUILTY_AFTER and not self._is_over(record):
                self.losses.explain(record.losses)
                times = f"it ran while the workers died {len(record.losses)} times, the last time alone"
                self._fail(record, "worker_lost", f"{reason} in {record.where}; {times}", now)
            else:
                record.alone = record.alone or len(record.losses) >= SUSPECT_AFTER
                self._restart(record, now)

    # ---- decisions -------------------------------------------------------------------------------------------

    def plan(self, now: float) -> list[WorkItem]:
        """Items to start now, in the one global order."""
        self._expire(now)
        for request_id in self.found.expire(now):
            self._errands.ended(request_id)
        self._refuse_too_large(now)
        self._save_at_the_end(now)
        items: list[WorkItem] = []
        if self.ready:
            items += self._errands.items(self._active, self._all_ranks(), self._next_seq)
        # A rank waits for the others of its last item: whether that one failed decides what comes next.
        busy = {rank for running in self.running.values() for rank in running.item.ranks}
        free = [rank for rank in self._all_ranks() if rank not in busy]
        stand_still = self._time_up or any(running.alone for running in self.running.values())
        waiting = self._planner.waiting(now) if self.ready and free and not stand_still else {}
        while waiting and free and (choice := self._choose(waiting, free)) is not None:
            running = self._start(choice, now)
            items.append(running.item)
            if running.alone:
                break
            free = [rank for rank in free if rank not in running.item.ranks]
            for key in {record.key for record in self._records_of(running.item)} & waiting.keys():
                waiting[key] = [record for record in waiting[key] if not record.running]
                if not waiting[key]:
                    del waiting[key]
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
        times = [at for at, _ in self._deadlines[:1]]
        if not self._time_up:
            times.append(self._drain_until)
        first = min([*times, self.found.until])
        return first if math.isfinite(first) else None

    def outlook(self, record: RequestRecord) -> tuple[int, float]:
        """(place in its key's line, predicted seconds until its last frame if nothing else arrives)."""
        return outlook(record, self._active.values(), self._queue, self.predictions, self.limits)

    @property
    def backlog_s(self) -> float:
        """Predicted seconds until every accepted request is done, one after the other."""
        return sum(record.remaining_s for record in self._requests.values())

    def _choose(self, waiting: Waiting, free: list[int]) -> Choice | None:
        """Whose turn it is and what for; the clocks learn who could run."""
        self._fair.wait(set(waiting))
        choice = self._planner.choose(waiting, free)
        if choice is not None:
            self._fair.serve(choice.turn.key)
        return choice

    def _start(self, choice: Choice, now: float) -> Running:
        """Do what was chosen: the only place where requests enter the ranks' memory and an item."""
        match choice:
            case Enter():
                item: Encode | Denoise | Decode = self._encode(choice.records, now)
            case Step():
                item = self._denoise(choice)
            case Emit():
                item = self._decode(choice)
        turn, params = choice.turn, choice.turn.request.params
        predicted_s = self.predictions.seconds(item, params)
        self._charge(list(self._records_of(item)), predicted_s * len(item.ranks))
        running = Running(item, now, predicted_s, set(item.ranks), alone=turn.alone, payer=turn.gateway)
        running.measured = self.predictions.measured(item, params)
        self.running[item.seq] = running
        return running

    def _encode(self, records: tuple[RequestRecord, ...], now: float) -> Encode:
        for record in records:
            self._queue.remove(record)
            self._active[record.id] = record
            self.memory.enter(record)
            record.move(Stage.ENCODE, now)
            record.running = True
            self._report(record)
        resume = {record.id: record.saved for record in records if record.saved is not None}
        return Encode(self._next_seq(), self._all_ranks(), tuple(record.request for record in records), resume)

    def _denoise(self, chosen: Step) -> Denoise:
        for record in chosen.records:
            record.running = True
        ids, previews = tuple(record.id for record in chosen.records), tuple(self._previews(chosen))
        return Denoise(self._next_seq(), self._all_ranks(), self.layout, ids, chosen.steps, previews)

    def _previews(self, chosen: Step) -> Iterator[PreviewTo]:
        """Those that are due after so many steps, for gateways that are there."""
        for record in chosen.records:
            if record.step + chosen.steps in record.preview_steps and record.gateway in self._gateways:
                yield PreviewTo(record.id, self._gateways.endpoint(record.gateway), record.attempt)

    def _decode(self, chosen: Emit) -> Decode:
        record, chunks = chosen.turn, chosen.chunks
        if record.decode_rank is None:
            record.decode_rank = chosen.rank
            self.memory.open_decode(record, chosen.rank)
        self._gateways.spend(record.gateway, chunks)
        record.running = True
        ranks = self._all_ranks() if self.decode_on_all else (chosen.rank,)
        endpoint = self._gateways.endpoint(record.gateway)
        return Decode(self._next_seq(), ranks, record.id, chunks, endpoint, record.chunk, record.attempt)

    def _save_at_the_end(self, now: float) -> None:
        """A drain whose time is up writes what it cannot finish."""
        self._time_up = now >= self._drain_until
        if self._time_up and self.checkpoint_every and not self.running:
            for record in self._active.values():
                if record.stage is Stage.DENOISE and record.step > record.saved_upto:
                    self._errands.save(record.id)

    def _charge(self, records: list[RequestRecord], rank_seconds: float) -> None:
        """Book an item's predicted rank-seconds on its requests' keys."""
        for record in records:
            self._fair.charge(record.key, rank_seconds / len(records))

    def _expire(self, now: float) -> None:
        """Requests past their time end, running ones when their item does."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            record = self._requests.get(request_id)
            # The id may have ended and started again since.
            if record is None or record.cancel_reason is not None:
                continue
            if record.deadline <= now:
                timeout = record.request.timeout_s
                self.cancel(request_id, f"its timeout of {timeout:g} s passed in {record.where}", now, code=TIMED_OUT)
            elif record.orphaned_until <= now:
                self.cancel(request_id, "its gateway is gone", now)

    def _forget_saved(self, request_id: str) -> None:
        """A request of an earlier life is over: its checkpoint can go."""
        if self.found.claim(request_id) is not None:
            self._errands.ended(request_id)

    def _refuse_too_large(self, now: float) -> None:
        """What was taken before the ranks told their budget, and does not fit it, would wait for ever."""
        if not self._budget_changed:
            return
        self._budget_changed = False
        for record in [r for r in self._requests.values() if r.stage is Stage.QUEUED]:
            too_large = self.memory.refusal(record)
            if too_large is not None:
                self._fail(record, OUT_OF_MEMORY, too_large, now)

    # ---- bookkeeping -----------------------------------------------------------------------------------------

    def _take(self, record: RequestRecord, now: float) -> None:
        """A new request: into its key's line, or refused."""
        self._requests[record.id] = record
        record.total_chunks = len(self.card.decode_chunks(record.request.params))
        self.memory.measure(record)
        refusal = self._refusal(record)
        if refusal is not None:
            # Its checkpoint stays: another gateway may hand it in, or the next life.
            self._fail(record, *refusal, now)
            return
        record.saved = self.found.claim(record.id)
        record.step = record.saved_upto = record.resume_step
        too_large = self.memory.refusal(record)
        if too_large is not None:
            self._fail(record, OUT_OF_MEMORY, too_large, now)
            return
        self._watch_deadline(record)
        self._line_up(record)

    def _watch_deadline(self, record: RequestRecord) -> None:
        if record.request.timeout_s is not None:
            heapq.heappush(self._deadlines, (record.deadline, record.id))

    def _line_up(self, record: RequestRecord) -> None:
        can_join = not (record.alone or record.sole) and record.step < record.total_steps
        record.batch_key = self.card.batch_key(record.request.params, record.step) if can_join else None
        record.remaining_s = self.predictions.remaining(record)
        self._queue.add(record)
        self._report(record)

    def _adopt(self, record: RequestRecord, gateway: bytes, attempt: int, now: float) -> None:
        """A gateway that was started anew hands in what it still owes: it goes on where it is, and its frames are made
        again from the first on."""
        record.gateway = gateway
        record.orphaned_until = math.inf
        record.cancel_reason, record.stored = None, False
        # It may have passed, and the cancel with it.
        self._watch_deadline(record)
        record.attempt = max(record.attempt, attempt) + 1
        if record.stage is Stage.DELIVER:
            record.move(Stage.DECODE, now)
            record.decode_rank = None
        if record.stage is Stage.DECODE:
            record.chunk = 0
            record.remaining_s = self.predictions.remaining(record)
        self._report(record)

    def _restart(self, record: RequestRecord, now: float) -> None:
        """Its state is lost: on from its checkpoint, unless it is over anyway."""
        if self._is_over(record):
            self._settle(record, now)
            return
        self._leave_ranks(record)
        if self.ready:
            self._errands.starts_again(record.id)
        record.restart(now)
        # What was submitted with it is not encoded with it again.
        self._groups += 1
        record.group = self._groups
        self._line_up(record)

    def _refusal(self, record: RequestRecord) -> tuple[str, str] | None:
        """(code, reason) for what cannot be taken. What was accepted before is taken by a draining mesh too."""
        accepted = record.request.attempt > 0 or record.id in self.found.saved
        if self.draining and not accepted:
            return "draining", "the mesh is draining and takes no new work"
        if record.gateway not in self._gateways:
            return "gateway_lost", "its gateway was given up; nobody would take the frames"
        return None

    def _finish(self, running: Running, now: float) -> None:
        item = running.item
        records = list(self._records_of(item))
        for record in records:
            record.running = False
        if running.failure is not None:
            if isinstance(item, Decode):
                self._gateways.give_back(running.payer, item.chunks)
            self._item_failed(item, records, *running.failure, now)
            return
        self._book(running, records)
        self.predictions.observe(item, records[0].request.params, running.seconds)
        for record in records:
            self._advance(record, item, now)
            # Told even when it ends here: the frames of its last decode may be stored before the ranks report it.
            self._report(record)
            self._settle(record, now)

    def _book(self, running: Running, records: list[RequestRecord]) -> None:
        """What a finished item took, on its requests and their accounts; a rank waits for the slowest of its item."""
        self.tally.item(running.item, running.seconds, running.predicted_s)
        share = running.seconds * len(running.item.ranks) / len(records)
        for record in records:
            record.rank_seconds += share
            record.peak_bytes = max(record.peak_bytes, running.peak_bytes)
            self.tally.charge(record.key, share)

    def _item_failed(
        self, item: Encode | Denoise | Decode, records: list[RequestRecord], code: str, reason: str, now: float
    ) -> None:
        """Its states may be half done: they start again, in smaller company; what fails alone fails."""
        verdict = judge(item, code, len(self._active))
        if verdict is Verdict.IN_SMALLER_BATCHES:
            self._batch_caps[self.card.batch_key(records[0].request.params, records[0].step)] = len(records) // 2
        for record in records:
            record.saved = None if verdict is Verdict.WITHOUT_CHECKPOINT else record.saved
            record.alone = record.alone or verdict is Verdict.ALONE
            record.sole = record.sole or verdict is Verdict.SOLE
            if verdict is Verdict.FAILS and not self._is_over(record):
                advice = f"; {self.memory.advice(record, item_size(item)[0])}" if code == OUT_OF_MEMORY else ""
                self._fail(record, code, reason + advice, now)
            else:
                self._restart(record, now)

    def _advance(self, record: RequestRecord, item: Encode | Denoise | Decode, now: float) -> None:
        match item:
            case Encode():
                record.step = item.resume[record.id].step if record.id in item.resume else 0
                record.move(Stage.DENOISE if record.step < record.total_steps else Stage.DECODE, now)
            case Denoise():
                record.step += item.steps
                done = record.step == record.total_steps
                if self.checkpoint_every and (done or record.step - record.saved_upto >= self.checkpoint_every):
                    self._errands.save(record.id)
                if done:
                    record.move(Stage.DECODE, now)
            # Chunks that went to a gateway that is gone count for nothing.
            case Decode() if item.attempt == record.attempt:
                record.chunk += item.chunks
                if record.chunk == record.total_chunks:
                    self.memory.close_decode(record)
                    record.move(Stage.DELIVER, now)
        record.remaining_s = self.predictions.remaining(record)

    def _records_of(self, item: Encode | Denoise | Decode) -> Iterator[RequestRecord]:
        return (self._requests[request_id] for request_id in request_ids(item) if request_id in self._requests)

    def _is_over(self, record: RequestRecord) -> bool:
        return record.stored or record.cancel_reason is not None

    def _settle(self, record: RequestRecord, now: float) -> bool:
        """End a request that is stored or cancelled, unless it is in an item."""
        if record.running or not self._is_over(record):
            return False
        if record.stored:
            completed = Completed(record.id, record.timings(now), record.usage(now))
            self._end(record, Stage.COMPLETED, completed, now)
        else:
            cancelled = Cancelled(record.id, record.cancel_reason or "", record.usage(now), record.cancel_code)
            self._end(record, Stage.CANCELLED, cancelled, now)
        return True

    def _fail(self, record: RequestRecord, code: str, reason: str, now: float) -> None:
        self._end(record, Stage.FAILED, Failed(record.id, code, reason, record.usage(now)), now)

    def _end(self, record: RequestRecord, stage: Stage, news: News, now: float) -> None:
        assert stage in ENDED
        if record in self._queue:
            self._queue.remove(record)
        # Ranks that died may have made a state durable that we have yet to hear of.
        if record.entered or record.saved is not None:
            self._errands.ended(record.id)
        if record.stage in ACTIVE:
            self._leave_ranks(record)
        record.move(stage, now)
        del self._requests[record.id]
        self._news.append((record.gateway, news))

    def _leave_ranks(self, record: RequestRecord) -> None:
        del self._active[record.id]
        self.memory.leave(record)

    def _report(self, record: RequestRecord) -> None:
        done, total = record.step, record.total_steps
        if record.stage in {Stage.DECODE, Stage.DELIVER}:
            done, total = record.chunk, record.total_chunks
        position, eta = self.outlook(record)
        self._news.append((record.gateway, Progress(record.id, str(record.stage), done, total, eta, position)))

    def _all_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.layout.num_ranks))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq
