"""The discrete-event simulator: the runtime's own Scheduler under a virtual clock, with ranks that only take time.

What is real: the scheduler, its cost model and its policies, event for event. What is modelled: how long an item takes
(a file of `Costs`), the gap before it, and a gateway that consumes every chunk at once. A replica is a Scheduler with
its ranks; a request goes to the replica with the least predicted work. A policy is anything with `Policy`'s methods.
"""

from __future__ import annotations

import argparse
import copy
import heapq
import math
import random
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import msgspec

from bench.report import machine, save, shown
from bench.workloads import WORKLOADS, Arrival, Workload, read_trace
from launch.weights import resolve_model
from runtime.batching import BatchLimits, batch_budget
from runtime.cost import Constants, CostModel
from runtime.layout import Layout
from runtime.models.card import Card, card_for, read_configs
from runtime.models.wan import WanCard
from runtime.predictions import Predictions, item_size
from runtime.protocol import (
    Cancelled,
    Completed,
    Decode,
    Denoise,
    Encode,
    Failed,
    Progress,
    Request,
    WorkItem,
)
from runtime.request import RequestRecord
from runtime.running import Running
from runtime.sampling import ResolvedParams
from runtime.scheduler import Scheduler

HOME = Path(__file__).parent
GATEWAY = b"gateway"
CREDITS = 16
"""Chunks under way to the gateway at once, as `gateway.mesh` has it."""
SLO_SCALE = 3.0
"""A request is in time within so many times its own time alone on the mesh."""
ENOUGH = 0.9
"""Goodput is the highest rate at which this share is in time."""
WEATHER_S = 2.0
"""Seconds over which a machine's slowness is averaged."""
EPSILON = 1e-9
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""By runs, for a 95 % interval."""


Beliefs = Constants
"""What a scheduler has learnt of its ranks, for those who may not know the runtime's private half."""


# ---- what ranks take --------------------------------------------------------------------------------------------


class Unit(msgspec.Struct, frozen=True):
    """Measured seconds of one unit of work, and how much items differ."""

    seconds: float
    cv: float = 0.0
    n: int = 0


class Costs(msgspec.Struct, kw_only=True):
    """The constants file: what an item takes. The table goes before the lines, which are for what it lacks."""

    note: str
    """Where the figures come from, and what is synthetic."""
    model: dict[str, Any] | None = None
    """Fields of the Wan card; None: the demo model's."""
    learnt: Constants
    units: dict[str, Unit] = {}
    """By `unit_key`."""
    start: Constants | None = None
    """What the scheduler believed when the measured trace began."""
    gap_s: float = 0.001
    """From the report of one item to the start of the next one's compute."""
    submit_s: float = 0.0
    """From the client to the scheduler's queue."""
    deliver_s: float = 0.0
    """From the scheduler's last word to the client."""
    machine: dict[str, Any] = {}

    def card(self) -> Card:
        if self.model is None:
            return card_for(read_configs(resolve_model("demo")))
        return msgspec.convert(self.model, WanCard)


def read_costs(path: Path) -> Costs:
    return msgspec.json.decode(path.read_bytes(), type=Costs)


def unit_key(kind: str, params: ResolvedParams, ranks: int, batch: int, first: bool) -> str:
    """First chunks are one frame and have a figure of their own; an encode is the same for every shape."""
    if kind == "encode":
        return "encode"
    shape = f"{kind} {params.width}x{params.height}x{params.num_frames}"
    if kind == "decode":
        return f"{shape} {'first' if first else 'next'}"
    branches = 2 if params.guidance_scale > 1 else 1
    return f"{shape} branches={branches} ranks={ranks} batch={batch}"


