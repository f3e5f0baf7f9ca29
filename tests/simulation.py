"""Simulated ranks and gateways around the pure scheduler; they check every item that they are given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec
from fake_mesh import demo_model

from runtime.batching import BatchLimits
from runtime.checkpoints import Leftovers
from runtime.layout import Layout
from runtime.models.card import card_for
from runtime.protocol import (
    Checkpoint,
    Completed,
    Decode,
    Denoise,
    Encode,
    Failed,
    Progress,
    Release,
    Request,
    SavedState,
)
from runtime.sampling import SamplingParams
from runtime.scheduler import MAX_ACTIVE, Scheduler

CARD = card_for(demo_model().configs)
SECONDS = {"encode": 0.05, "denoise": 0.02, "first_decode": 0.03, "decode": 0.03}
"""True and, by default, predicted time of one unit: 5 steps or 3 chunks make an item."""


@dataclass
class KnownCost:
    """A cost model that is right from the start."""

    seconds: dict[str, float] = field(default_factory=lambda: dict(SECONDS))
    growth: float = 1.0
    """What each further member adds to a batch's time, as a share of the first's; below 1 batching pays."""
    observed: list[tuple[str, int]] = field(default_factory=list)

    def predict(self, kind, params, layout, batch=1):
        return self.seconds[kind] * (1 + self.growth * (batch - 1))

    fitted = predict

    def measured(self, kind, params, layout, batch=1):
        return True

    def compare(self, kind, params, layout, units, seconds, batch=1):
        pass

    def observe(self, kind, params, layout, units, seconds, batch=1):
        self.observed.append((kind, units))


@dataclass
class State:
    """What a rank holds of one request."""

    params: object
    steps: int = 0
    chunks: int = 0
    decode_rank: int | None = None


@dataclass
class Gateway:
    """Takes chunks as gateway.mesh does, and grants a credit for each when it consumes it."""

    limit: int
    inbox: list[tuple[str, int, int]] = field(default_factory=list)
    """(request, attempt, number of the chunk)."""
    excess: int = 0
    """Chunks that arrived although the scheduler took them for lost: the only ones that may exceed the limit."""
    highest: Counter[str] = field(default_factory=Counter)
    """The latest attempt of a request that was seen."""
    stored: Counter[str] = field(default_factory=Counter)
    """Chunks of a request that it has."""


class Simulation:
    """Ranks and gateways around a Scheduler, with a virtual clock; checks every item that it is given.

    What a rank may rely on is asserted here, at the moment when the item is issued.
    """

    def __init__(
        self,
        *,
        num_ranks=2,
        cost=None,
        ready=True,
        budget=None,
        policy="srpt",
        max_batch=4,
        weights=None,
        checkpoint_every=0,
        found=None,
        decode_on_all=False,
        slow=1.0,
        max_active=MAX_ACTIVE,
    ):
        self.cost = cost or KnownCost()
        limits = BatchLimits(max_batch)
        self.scheduler = Scheduler(
            CARD,
            Layout(1, 1, num_ranks),
            self.cost,
            policy,
            limits,
            weights=weights or {},
            checkpoint_every=checkpoint_every,
            found=Leftovers(dict(found or {})),
            decode_on_all=decode_on_all,
            max_active=max_active,
        )
        self.budget = budget
        self.slow = slow
        """How many times longer everything takes."""
        self.now = 0.0
        self.ranks = tuple(range(num_ranks))
        self.items = []
        self.news = []
        self.ends = {}
        self.params = {}
        self.predicted: dict[str, float] = {}
        """Seconds of work of a request when it arrived."""
        self.owner: dict[str, bytes] = {}
        """The gateway that hears of a request."""
        self.adoptions: Counter[str] = Counter()
        self.lost_with: Counter[str] = Counter()
        """How often the group was lost during an item of a request."""
        self.disturbed: set[str] = set()
        """Requests that had to do something twice."""
        self.files: dict[str, SavedState] = dict(found or {})
        """The spool: the newest checkpoint of a request."""
        self.told: dict[str, SavedState] = dict(found or {})
        """The newest checkpoint of a request that the scheduler has heard of."""
        self.untold: list[tuple[str, SavedState]] = []
        """Those that are durable, while the word of it is on its way."""
        self.writing: list[tuple[str, int]] = []
        self.states: dict[str, State] = {}
        self.running = {}
        self.due: dict[tuple[int, int], float] = {}
        self.unsent: dict[int, int] = {}
        self.failed: set[int] = set()
        self.gateways: dict[bytes, Gateway] = {}
        self.left: dict[bytes, Gateway] = {}
        self.num_joined = 0
        self.dead = False
        """The ranks died, and the scheduler has not noticed: what it sends is lost."""
        if ready:
            self.scheduler.group_ready(budget)

    # -- what happens to the scheduler --

    def join(self, name=b"g", credits=64):
        self.gateways[name] = Gateway(credits)
        self.num_joined += 1
        self.scheduler.gateway_joined(name, endpoint_of(name), credits)

    def leave(self, name):
        self.left[name] = self.gateways.pop(name)
        self.scheduler.gateway_lost(name, self.now)
        self.settle()

    def submit(self, *ids, gateway=b"g", steps=10, frames=9, side=64, prompt=None, **terms):
        """What arrives together; without a prompt each has its own."""
        shape = {"num_inference_steps": steps, "num_frames": frames, "height": side, "width": side}
        params = CARD.check(SamplingParams(prompt="a cat", seed=1, **shape))
        self.params |= {name: msgspec.structs.replace(params, prompt=prompt or f"a cat named {name}") for name in ids}
        self.owner |= dict.fromkeys(ids, gateway)
        requests = tuple(Request(request_id, self.params[request_id], **terms) for request_id in ids)
        self.scheduler.submit(gateway, requests, self.now)
        self.predicted |= {
            one: self.scheduler.requests[one].remaining_s for one in ids if one in self.scheduler.requests
        }
        self.settle()

    def resubmit(self, request_id, gateway, **terms):
        """A gateway hands in an id that has not ended; another one than before takes it over."""
        if gateway != self.owner[request_id] and gateway in self.gateways:
            self.owner[request_id] = gateway
            self.adoptions[request_id] += 1
            self.disturbed.add(request_id)
            # One that had it before begins again as well.
            self.gateways[gateway].stored[request_id] = 0
        self.scheduler.submit(gateway, (Request(request_id, self.params[request_id], **terms),), self.now)
        self.settle()

    def cancel(self, request_id):
        self.scheduler.cancel(request_id, "why not", self.now)
        self.settle()

    def report(self, rank, seq, failure=None):
        """One rank is done with its part of an item."""
        self.now = max(self.now, self.due.pop((rank, seq)))
        item = self.running[seq]
        over = not any(other == seq for _, other in self.due)
        if over:
            del self.running[seq]
        if failure is not None:
            self.disturbed |= set(ids_of(item))
            self.failed.add(seq)
        elif isinstance(item, Decode) and rank == item.ranks[0]:
            while self.unsent[seq]:
                self.send_chunk(seq)
        if isinstance(item, Decode) and over:
            left = self.unsent.pop(seq)
            if seq in self.failed:
                self.excess(item.endpoint, item.chunks - left)
        if failure is not None:
            self.scheduler.failed(rank, seq, *failure, self.now)
        else:
            self.scheduler.completed(rank, seq, self.seconds_of(item), self.now)
        self.settle()

    def lose_group(self, reason="rank 1 died", culprit=None, durable=0):
        """The ranks die; of the checkpoints that were being written so many are durable, but nobody has said so."""
        reports = list(self.due)
        for item in self.running.values():
            if culprit is None:
                self.lost_with.update(ids_of(item))
        self.disturbed |= set(self.states)
        self.due.clear()
        self.running.clear()
        self.unsent.clear()
        for request_id, step in self.writing[:durable]:
            if request_id in self.states:
                self.keep(request_id, step)
        self.writing.clear()
        self.states.clear()
        for gateway in self.gateways.values():
            gateway.excess += len(gateway.inbox)
        self.scheduler.group_lost(reason, self.now, culprit)
        self.settle()
        for rank, seq in reports:
            # What a rank of the lost group had sent before it died.
            self.scheduler.completed(rank, seq, 1.0, self.now)
            self.scheduler.failed(rank, seq, "late", "too late", self.now)
        self.settle()

    def regroup(self):
        self.dead = False
        self.scheduler.group_ready(self.budget)
        self.settle()

    def send_chunk(self, seq):
        """One chunk of a running decode arrives at its gateway; the item goes on."""
        item = self.running.get(seq) or next(i for i in self.items if i.seq == seq)
        number = item.first_chunk + item.chunks - self.unsent[seq]
        self.unsent[seq] -= 1
        gateway = self.gateways.get(name_of(item.endpoint))
        if gateway is not None:
            gateway.inbox.append((item.request_id, item.attempt, number))

    def consume(self, name):
        """The gateway stores one chunk or drops it, and gives the credit back; after a request's last chunk it says
        that it has all."""
        gateway = self.gateways[name]
        request_id, attempt, number = gateway.inbox.pop(0)
        self.scheduler.granted(name, 1)
        if attempt >= gateway.highest[request_id] and number == gateway.stored[request_id]:
            gateway.highest[request_id] = attempt
            gateway.stored[request_id] += 1
            if number + 1 == self.total_chunks(request_id) and self.owner[request_id] == name:
                self.scheduler.stored(name, request_id, self.now)
        self.settle()

    def write(self, index=0, failed=False):
        """The writer of the ranks comes to the end of a checkpoint."""
        request_id, step = self.writing.pop(index)
        if failed:
            self.scheduler.checkpoint_failed(request_id)
        elif request_id in self.states:
            self.keep(request_id, step)
            self.tell()
        else:
            # It was released while it waited to be written.
            self.scheduler.checkpoint_failed(request_id)
        self.settle()

    def keep(self, request_id, step):
        """A checkpoint is durable."""
        saved = SavedState(step, f"{request_id}-{step}", 1)
        self.files[request_id] = max(saved, self.files.get(request_id, saved), key=lambda each: each.step)
        self.untold.append((request_id, saved))

    def tell(self):
        """The writer's words arrive, whatever became of it."""
        for request_id, saved in self.untold:
            self.told[request_id] = max(saved, self.told.get(request_id, saved), key=lambda each: each.step)
            self.scheduler.checkpointed(request_id, saved)
        self.untold.clear()
        self.settle()

    def total_chunks(self, request_id):
        return len(CARD.decode_chunks(self.params[request_id]))

    # -- what the scheduler does --

    def settle(self):
        """Let it plan; check and start what it planned; keep its news."""
        self.read_news()
        items = self.scheduler.plan(self.now)
        self.read_news()
        for item in items:
            assert item.seq > (self.items[-1].seq if self.items else 0)
            self.items.append(item)
            self.start(item)
        # A gateway may have a quarter of them waiting for itself before its own stay out, and a key one that has none.
        keys = len({record.key for record in self.scheduler.requests.values()})
        assert len(self.states) <= (MAX_ACTIVE + MAX_ACTIVE // 4) * max(self.num_joined, 1) + keys
        for rank in self.ranks:
            assert self.budget is None or self.bytes_on(rank) <= self.budget, "more than fits"

    def start(self, item):
        match item:
            case Release():
                self.released(item)
                return
            case Checkpoint():
                self.checkpointed(item)
                return
            case Encode():
                self.encoded(item)
            case Denoise():
                self.denoised(item)
            case Decode():
                self.decoded(item)
        for rank in item.ranks:
            assert not any(rank in other.ranks for other in self.running.values()), f"rank {rank} is in two items"
        self.running[item.seq] = item
        self.due |= {(rank, item.seq): self.now + self.seconds_of(item) for rank in item.ranks}
        for request_id in {one for other in self.running.values() for one in ids_of(other)}:
            company = sum(len(ids_of(other)) for other in self.running.values())
            assert self.lost_with[request_id] < 2 or company == 1, "a suspect has company"

    def released(self, item):
        assert item.ranks == self.ranks
        if self.dead:
            return
        in_work = {request_id for other in self.running.values() for request_id in ids_of(other)}
        for request_id in item.request_ids:
            assert request_id not in in_work
            # The ranks that held it may be gone.
            self.states.pop(request_id, None)
            if item.keep_saved:
                assert request_id not in self.ends
            else:
                assert request_id in self.ends or request_id not in self.params
                self.files.pop(request_id, None)

    def checkpointed(self, item):
        assert item.ranks == self.ranks[:1]
        in_work = {request_id for other in self.running.values() for request_id in ids_of(other)}
        for request_id in item.request_ids:
            assert request_id not in in_work
            self.writing.append((request_id, self.states[request_id].steps))

    def encoded(self, item):
        assert item.ranks == self.ranks
        for request in item.requests:
            assert request.id not in self.states
            saved = item.resume.get(request.id)
            assert saved == self.told.get(request.id), "not the newest checkpoint that it was told of"
            self.states[request.id] = State(request.params, saved.step if saved is not None else 0)

    def denoised(self, item):
        assert (item.ranks, item.layout) == (self.ranks, self.scheduler.layout)
        assert item.steps >= 1
        assert 1 <= len(set(item.request_ids)) == len(item.request_ids) <= self.scheduler.limits.max_size
        states = [self.states[request_id] for request_id in item.request_ids]
        assert len({CARD.batch_key(state.params, state.steps) for state in states}) == 1
        for request_id in item.request_ids:
            state = self.states[request_id]
            state.steps += item.steps
            assert state.steps <= state.params.num_inference_steps, "a step too many"
            assert state.decode_rank is None

    def decoded(self, item):
        state = self.states[item.request_id]
        assert state.steps == state.params.num_inference_steps, "decoded before its last step"
        assert item.chunks >= 1
        assert item.chunks == 1 or item.first_chunk > 0, "the first chunk has company"
        assert item.ranks == self.ranks if self.scheduler.decode_on_all else len(item.ranks) == 1
        rank = item.ranks[0]
        assert state.decode_rank in {None, rank} or item.first_chunk == 0, "a decode moved"
        if self.budget is None and state.decode_rank is None:
            assert not any(other.decode_rank == rank and self.open(other_id) for other_id, other in self.states.items())
        assert item.first_chunk in {0, state.chunks}
        assert item.first_chunk or not state.chunks or item.request_id in self.disturbed
        state.decode_rank = rank
        state.chunks = item.first_chunk + item.chunks
        assert state.chunks <= len(CARD.decode_chunks(state.params)), "a chunk too many"
        self.unsent[item.seq] = item.chunks
        gateway = self.gateways[name_of(item.endpoint)]
        under_way = len(gateway.inbox) + sum(
            self.unsent[other.seq]
            for other in [*self.running.values(), item]
            if isinstance(other, Decode) and other.endpoint == item.endpoint
        )
        assert under_way <= gateway.limit + gateway.excess, "more chunks under way than were granted"

    def open(self, request_id):
        """Whether its rank holds a decode that is under way."""
        state = self.states[request_id]
        done = state.chunks == len(CARD.decode_chunks(state.params)) and not self.runs(request_id)
        return state.decode_rank is not None and not done and request_id not in self.ends

    def runs(self, request_id):
        return any(request_id in ids_of(item) for item in self.running.values())

    def bytes_on(self, rank):
        held = 0
        for request_id, state in self.states.items():
            stage = "decode" if state.decode_rank == rank and self.open(request_id) else "denoise"
            held += CARD.state_bytes(state.params, stage)
        return held

    def read_news(self):
        for gateway, news in self.scheduler.take_news():
            self.news.append((gateway, news))
            assert news.request_id not in self.ends, "news after the end"
            assert gateway == self.owner[news.request_id], "news for somebody else"
            if isinstance(news, Progress):
                assert 0 <= news.step <= news.total_steps
            else:
                self.ends[news.request_id] = news
                self.ended(news)

    def ended(self, news):
        if isinstance(news, Completed):
            name = self.owner[news.request_id]
            # It may have left after its thanks, while another item of the request ran.
            gateway = self.gateways.get(name) or self.left[name]
            assert gateway.stored[news.request_id] == self.total_chunks(news.request_id), "completed without its frames"
        if isinstance(news, Failed) and news.code == "worker_lost":
            assert self.lost_with[news.request_id] == 3
        assert self.lost_with[news.request_id] < 3 or not isinstance(news, Failed) or news.code == "worker_lost"

    def excess(self, endpoint, chunks):
        if name_of(endpoint) in self.gateways:
            self.gateways[name_of(endpoint)].excess += chunks

    def seconds_of(self, item):
        match item:
            case Encode():
                seconds = SECONDS["encode"] * len({request.params.prompt for request in item.requests})
            case Denoise():
                growth = getattr(self.cost, "growth", 1.0)
                seconds = SECONDS["denoise"] * item.steps * (1 + growth * (len(item.request_ids) - 1))
            case _:
                seconds = SECONDS["decode"] * item.chunks
        return seconds * self.slow

    # -- time --

    def next_report(self):
        """The report that is due first."""
        rank, seq = min(self.due, key=lambda key: (self.due[key], key))
        self.report(rank, seq)

    def run(self, *, consume=True, until=lambda: False):
        """Let time pass until nothing more happens by itself."""
        while not until():
            full = [name for name, gateway in self.gateways.items() if gateway.inbox] if consume else []
            if full:
                self.consume(full[0])
            elif self.untold:
                self.tell()
            elif self.writing:
                self.write()
            elif self.due:
                self.next_report()
            else:
                return

    def run_to(self, kind):
        """Until an item of this kind runs."""
        self.run(until=lambda: any(isinstance(item, kind) for item in self.running.values()))
        return next(item for item in self.running.values() if isinstance(item, kind))

    def finish(self, item):
        self.finish_with(item, None)

    def finish_with(self, item, failure):
        for rank in item.ranks:
            self.report(rank, item.seq, failure)

    def items_of(self, kind, request_id=None):
        return [i for i in self.items if isinstance(i, kind) and (request_id is None or request_id in ids_of(i))]

    def stages(self, request_id):
        """Every stage that its news told, repeats left out."""
        told = [n.stage for _, n in self.news if isinstance(n, Progress) and n.request_id == request_id]
        return [stage for n, stage in enumerate(told) if n == 0 or told[n - 1] != stage]

    def spare_credits(self, name):
        """How many chunks can be under way, found out by a request whose chunks nobody consumes for a while."""
        probe = f"probe {name.decode()}"
        self.submit(probe, gateway=name, steps=1, frames=257)
        self.run(consume=False)
        spare = self.states[probe].chunks
        self.run()
        return spare


def endpoint_of(name):
    return f"ipc://{name.decode()}"


def name_of(endpoint):
    return endpoint.removeprefix("ipc://").encode()


def ids_of(item):
    match item:
        case Encode():
            return tuple(request.id for request in item.requests)
        case Decode():
            return (item.request_id,)
    return item.request_ids


def bytes_of(stage, frames):
    params = CARD.check(SamplingParams(prompt="a cat", seed=1, num_frames=frames))
    return CARD.state_bytes(params, stage)