@dataclass
class Truth:
    """Draws what an item takes. Its model never learns."""

    costs: Costs
    card: Card
    layout: Layout
    random_: random.Random
    cv: float | None = None
    """Instead of each unit's own; 0: no jitter."""
    looked_up: int = 0
    computed: int = 0

    def __post_init__(self) -> None:
        self._model = Predictions(CostModel(self.card, copy.deepcopy(self.costs.learnt)), self.card, self.layout)

    def seconds(self, kind: str, params: ResolvedParams, units: int, batch: int = 1, first: bool = False) -> float:
        unit = self.costs.units.get(unit_key(kind, params, self.layout.num_ranks, batch, first))
        if unit is None:
            self.computed += 1
            unit = Unit(self._model.unit("first_decode" if first else kind, params, batch))
        else:
            self.looked_up += 1
        return units * unit.seconds * self._jitter(unit.cv if self.cv is None else self.cv)

    def _jitter(self, cv: float) -> float:
        """Log-normal with mean 1."""
        if not cv:
            return 1.0
        sigma = math.sqrt(math.log(1 + cv * cv))
        return self.random_.lognormvariate(-sigma * sigma / 2, sigma)


# ---- policies ---------------------------------------------------------------------------------------------------

News = tuple[bytes, Progress | Completed | Failed | Cancelled]


class Policy(Protocol):
    """What the simulator needs of a scheduler: `runtime.scheduler.Scheduler` has it, and so may a sketch."""

    def gateway_joined(self, gateway: bytes, endpoint: str, credits: int) -> None: ...
    def group_ready(self) -> None: ...
    def submit(self, gateway: bytes, requests: tuple[Request, ...], now: float) -> None: ...
    def granted(self, gateway: bytes, credits: int) -> None: ...
    def stored(self, gateway: bytes, request_id: str, now: float) -> None: ...
    def completed(self, rank: int, seq: int, seconds: float, now: float) -> None: ...
    def plan(self, now: float) -> list[WorkItem]: ...
    def take_news(self) -> list[News]: ...


MakePolicy = Callable[[Card, Layout, CostModel], Policy]


def steps_policy(order: str, *, max_size: int = 16, max_active: int = 64) -> MakePolicy:
    """The runtime's scheduler."""
    limits = BatchLimits(max_size)
    return lambda card, layout, cost: Scheduler(card, layout, cost, order, limits, max_active=max_active)


@dataclass
class StaticBatch:
    """Request batching: equal requests, as many as the queue and the budget have, run together from start to end."""

    card: Card
    layout: Layout
    cost: CostModel
    limits: BatchLimits = field(default_factory=BatchLimits)
    _queue: deque[tuple[float, Request]] = field(default_factory=deque)
    _batch: list[Request] = field(default_factory=list)
    _decodes: deque[Request] = field(default_factory=deque)
    _running: dict[int, tuple[Encode | Denoise | Decode, set[int]]] = field(default_factory=dict)
    _stage: str = "encode"
    _news: list[News] = field(default_factory=list)
    _seq: int = 0

    def gateway_joined(self, gateway: bytes, endpoint: str, credits: int) -> None: ...

    def group_ready(self) -> None: ...

    def granted(self, gateway: bytes, credits: int) -> None: ...

    def submit(self, gateway: bytes, requests: tuple[Request, ...], now: float) -> None:
        self._queue.extend((now, request) for request in requests)

    def stored(self, gateway: bytes, request_id: str, now: float) -> None:
        self._batch = [request for request in self._batch if request.id != request_id]
        self._news.append((GATEWAY, Completed(request_id, {})))

    def completed(self, rank: int, seq: int, seconds: float, now: float) -> None:
        item, waiting = self._running[seq]
        waiting.discard(rank)
        if waiting:
            return
        del self._running[seq]
        if isinstance(item, Encode):
            self._stage = "denoise"
        elif isinstance(item, Denoise):
            self._stage = "decode"
            self._decodes.extend(self._batch)

    def plan(self, now: float) -> list[WorkItem]:
        if not self._batch:
            self._batch = self._next_batch(now)
            self._stage = "encode"
        everyone = tuple(range(self.layout.num_ranks))
        if self._stage == "decode":
            busy = {rank for item, _ in self._running.values() for rank in item.ranks}
            free = [rank for rank in everyone if rank not in busy]
            return [self._start(self._decode(rank)) for rank in free if self._decodes]
        if self._running or not self._batch:
            return []
        if self._stage == "encode":
            return [self._start(Encode(self._next_seq(), everyone, tuple(self._batch)))]
        ids = tuple(request.id for request in self._batch)
        steps = self._batch[0].params.num_inference_steps
        return [self._start(Denoise(self._next_seq(), everyone, self.layout, ids, steps))]

    def take_news(self) -> list[News]:
        news, self._news = self._news, []
        return news

    def _next_batch(self, now: float) -> list[Request]:
        """The first in line that is still wanted, and those like it."""
        late = [(since, r) for since, r in self._queue if r.timeout_s is not None and since + r.timeout_s <= now]
        for entry in late:
            self._queue.remove(entry)
            self._news.append((GATEWAY, Cancelled(entry[1].id, "its timeout passed")))
        if not self._queue:
            return []
        params = self._queue[0][1].params
        most = batch_budget(self.cost, self.limits, params, self.layout)
        alike = [entry for entry in self._queue if self._kin(entry[1].params) == self._kin(params)][:most]
        for entry in alike:
            self._queue.remove(entry)
        return [request for _, request in alike]

    def _kin(self, params: ResolvedParams) -> tuple[Any, ...]:
        return (*self.card.batch_key(params, 0), params.num_inference_steps)

    def _decode(self, rank: int) -> Decode:
        request = self._decodes.popleft()
        return Decode(self._next_seq(), (rank,), request.id, len(self.card.decode_chunks(request.params)), "")

    def _start(self, item: Encode | Denoise | Decode) -> WorkItem:
        self._running[item.seq] = (item, set(item.ranks))
        return item

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq


POLICIES: dict[str, MakePolicy] = {
    "whole-request": steps_policy("fifo", max_size=1, max_active=1),
    "static-batch": StaticBatch,
    "fifo": steps_policy("fifo"),
    "srpt": steps_policy("srpt"),
    "deadline": steps_policy("deadline"),
}
"""Name -> how to make one replica's scheduler. An elastic policy needs no more than an entry: its items say on which
ranks and in which layout they run."""


# ---- the simulation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything about a run but the trace, the policy and the seed."""

    costs: Costs
    ranks: int = 2
    replicas: int = 1
    cv: float | None = None
    decision_s: float = 0.0
    gap_s: float | None = None
    """Instead of the file's."""
    timeout_scale: float | None = None
    """Gives every request a timeout of so many times its time alone."""
    slo_scale: float = SLO_SCALE
    as_measured: bool = False
    """Begin with what the scheduler believed then, not with what it learnt."""
    weather: tuple[float, ...] = ()
    """How much slower than usual the machine is in each `WEATHER_S` of the trace: others load it too."""

    def __post_init__(self) -> None:
        if self.ranks % self.replicas:
            raise ValueError(f"{self.ranks} ranks do not divide by {self.replicas} replicas")

    @property
    def gap(self) -> float:
        return self.decision_s + (self.costs.gap_s if self.gap_s is None else self.gap_s)

    def slowness(self, now: float) -> float:
        return self.weather[min(int(now / WEATHER_S), len(self.weather) - 1)] if self.weather else 1.0

    def layout(self, card: Card) -> Layout:
        """One replica's: as much Ulysses as the heads allow, the rest ring."""
        ranks = self.ranks // self.replicas
        ulysses = math.gcd(ranks, card.heads) if isinstance(card, WanCard) else ranks
        return Layout(1, ranks // ulysses, ulysses)


@dataclass
class Ended:
    """One request's fate."""

    arrival: Arrival
    seconds: float
    """From the client's request to its last frame, or to its end."""
    completed: bool


@dataclass
class Outcome:
    """What one simulated run showed."""

    ended: list[Ended] = field(default_factory=list)
    makespan_s: float = 0.0
    busy_rank_s: float = 0.0
    ranks: int = 1
    items: int = 0
    preemptions: int = 0
    """Times that a request with steps left was not in its replica's next denoising item."""
    stalled_s: float = 0.0
    """Sum over replicas: requests were there and no item ran."""
    plan_s: list[float] = field(default_factory=list)
    """Real seconds that each plan() took; the only figure that is not simulated."""
    from_table: float = 0.0
    """Share of the items whose time was looked up, not computed from the lines."""


class _Replica:
    """One scheduler and its ranks."""

    def __init__(self, policy: Policy, truth: Truth) -> None:
        self.policy = policy
        self.truth = truth
        self.requests: dict[str, ResolvedParams] = {}
        self.chunks: dict[str, int] = defaultdict(int)
        self.running: dict[int, tuple[WorkItem, float]] = {}
        self.steps_left: dict[str, int] = {}
        self.last_batch: tuple[str, ...] = ()
        """Of the latest denoising item."""
        self.backlog_s = 0.0
        self.stalled_since: float | None = None
        policy.gateway_joined(GATEWAY, "", CREDITS)
        policy.group_ready()

    def seconds(self, item: Encode | Denoise | Decode) -> float:
        """What the ranks will take."""
        match item:
            case Encode():
                return self.truth.seconds("encode", item.requests[0].params, item_size(item)[1])
            case Denoise():
                params = self.requests[item.request_ids[0]]
                return self.truth.seconds("denoise", params, item.steps, len(item.request_ids))
            case Decode():
                params, done = self.requests[item.request_id], self.chunks[item.request_id]
                first = self.truth.seconds("decode", params, 1, first=True) if done == 0 else 0.0
                rest = item.chunks - (done == 0)
                return first + (self.truth.seconds("decode", params, rest) if rest else 0.0)

    def denoise(self, item: Denoise) -> int:
        """Count an item's steps; returns how many of the last batch are put off by it."""
        put_off = [name for name in self.last_batch if name not in item.request_ids and self.steps_left.get(name)]
        for name in item.request_ids:
            left = self.steps_left.get(name, self.requests[name].num_inference_steps)
            self.steps_left[name] = left - item.steps
        self.last_batch = item.request_ids
        return len(put_off)

    def finish(self, item: Encode | Denoise | Decode, seconds: float, now: float) -> None:
        """Every rank reports; the gateway has consumed the chunks by then."""
        if isinstance(item, Decode):
            self.chunks[item.request_id] += item.chunks
            self.policy.granted(GATEWAY, item.chunks)
        for rank in item.ranks:
            self.policy.completed(rank, item.seq, seconds, now)
        if isinstance(item, Decode) and item.request_id in self.requests:
            params = self.requests[item.request_id]
            if self.chunks[item.request_id] == len(self.truth.card.decode_chunks(params)):
                self.policy.stored(GATEWAY, item.request_id, now)


Event = tuple[float, int, int, Arrival | WorkItem | None]
"""(when, number, replica or -1, what: an arrival, an item's end, or a deadline)."""


class Simulation:
    """A trace, a policy, and the virtual clock between them."""

    def __init__(self, trace: Sequence[Arrival], make: MakePolicy, setup: Setup, seed: int = 0) -> None:
        self._setup = setup
        card = setup.costs.card()
        layout = setup.layout(card)
        self._truth = Truth(setup.costs, card, layout, random.Random(seed), setup.cv)
        believed = setup.costs.start if setup.as_measured and setup.costs.start else setup.costs.learnt
        self._judge = Predictions(CostModel(card, copy.deepcopy(believed)), card, layout)
        self._replicas = [
            _Replica(make(card, layout, CostModel(card, copy.deepcopy(believed))), self._truth)
            for _ in range(setup.replicas)
        ]
        self._events: list[Event] = []
        self._numbers = 0
        self._open: dict[str, tuple[Arrival, float]] = {}
        self._work_cache: dict[str, float] = {}
        self._alone = Alone(setup) if setup.timeout_scale is not None else None
        self.outcome = Outcome(ranks=setup.ranks)
        for arrival in trace:
            self._push(arrival.arrival_s + setup.costs.submit_s, -1, arrival)

    def run(self) -> Outcome:
        now = 0.0
        while self._events:
            now = self._events[0][0]
            touched: dict[int, None] = {}
            while self._events and self._events[0][0] <= now + EPSILON:
                touched[self._hear(heapq.heappop(self._events), now)] = None
            for index in touched:
                self._schedule(index, now)
        assert not self._open, f"{len(self._open)} requests never ended, {next(iter(self._open))} among them"
        drawn = self._truth.looked_up + self._truth.computed
        self.outcome.from_table = self._truth.looked_up / drawn if drawn else 0.0
        return self.outcome

    def _hear(self, event: Event, now: float) -> int:
        """One event; returns whose scheduler has to look at it."""
        _, _, index, what = event
        if isinstance(what, Arrival):
            return self._arrive(what, now)
        if isinstance(what, Encode | Denoise | Decode):
            replica = self._replicas[index]
            _, seconds = replica.running.pop(what.seq)
            replica.finish(what, seconds, now)
        return index

    def _arrive(self, arrival: Arrival, now: float) -> int:
        params = resolved(arrival)
        timeout = arrival.timeout_s
        if self._alone is not None and self._setup.timeout_scale is not None:
            timeout = self._setup.timeout_scale * self._alone(arrival)
        index = min(range(len(self._replicas)), key=lambda i: (self._replicas[i].backlog_s, i))
        replica = self._replicas[index]
        replica.backlog_s += self._work(arrival, params)
        replica.requests[arrival.id] = params
        self._open[arrival.id] = (arrival, replica.backlog_s)
        request = Request(arrival.id, params, key=arrival.key, timeout_s=timeout)
        replica.policy.submit(GATEWAY, (request,), now)
        if timeout is not None:
            self._push(now + timeout, index, None)
        return index

    def _schedule(self, index: int, now: float) -> None:
        replica = self._replicas[index]
        started = time.perf_counter()
        items = replica.policy.plan(now)
        self.outcome.plan_s.append(time.perf_counter() - started)
        for item in items:
            if isinstance(item, Encode | Denoise | Decode):
                self._start(index, item, now)
        for _, news in replica.policy.take_news():
            if not isinstance(news, Progress):
                self._end(replica, news, now)
        self._watch_for_stalls(replica, now)

    def _start(self, index: int, item: Encode | Denoise | Decode, now: float) -> None:
        replica = self._replicas[index]
        seconds = replica.seconds(item) * self._setup.slowness(now)
        replica.running[item.seq] = (item, seconds)
        self.outcome.items += 1
        self.outcome.busy_rank_s += seconds * len(item.ranks)
        if isinstance(item, Denoise):
            self.outcome.preemptions += replica.denoise(item)
        self._push(now + self._setup.gap + seconds, index, item)

    def _end(self, replica: _Replica, news: Completed | Failed | Cancelled, now: float) -> None:
        arrival, _ = self._open.pop(news.request_id)
        replica.backlog_s -= self._work(arrival, replica.requests.pop(news.request_id))
        replica.steps_left.pop(news.request_id, None)
        seconds = now + self._setup.costs.deliver_s - arrival.arrival_s
        self.outcome.makespan_s = now
        self.outcome.ended.append(Ended(arrival, seconds, isinstance(news, Completed)))

    def _watch_for_stalls(self, replica: _Replica, now: float) -> None:
        if replica.stalled_since is not None:
            self.outcome.stalled_s += now - replica.stalled_since
        replica.stalled_since = now if replica.requests and not replica.running else None

    def _work(self, arrival: Arrival, params: ResolvedParams) -> float:
        """Predicted seconds alone: what the gateway knows of a request when it chooses a replica."""
        if arrival.group not in self._work_cache:
            units = {
                "encode": 1,
                "denoise": params.num_inference_steps,
                "first_decode": 1,
                "decode": len(self._truth.card.decode_chunks(params)) - 1,
            }
            self._work_cache[arrival.group] = sum(
                count * self._judge.unit(kind, params) for kind, count in units.items()
            )
        return self._work_cache[arrival.group]

    def _push(self, when: float, index: int, what: Arrival | WorkItem | None) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (when, self._numbers, index, what))


def simulate(trace: Sequence[Arrival], policy: str, setup: Setup, seed: int = 0) -> Outcome:
    """One run of one policy; the same arguments give the same outcome (but for `plan_s`)."""
    return Simulation(trace, POLICIES[policy], setup, seed).run()


def resolved(arrival: Arrival) -> ResolvedParams:
    return ResolvedParams(
        prompt=arrival.prompt,
        negative_prompt="",
        num_inference_steps=arrival.num_inference_steps,
        guidance_scale=arrival.guidance_scale,
        seed=arrival.seed,
        height=arrival.height,
        width=arrival.width,
        num_frames=arrival.num_frames,
        fps=16,
    )


class Alone:
    """Seconds of a request that has a replica to itself, without jitter; by class."""

    def __init__(self, setup: Setup) -> None:
        ranks = setup.ranks // setup.replicas
        self._setup = replace(setup, ranks=ranks, replicas=1, cv=0.0, timeout_scale=None, as_measured=False, weather=())
        self._known: dict[str, float] = {}

    def __call__(self, arrival: Arrival) -> float:
        if arrival.group not in self._known:
            alone = msgspec.structs.replace(arrival, arrival_s=0.0, timeout_s=None)
            self._known[arrival.group] = simulate([alone], "fifo", self._setup).ended[0].seconds
        return self._known[arrival.group]


# ---- figures ----------------------------------------------------------------------------------------------------


def summarize(outcome: Outcome, alone: Alone, slo_scale: float) -> dict[str, Any]:
    """All the figures of one run: of everything, and per class."""
    groups: dict[str, list[Ended]] = defaultdict(list)
    for ended in outcome.ended:
        groups[ended.arrival.group].append(ended)
    total = outcome.ranks * outcome.makespan_s
    return {
        **_latencies(outcome.ended, alone, slo_scale),
        "classes": {name: _latencies(groups[name], alone, slo_scale) for name in sorted(groups)},
        "makespan_s": outcome.makespan_s,
        "rank_s_per_request": outcome.busy_rank_s / len(outcome.ended),
        "idle_share": 1 - outcome.busy_rank_s / total if total else 0.0,
        "preemptions_per_request": outcome.preemptions / len(outcome.ended),
        "stalled_s": outcome.stalled_s,
        "items": outcome.items,
        "from_table": outcome.from_table,
        "plan_ms_p50": 1000 * quantile(outcome.plan_s, 0.5),
        "plan_ms_p99": 1000 * quantile(outcome.plan_s, 0.99),
    }


def _latencies(ended: Iterable[Ended], alone: Alone, slo_scale: float) -> dict[str, float]:
    """Seconds of those that completed; whoever did not has missed its objective."""
    ended = list(ended)
    seconds = [one.seconds for one in ended if one.completed] or [math.nan]
    slowdown = [one.seconds / alone(one.arrival) for one in ended if one.completed] or [math.nan]
    return {
        "n": len(ended),
        "completed": sum(one.completed for one in ended),
        "mean_s": statistics.fmean(seconds),
        "p50_s": quantile(seconds, 0.5),
        "p90_s": quantile(seconds, 0.9),
        "p95_s": quantile(seconds, 0.95),
        "p99_s": quantile(seconds, 0.99),
        "mean_slowdown": statistics.fmean(slowdown),
        "slo": statistics.fmean([_in_time(one, alone, slo_scale) for one in ended]),
    }


def _in_time(one: Ended, alone: Alone, slo_scale: float) -> bool:
    limit = one.arrival.slo_s if one.arrival.slo_s is not None else slo_scale * alone(one.arrival)
    return one.completed and one.seconds <= limit


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def average(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of every figure; for the mean latency and the SLO also half of their 95 % interval."""
    merged: dict[str, Any] = {}
    for name in runs[0]:
        values = [run[name] for run in runs if name in run]
        merged[name] = _average_classes(values) if name == "classes" else statistics.fmean(values)
    if len(runs) > 1:
        t = STUDENT_T.get(len(runs), 1.96)
        for name in ("mean_s", "slo"):
            merged[f"{name}_95"] = t * statistics.stdev([run[name] for run in runs]) / math.sqrt(len(runs))
    return merged


def _average_classes(values: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    names = sorted({name for value in values for name in value})
    return {name: average([value[name] for value in values if name in value]) for name in names}


@dataclass
class Study:
    """A workload under several policies and loads, over several seeds."""

    workload: Workload
    setup: Setup
    seeds: int
    count: int | None = None
    keys: int = 1

    def __post_init__(self) -> None:
        self.alone = Alone(self.setup)
        sample = self.workload.trace(1.0, 0, 4000)
        self.mean_alone_s = statistics.fmean(self.alone(arrival) for arrival in sample)

    def rate(self, load: float) -> float:
        """Load 1 is what replicas could carry that serve one request after the other."""
        return load * self.setup.replicas / self.mean_alone_s

    def run(self, policy: str, rate: float) -> dict[str, Any]:
        runs = []
        for seed in range(1, self.seeds + 1):
            trace = self.workload.trace(rate, seed, self.count, self.keys)
            runs.append(summarize(simulate(trace, policy, self.setup, seed), self.alone, self.setup.slo_scale))
        return average(runs)

    def goodput(self, policy: str, rounds: int = 7) -> float:
        """Requests per second: by bisection, up to three times what whole requests could carry."""
        low, high = 0.0, self.rate(3.0)
        for _ in range(rounds):
            middle = (low + high) / 2
            low, high = (middle, high) if self.run(policy, middle)["slo"] >= ENOUGH else (low, middle)
        return low


# ---- recording a real scheduler ---------------------------------------------------------------------------------


class Submitted(msgspec.Struct, frozen=True, tag=True):
    id: str
    now: float


class ItemDone(msgspec.Struct, frozen=True, tag=True):
    """An item as the real scheduler saw it; `seconds` are the ranks' own."""

    kind: str
    ids: tuple[str, ...]
    units: int
    first: bool
    ranks: int
    seconds: float
    planned: float
    finished: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """What the scheduler believes when the ranks are ready."""

    believed: Constants


Row = Submitted | ItemDone | Ready


class RecordingScheduler(Scheduler):
    """The runtime's scheduler that also writes down what it was told; decides nothing else."""

    sink: ClassVar[BinaryIO]

    def group_ready(self, memory_budget: int | None = None) -> None:
        super().group_ready(memory_budget)
        self._write(Ready(self.cost.constants))

    def submit(self, gateway: bytes, requests: tuple[Request, ...], now: float) -> None:
        super().submit(gateway, requests, now)
        for request in requests:
            self._write(Submitted(request.id, now))

    def _finish(self, running: Running, now: float) -> None:
        self._write(self._row(running, list(self._records_of(running.item)), now))
        super()._finish(running, now)

    def _write(self, row: Row) -> None:
        self.sink.write(msgspec.json.encode(row) + b"\n")

    def _row(self, running: Running, records: list[RequestRecord], now: float) -> ItemDone:
        item = running.item
        units = item_size(item)[1]
        first = isinstance(item, Decode) and bool(records) and records[0].chunk == 0
        ids = tuple(record.id for record in records)
        kind = type(item).__name__.lower()
        return ItemDone(kind, ids, units, first, len(item.ranks), running.seconds, running.started, now)


def learn(rows: Iterable[ItemDone], params: dict[str, ResolvedParams], setup: Setup, begin: Constants) -> Constants:
    """What the scheduler believes after these items."""
    card = setup.costs.card()
    model = CostModel(card, copy.deepcopy(begin))
    predictions = Predictions(model, card, setup.layout(card))
    for row in rows:
        batch = len(row.ids) if row.kind == "denoise" else 1
        predictions.learn(row.kind, params[row.ids[0]], row.units, row.seconds, batch)
    return model.constants


def measured_units(rows: Iterable[ItemDone], params: dict[str, ResolvedParams]) -> dict[str, Unit]:
    """Mean and spread of the items' seconds per unit, long items weighing more."""
    seen: dict[str, list[ItemDone]] = defaultdict(list)
    for row in rows:
        seen[unit_key(row.kind, params[row.ids[0]], row.ranks, len(row.ids), row.first)].append(row)
    units = {}
    for key, items in sorted(seen.items()):
        mean = sum(item.seconds for item in items) / sum(item.units for item in items)
        each = [item.seconds / item.units for item in items]
        units[key] = Unit(mean, statistics.stdev(each) / mean if len(each) > 2 else 0.0, len(items))
    return units


def measured_weather(
    rows: Iterable[ItemDone], params: dict[str, ResolvedParams], units: dict[str, Unit], began: float
) -> tuple[float, ...]:
    """Seconds that items took over what their units usually take, along the trace; idle times are as before."""
    took, usual = defaultdict[int, float](float), defaultdict[int, float](float)
    for row in rows:
        window = max(int((row.planned - began) / WEATHER_S), 0)
        took[window] += row.seconds
        key = unit_key(row.kind, params[row.ids[0]], row.ranks, len(row.ids), row.first)
        usual[window] += row.units * units[key].seconds
    weather: list[float] = []
    for window in range(max(took) + 1):
        weather.append(took[window] / usual[window] if usual[window] else (weather or [1.0])[-1])
    return tuple(weather)


def record_main(arguments: Sequence[str]) -> None:
    """The scheduler process with a recording scheduler: `--record FILE` and then its own arguments."""
    import runtime.__main__ as process

    with Path(arguments[0]).open("wb", buffering=0) as RecordingScheduler.sink:
        process.Scheduler = RecordingScheduler  # type: ignore[attr-defined]
        sys.argv = ["runtime", *arguments[1:]]
        process.main()


# ---- command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.record:
        record_main(args.record)
        return
    if args.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -e '.[bench]'")
    where = machine()
    results = _study(args) if args.workload else _replay(args)
    # Somebody's trace is no benchmark of ours: kept under a name or not at all.
    if variant := args.name or args.workload:
        save("simulate", where, results, variant=variant)
    else:
        print(shown("simulate", where, results))


def _study(args: argparse.Namespace) -> dict[str, Any]:
    workload = WORKLOADS[args.workload]
    constants = args.constants or HOME / workload.constants
    study = Study(workload, _setup(args, constants), args.seeds, args.count, args.keys)
    rows = []
    for rate in args.rates or [study.rate(load) for load in args.loads]:
        for policy in args.policies:
            row = {"policy": policy, "rate": rate, "load": rate / study.rate(1.0), **study.run(policy, rate)}
            rows.append(row)
    figures: dict[str, Any] = {**_about(args, constants, study.setup), "mean_alone_s": study.mean_alone_s, "rows": rows}
    if args.goodput:
        figures["goodput_per_s"] = {policy: study.goodput(policy) for policy in args.policies}
    if args.plot is not None:
        from bench.simplot import plot_loads

        plot_loads(f"{args.workload}: {workload.about}", rows, args.plot)
    return figures


def _replay(args: argparse.Namespace) -> dict[str, Any]:
    if args.trace is None or args.constants is None:
        raise SystemExit("give --workload NAME, or --trace FILE and --constants FILE")
    setup, trace = _setup(args, args.constants), read_trace(args.trace)
    alone = Alone(setup)
    rows = []
    for policy in args.policies:
        seeds = range(1, args.seeds + 1)
        runs = [summarize(simulate(trace, policy, setup, seed), alone, setup.slo_scale) for seed in seeds]
        rows.append({"policy": policy, **average(runs)})
    return {**_about(args, args.constants, setup), "trace": args.trace.name, "rows": rows}


def _setup(args: argparse.Namespace, constants: Path) -> Setup:
    return Setup(
        costs=read_costs(constants),
        ranks=args.ranks,
        replicas=args.replicas,
        cv=args.jitter,
        decision_s=args.decision_ms / 1000,
        gap_s=None if args.gap_ms is None else args.gap_ms / 1000,
        timeout_scale=args.timeout_scale,
        slo_scale=args.slo_scale,
    )


def _about(args: argparse.Namespace, constants: Path, setup: Setup) -> dict[str, Any]:
    return {
        "constants": constants.name,
        "note": setup.costs.note,
        "ranks": setup.ranks,
        "replicas": setup.replicas,
        "seeds": args.seeds,
        "gap_ms": 1000 * setup.gap,
        "slo": f"{setup.slo_scale:g}x alone, or the trace's slo_s",
        "timeout": f"{setup.timeout_scale:g}x alone" if setup.timeout_scale is not None else "the trace's",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--trace", type=Path, help="replay this file instead")
    parser.add_argument("--constants", type=Path, help="costs; unset: the workload's own")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--ranks", type=int, default=2, help="in all")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, help="requests a run")
    parser.add_argument("--keys", type=int, default=1, help="API keys")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9, 1.1])
    parser.add_argument("--rates", type=float, nargs="+", help="requests per second, instead of loads")
    parser.add_argument("--jitter", type=float, help="coefficient of variation of items, instead of the file's")
    parser.add_argument("--decision-ms", type=float, default=0.0)
    parser.add_argument("--gap-ms", type=float, help="per item, instead of the file's")
    parser.add_argument("--timeout-scale", type=float, help="give up after so many times the time alone")
    parser.add_argument("--slo-scale", type=float, default=SLO_SCALE)
    parser.add_argument("--goodput", action="store_true", help="bisect for the highest rate with 90 %% in time")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--name", help="of the result file; unset: the workload's, and a replay is only printed")
    parser.add_argument("--record", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
