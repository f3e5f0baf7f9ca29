"""The pure scheduler with simulated ranks and gateways: single policies first, then scripts of everything at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from fake_mesh import demo_model
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cost import CostModel
from runtime.layout import Layout
from runtime.models.card import card_for
from runtime.protocol import Cancelled, Completed, Decode, Denoise, Encode, Failed, Progress, Release, Request
from runtime.sampling import SamplingParams
from runtime.scheduler import ITEM_SECONDS, MAX_ACTIVE, Scheduler

CARD = card_for(demo_model().configs)
SECONDS = {"encode": 0.05, "denoise": 0.02, "decode": 0.03}
"""True and, by default, predicted time of one unit: 5 steps or 3 chunks make an item."""


@dataclass
class KnownCost:
    """A cost model that is right from the start."""

    seconds: dict[str, float] = field(default_factory=lambda: dict(SECONDS))
    observed: list[tuple[str, int]] = field(default_factory=list)

    def predict(self, kind, params, layout):
        return self.seconds[kind]

    def observe(self, kind, params, layout, units, seconds):
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
    """Takes chunks, and grants a credit for each when it consumes it."""

    limit: int
    inbox: list[str] = field(default_factory=list)
    excess: int = 0
    """Chunks that arrived although the scheduler took them for lost: the only ones that may exceed the limit."""
    received: Counter[str] = field(default_factory=Counter)


class Simulation:
    """Ranks and gateways around a Scheduler, with a virtual clock; checks every item that it is given.

    What a rank may rely on is asserted here, at the moment when the item is issued.
    """

    def __init__(self, *, num_ranks=2, cost=None, ready=True):
        self.scheduler = Scheduler(CARD, Layout(1, 1, num_ranks), cost or KnownCost())
        self.now = 0.0
        self.ranks = tuple(range(num_ranks))
        self.items = []
        self.news = []
        self.ends = {}
        self.params = {}
        self.states: dict[str, State] = {}
        self.running = {}
        self.due: dict[tuple[int, int], float] = {}
        self.unsent: dict[int, int] = {}
        self.gateways: dict[bytes, Gateway] = {}
        self.num_joined = 0
        if ready:
            self.scheduler.group_ready()

    # -- what happens to the scheduler --

    def join(self, name=b"g", credits=64):
        self.gateways[name] = Gateway(credits)
        self.num_joined += 1
        self.scheduler.gateway_joined(name, endpoint_of(name), credits)

    def leave(self, name):
        del self.gateways[name]
        self.scheduler.gateway_lost(name, self.now)
        self.settle()

    def submit(self, *ids, gateway=b"g", steps=10, frames=9):
        params = CARD.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=steps, num_frames=frames))
        self.params |= dict.fromkeys(ids, params)
        self.scheduler.submit(gateway, tuple(Request(request_id, params) for request_id in ids), self.now)
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
            if isinstance(item, Decode):
                sent = item.chunks - self.unsent.pop(seq)
                self.excess(item.endpoint, sent)
            self.scheduler.failed(rank, seq, *failure, self.now)
        else:
            if isinstance(item, Decode):
                while self.unsent[seq]:
                    self.send_chunk(seq)
                del self.unsent[seq]
            self.scheduler.completed(rank, seq, self.seconds_of(item), self.now)
        self.settle()

    def lose_group(self, reason="rank 1 died"):
        reports = list(self.due)
        self.due.clear()
        self.running.clear()
        self.unsent.clear()
        self.states.clear()
        for gateway in self.gateways.values():
            gateway.excess += len(gateway.inbox)
        self.scheduler.group_lost(reason, self.now)
        self.settle()
        for rank, seq in reports:
            # What a rank of the lost group had sent before it died.
            self.scheduler.completed(rank, seq, 1.0, self.now)
            self.scheduler.failed(rank, seq, "late", "too late", self.now)
        self.settle()

    def regroup(self):
        self.scheduler.group_ready()
        self.settle()

    def send_chunk(self, seq):
        """One chunk of a running decode arrives at its gateway; the item goes on."""
        item = self.running.get(seq) or next(i for i in self.items if i.seq == seq)
        self.unsent[seq] -= 1
        gateway = self.gateways.get(name_of(item.endpoint))
        if gateway is not None:
            gateway.inbox.append(item.request_id)

    def consume(self, name):
        """The gateway stores one chunk, and says so; after a request's last chunk it says that it has all."""
        gateway = self.gateways[name]
        request_id = gateway.inbox.pop(0)
        gateway.received[request_id] += 1
        self.scheduler.granted(name, 1)
        if gateway.received[request_id] == len(CARD.decode_chunks(self.params[request_id])):
            self.scheduler.stored(request_id, self.now)
        self.settle()

    # -- what the scheduler does --

    def settle(self):
        """Let it plan; check and start what it planned; keep its news."""
        self.read_news()
        for item in self.scheduler.plan(self.now):
            assert item.seq > (self.items[-1].seq if self.items else 0)
            self.items.append(item)
            self.start(item)
        self.read_news()
        assert len(self.states) <= MAX_ACTIVE

    def start(self, item):
        match item:
            case Release():
                self.released(item)
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

    def released(self, item):
        assert item.ranks == self.ranks
        in_work = {request_id for other in self.running.values() for request_id in ids_of(other)}
        for request_id in item.request_ids:
            assert request_id in self.ends
            assert request_id not in in_work
            del self.states[request_id]

    def encoded(self, item):
        assert item.ranks == self.ranks
        for request in item.requests:
            assert request.id not in self.states
            self.states[request.id] = State(request.params)

    def denoised(self, item):
        assert (item.ranks, item.layout) == (self.ranks, self.scheduler.layout)
        assert item.steps >= 1
        for request_id in item.request_ids:
            state = self.states[request_id]
            state.steps += item.steps
            assert state.steps <= state.params.num_inference_steps, "a step too many"
            assert state.decode_rank is None

    def decoded(self, item):
        state = self.states[item.request_id]
        assert state.steps == state.params.num_inference_steps, "decoded before its last step"
        assert item.chunks >= 1
        assert item.chunks == 1 or state.chunks > 0, "the first chunk has company"
        (rank,) = item.ranks
        assert state.decode_rank in {None, rank}, "a decode moved"
        for other_id, other in self.states.items():
            open_there = other.decode_rank == rank and other.chunks < len(CARD.decode_chunks(other.params))
            assert other_id == item.request_id or other_id in self.ends or not open_there, "two open decodes on a rank"
        state.decode_rank = rank
        state.chunks += item.chunks
        assert state.chunks <= len(CARD.decode_chunks(state.params)), "a chunk too many"
        self.unsent[item.seq] = item.chunks
        gateway = self.gateways[name_of(item.endpoint)]
        under_way = len(gateway.inbox) + sum(
            self.unsent[other.seq]
            for other in [*self.running.values(), item]
            if isinstance(other, Decode) and other.endpoint == item.endpoint
        )
        assert under_way <= gateway.limit + gateway.excess, "more chunks under way than were granted"

    def read_news(self):
        for gateway, news in self.scheduler.take_news():
            self.news.append((gateway, news))
            assert news.request_id not in self.ends, "news after the end"
            if isinstance(news, Progress):
                assert 0 <= news.step <= news.total_steps
            else:
                self.ends[news.request_id] = news

    def excess(self, endpoint, chunks):
        if name_of(endpoint) in self.gateways:
            self.gateways[name_of(endpoint)].excess += chunks

    def seconds_of(self, item):
        match item:
            case Encode():
                return SECONDS["encode"] * len(item.requests)
            case Denoise():
                return SECONDS["denoise"] * item.steps
        return SECONDS["decode"] * item.chunks

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
            elif self.due:
                self.next_report()
            else:
                return

    def run_to(self, kind):
        """Until an item of this kind runs."""
        self.run(until=lambda: any(isinstance(item, kind) for item in self.running.values()))
        return next(item for item in self.running.values() if isinstance(item, kind))

    def finish(self, item):
        for rank in item.ranks:
            self.report(rank, item.seq)

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


@pytest.fixture
def mesh():
    simulation = Simulation()
    simulation.join()
    return simulation


# ---- the way of one request --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_one_request_goes_all_the_way(num_ranks):
    mesh = Simulation(num_ranks=num_ranks)
    mesh.join()
    mesh.submit("a", steps=12, frames=17)
    mesh.run(consume=False)
    assert [type(item) for item in mesh.items] == [Encode, Denoise, Denoise, Denoise, Decode, Decode, Decode]
    assert [item.steps for item in mesh.items_of(Denoise)] == [5, 5, 2]
    assert [item.chunks for item in mesh.items_of(Decode)] == [1, 3, 1]
    assert [item.seq for item in mesh.items] == [1, 2, 3, 4, 5, 6, 7]
    assert mesh.ends == {}
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert isinstance(mesh.items[-1], Release)
    assert mesh.stages("a") == ["queued", "encode", "denoise", "decode", "deliver"]
    assert mesh.states == {}
    assert mesh.scheduler.idle


def test_progress_counts_steps_then_chunks_and_its_eta_falls(mesh):
    mesh.submit("a", steps=12, frames=17)
    mesh.run()
    told = [news for _, news in mesh.news if isinstance(news, Progress)]
    assert [(n.step, n.total_steps) for n in told if n.stage == "denoise"] == [(0, 12), (5, 12), (10, 12)]
    assert [(n.step, n.total_steps) for n in told if n.stage == "decode"] == [(0, 5), (1, 5), (4, 5)]
    assert told[0].eta_s == pytest.approx(0.05 + 12 * 0.02 + 5 * 0.03)
    assert all(later.eta_s <= earlier.eta_s for earlier, later in pairwise(told))
    assert told[-1] == Progress("a", "deliver", 5, 5, 0.0)


def test_timings_are_the_seconds_in_each_stage(mesh):
    mesh.now = 100.0
    mesh.submit("a", steps=12, frames=17)
    mesh.run(consume=False)
    mesh.now += 2.0
    mesh.run()
    expected = {"queued": 0, "encode": 0.05, "denoise": 12 * 0.02, "decode": 5 * 0.03, "deliver": 2.0}
    expected["total"] = sum(expected.values())
    assert mesh.ends["a"].timings == pytest.approx(expected)


def test_completed_waits_for_stored(mesh):
    mesh.submit("a")
    mesh.scheduler.stored("a", mesh.now)
    mesh.run(consume=False)
    mesh.now += 1000
    mesh.settle()
    assert mesh.ends == {}
    assert "a" in mesh.states
    mesh.scheduler.stored("a", mesh.now)
    mesh.settle()
    assert isinstance(mesh.ends["a"], Completed)


def test_stored_may_overtake_the_ranks_report(mesh):
    """Frames go straight to the gateway, whose thanks can arrive before the rank has said that it is done."""
    mesh.submit("a", steps=1, frames=1)
    item = mesh.run_to(Decode)
    mesh.send_chunk(item.seq)
    mesh.consume(b"g")
    assert mesh.ends == {}
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert mesh.states == {}


def test_nothing_is_planned_before_the_group_is_ready():
    mesh = Simulation(ready=False)
    mesh.join()
    mesh.submit("a", "b")
    mesh.submit("c")
    assert mesh.items == []
    assert [news.queue_position for _, news in mesh.news] == [1, 2, 3]
    mesh.regroup()
    assert [ids_of(item) for item in mesh.items] == [("a", "b", "c")]


# ---- items -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(0.1, 1), (0.5, 1), (20.0, 1), (0.05, 2), (0.034, 3), (0.01, 10), (0.0125, 8), (1e-9, 1000), (1e-4, 1000)],
)
def test_an_item_lasts_about_item_seconds_and_at_least_a_step(seconds, steps):
    mesh = Simulation(cost=KnownCost(SECONDS | {"denoise": seconds}))
    mesh.join()
    mesh.submit("a", steps=1000)
    item = mesh.run_to(Denoise)
    assert item.steps == steps
    if 1 < steps < 1000:
        assert item.steps * seconds == pytest.approx(ITEM_SECONDS, rel=0.1)


@pytest.mark.parametrize("factor", [1e-4, 1, 1e4])
def test_the_real_cost_model_learns_the_length_of_items(factor):
    cost = CostModel(CARD)
    cost.rates = {kind: rate * factor for kind, rate in cost.rates.items()}
    mesh = Simulation(cost=cost)
    mesh.join(credits=1000)
    mesh.submit("warm-up", steps=1000, frames=257)
    mesh.run()
    mesh.submit("a", steps=100, frames=257)
    mesh.run()
    assert {item.steps for item in mesh.items_of(Denoise, "a")} == {round(ITEM_SECONDS / SECONDS["denoise"])}
    chunks = [item.chunks for item in mesh.items_of(Decode, "a")]
    assert chunks[0] == 1
    assert set(chunks[1:-1]) == {round(ITEM_SECONDS / SECONDS["decode"])}


def test_the_cost_model_hears_of_every_unit():
    cost = KnownCost()
    mesh = Simulation(cost=cost)
    mesh.join()
    mesh.submit("a", steps=12, frames=17)
    mesh.run()
    units = Counter()
    for kind, count in cost.observed:
        units[kind] += count
    assert units == {"encode": 1, "denoise": 12, "decode": 5}


def test_the_first_chunk_goes_alone(mesh):
    mesh.submit("a", "b", steps=1, frames=33)
    mesh.run()
    for request_id in "ab":
        assert [item.chunks for item in mesh.items_of(Decode, request_id)] == [1, 3, 3, 2]


def test_what_arrives_together_is_encoded_together(mesh):
    mesh.submit("a", "b", "c")
    mesh.submit("d")
    assert ids_of(mesh.items[0]) == ("a", "b", "c")
    mesh.run()
    assert [ids_of(item) for item in mesh.items_of(Encode)] == [("a", "b", "c"), ("d",)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_decode_of_one_alternates_with_denoise_of_the_next(num_ranks):
    mesh = Simulation(num_ranks=num_ranks)
    mesh.join()
    mesh.submit("a", "b", steps=5, frames=33)
    mesh.submit("c", steps=100)
    mesh.run_to(Decode)
    start = len(mesh.items) - 1
    mesh.run(until=lambda: len(mesh.items) > start + 10)
    both = [type(item) for item in mesh.items[start : start + 6]]
    assert both == [Decode, Denoise] * 3


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_decodes_use_different_ranks_one_each(num_ranks):
    mesh = Simulation(num_ranks=num_ranks)
    mesh.join()
    mesh.submit("a", "b", "c", "d", steps=1, frames=33)
    most = 0
    while mesh.due:
        decodes = [item for item in mesh.running.values() if isinstance(item, Decode)]
        most = max(most, len({item.ranks for item in decodes}))
        mesh.next_report()
        while mesh.gateways[b"g"].inbox:
            mesh.consume(b"g")
    assert most == num_ranks
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    assert len(mesh.ends) == 4


def test_a_rank_waits_for_the_others_of_its_last_item(mesh):
    mesh.submit("a", steps=5)
    mesh.submit("b", steps=5)
    mesh.run(until=lambda: mesh.states.get("b", State(None)).steps == 5)
    item = next(item for item in mesh.running.values() if isinstance(item, Denoise))
    before = len(mesh.items)
    mesh.report(0, item.seq)
    assert len(mesh.items) == before
    mesh.report(1, item.seq)
    assert len(mesh.items) > before


def test_requests_are_served_in_order_of_arrival(mesh):
    for name in "abcdef":
        mesh.submit(name, steps=7)
    mesh.run()
    assert list(mesh.ends) == list("abcdef")


def test_at_most_max_active_requests_hold_state(mesh):
    names = [f"r{n}" for n in range(MAX_ACTIVE * 2 + 3)]
    mesh.submit(*names)
    assert len(ids_of(mesh.items[0])) == MAX_ACTIVE
    mesh.run(consume=False)
    assert len(mesh.states) == MAX_ACTIVE
    mesh.run()
    assert set(mesh.ends) == set(names)
    assert {type(end) for end in mesh.ends.values()} == {Completed}


# ---- credits -----------------------------------------------------------------------------------------------------


def test_a_decode_is_planned_only_with_credits():
    mesh = Simulation()
    mesh.join(credits=2)
    mesh.submit("a", steps=1, frames=33)
    mesh.run(consume=False)
    assert [item.chunks for item in mesh.items_of(Decode)] == [1, 1]
    assert mesh.running == {}
    mesh.consume(b"g")
    assert [item.chunks for item in mesh.items_of(Decode)] == [1, 1, 1]
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert mesh.spare_credits(b"g") == 2


def test_denoising_goes_on_while_a_decode_waits_for_credits():
    mesh = Simulation()
    mesh.join(credits=1)
    mesh.submit("a", steps=1, frames=33)
    mesh.submit("b", steps=50)
    mesh.run(consume=False)
    assert mesh.states["b"].steps == 50
    assert mesh.states["a"].chunks == 1


def test_a_gateway_without_credits_does_not_stop_another():
    mesh = Simulation()
    mesh.join(b"slow", credits=1)
    mesh.join(b"fast")
    mesh.submit("a", gateway=b"slow", steps=1, frames=33)
    mesh.submit("b", gateway=b"fast", steps=1, frames=33)
    mesh.run(until=lambda: "b" in mesh.ends, consume=False)
    while mesh.gateways[b"fast"].inbox or mesh.due:
        if mesh.gateways[b"fast"].inbox:
            mesh.consume(b"fast")
        else:
            mesh.next_report()
    assert set(mesh.ends) == {"b"}


def test_frames_go_to_the_gateway_that_asked():
    mesh = Simulation()
    mesh.join(b"one")
    mesh.join(b"two")
    mesh.submit("a", gateway=b"one")
    mesh.submit("b", gateway=b"two")
    mesh.run()
    assert {item.endpoint for item in mesh.items_of(Decode, "a")} == {"ipc://one"}
    assert {item.endpoint for item in mesh.items_of(Decode, "b")} == {"ipc://two"}
    assert all(gateway == {"a": b"one", "b": b"two"}[news.request_id] for gateway, news in mesh.news)


def test_credits_come_back_when_a_decode_fails():
    mesh = Simulation()
    mesh.join(credits=3)
    for number in range(5):
        mesh.submit(f"r{number}", steps=1, frames=33)
        item = mesh.run_to(Decode)
        mesh.report(*item.ranks, item.seq, ("out_of_memory", "too big"))
        mesh.run()
    assert {(end.code, end.reason) for end in mesh.ends.values()} == {("out_of_memory", "too big")}
    assert mesh.spare_credits(b"g") == 3


def test_credits_come_back_when_the_group_is_lost():
    mesh = Simulation()
    mesh.join(credits=3)
    for number in range(5):
        mesh.submit(f"r{number}", steps=1, frames=33)
        mesh.run_to(Decode)
        mesh.lose_group()
        mesh.regroup()
    assert mesh.spare_credits(b"g") == 3


def test_a_credit_that_comes_back_twice_counts_once():
    mesh = Simulation()
    mesh.join(credits=3)
    mesh.scheduler.granted(b"g", 100)
    mesh.scheduler.granted(b"nobody", 100)
    assert mesh.spare_credits(b"g") == 3


# ---- ends --------------------------------------------------------------------------------------------------------


def test_cancel_of_queued_work_ends_at_once():
    mesh = Simulation(ready=False)
    mesh.join()
    mesh.submit("a", "b")
    mesh.cancel("a")
    assert mesh.ends == {"a": Cancelled("a", "why not")}
    mesh.regroup()
    mesh.run()
    assert [ids_of(item) for item in mesh.items_of(Encode)] == [("b",)]
    assert [ids_of(item) for item in mesh.items_of(Release)] == [("b",)]


@pytest.mark.parametrize("kind", [Encode, Denoise, Decode])
def test_cancel_of_running_work_ends_after_its_item_with_a_release(mesh, kind):
    mesh.submit("a", steps=20, frames=33)
    item = mesh.run_to(kind)
    before = len(mesh.items)
    mesh.cancel("a")
    mesh.cancel("a")
    assert mesh.ends == {}
    assert len(mesh.items) == before
    mesh.finish(item)
    assert mesh.ends == {"a": Cancelled("a", "why not")}
    assert [ids_of(later) for later in mesh.items[before:]] == [("a",)]
    assert isinstance(mesh.items[-1], Release)
    mesh.run()
    assert mesh.scheduler.idle
    assert mesh.spare_credits(b"g") == 64


def test_cancel_of_waiting_work_ends_at_once_with_a_release(mesh):
    mesh.submit("a", "b", steps=50)
    item = mesh.run_to(Denoise)
    assert ids_of(item) == ("a",)
    mesh.cancel("b")
    assert set(mesh.ends) == {"b"}
    assert [ids_of(later) for later in mesh.items_of(Release)] == [("b",)]
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)


def test_cancel_of_the_unknown_is_nothing(mesh):
    mesh.cancel("nobody")
    mesh.submit("a")
    mesh.run()
    seen = len(mesh.news)
    mesh.cancel("a")
    assert len(mesh.news) == seen


def test_a_failed_item_ends_its_requests_when_every_rank_reported(mesh):
    mesh.submit("a", "b", steps=50)
    item = mesh.run_to(Denoise)
    mesh.report(0, item.seq, ("out_of_memory", "CUDA out of memory"))
    assert mesh.ends == {}
    mesh.report(1, item.seq)
    assert mesh.ends == {"a": Failed("a", "out_of_memory", "CUDA out of memory")}
    assert [ids_of(later) for later in mesh.items_of(Release)] == [("a",)]
    mesh.run()
    assert isinstance(mesh.ends["b"], Completed)


def test_a_failed_encode_ends_its_whole_batch(mesh):
    mesh.submit("a", "b")
    mesh.submit("c")
    mesh.report(0, 1)
    mesh.report(1, 1, ("internal_error", "boom"))
    assert {request_id: end.reason for request_id, end in mesh.ends.items()} == {"a": "boom", "b": "boom"}
    mesh.run()
    assert isinstance(mesh.ends["c"], Completed)


def test_a_lost_group_fails_what_was_active_and_keeps_what_was_queued(mesh):
    mesh.submit("decoding", steps=5, frames=33)
    mesh.submit("denoising", steps=20)
    mesh.run(until=lambda: mesh.states.get("denoising", State(None)).steps == 10)
    mesh.submit("queued")
    mesh.lose_group("rank 1 died")
    assert set(mesh.ends) == {"decoding", "denoising"}
    assert {end.code for end in mesh.ends.values()} == {"worker_lost"}
    assert mesh.ends["denoising"].reason == "rank 1 died in denoising, after step 5 of 20"
    assert mesh.ends["decoding"].reason.startswith("rank 1 died in decoding, after chunk ")
    issued = len(mesh.items)
    mesh.submit("later")
    assert len(mesh.items) == issued
    mesh.regroup()
    mesh.run()
    assert isinstance(mesh.ends["queued"], Completed)
    assert isinstance(mesh.ends["later"], Completed)
    assert not mesh.items_of(Release, "denoising"), "the new ranks never held it"


def test_a_draining_mesh_finishes_and_refuses(mesh):
    mesh.submit("a", "b")
    mesh.scheduler.draining = True
    mesh.submit("late")
    assert mesh.ends == {"late": Failed("late", "draining", "the server is shutting down and takes no new work")}
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert isinstance(mesh.ends["b"], Completed)
    assert mesh.scheduler.idle


def test_submitting_a_known_id_again_changes_nothing(mesh):
    other = Simulation()
    other.join()
    for simulation in (mesh, other):
        simulation.submit("a", "b", steps=12)
        simulation.run_to(Denoise)
    seen = len(mesh.news)
    mesh.submit("a", "b", steps=12)
    assert len(mesh.news) == seen
    for simulation in (mesh, other):
        simulation.run()
    assert (mesh.items, mesh.news) == (other.items, other.news)


def test_a_lost_gateways_requests_end_and_no_others():
    mesh = Simulation()
    mesh.join(b"stays")
    mesh.join(b"leaves")
    mesh.submit("a", gateway=b"leaves", steps=50)
    mesh.submit("b", gateway=b"leaves")
    mesh.submit("c", gateway=b"stays")
    item = mesh.run_to(Denoise)
    assert ids_of(item) == ("a",)
    mesh.submit("d", gateway=b"leaves")
    mesh.leave(b"leaves")
    assert set(mesh.ends) == {"b", "d"}
    mesh.finish(item)
    assert set(mesh.ends) == {"a", "b", "d"}
    assert {end.reason for end in mesh.ends.values()} == {"its gateway is gone"}
    mesh.run()
    assert isinstance(mesh.ends["c"], Completed)
    assert mesh.states == {}


@pytest.mark.parametrize("kind", [Denoise, Decode])
def test_a_gateway_lost_while_its_request_runs(mesh, kind):
    mesh.submit("a", steps=20, frames=33)
    item = mesh.run_to(kind)
    mesh.leave(b"g")
    mesh.finish(item)
    assert isinstance(mesh.ends["a"], Cancelled)
    assert mesh.states == {}


def test_work_of_a_gateway_that_was_given_up_is_refused(mesh):
    """It lives and does not know it, or its last words arrive late: nobody would take the frames."""
    mesh.leave(b"g")
    mesh.submit("a")
    assert mesh.ends["a"].code == "gateway_lost"
    mesh.run()
    assert mesh.items == []


# ---- everything at once ------------------------------------------------------------------------------------------

INDEX = st.integers(0, 7)
CALM = [
    st.tuples(
        st.just("submit"), INDEX, st.integers(1, 3), st.sampled_from([1, 4, 5, 12]), st.sampled_from([1, 5, 9, 33])
    ),
    *[st.tuples(st.just("report"), INDEX)] * 5,
    *[st.tuples(st.just("send"), INDEX)] * 2,
    *[st.tuples(st.just("consume"), INDEX)] * 3,
    st.tuples(st.just("resubmit"), INDEX),
    st.tuples(st.just("join"), st.integers(1, 6)),
]
ROUGH = [
    *CALM,
    *[st.tuples(st.just("cancel"), INDEX)] * 2,
    st.tuples(st.just("fail"), INDEX),
    st.tuples(st.just("lose")),
    st.tuples(st.just("regroup")),
    st.tuples(st.just("leave"), INDEX),
]


def pick(options, index):
    return sorted(options)[index % len(options)]


def perform(mesh, action):
    """One line of a script; one that makes no sense now does nothing."""
    match action:
        case ("submit", gateway, count, steps, frames) if mesh.gateways:
            names = [f"r{len(mesh.params) + n}" for n in range(count)]
            mesh.submit(*names, gateway=pick(mesh.gateways, gateway), steps=steps, frames=frames)
        case ("resubmit", index) if known := set(mesh.params) - set(mesh.ends):
            seen = len(mesh.news)
            params = mesh.params[pick(known, index)]
            mesh.scheduler.submit(b"any", (Request(pick(known, index), params),), mesh.now)
            mesh.settle()
            assert len(mesh.news) == seen
        case ("report", index) if mesh.due:
            mesh.report(*pick(mesh.due, index))
        case ("fail", index) if mesh.due:
            mesh.report(*pick(mesh.due, index), ("internal_error", "boom"))
        case ("send", index) if sending := [seq for seq, left in mesh.unsent.items() if left]:
            mesh.send_chunk(pick(sending, index))
        case ("consume", index) if full := [name for name, gateway in mesh.gateways.items() if gateway.inbox]:
            mesh.consume(pick(full, index))
        case ("cancel", index) if mesh.params:
            mesh.cancel(pick(mesh.params, index))
        case ("lose",):
            mesh.lose_group()
        case ("regroup",):
            mesh.regroup()
        case ("join", credits) if len(mesh.gateways) < 3:
            mesh.join(b"g%d" % mesh.num_joined, credits)
        case ("leave", index) if mesh.gateways:
            mesh.leave(pick(mesh.gateways, index))


def play(script, num_ranks):
    """The whole script, then calm until nothing is left to do."""
    mesh = Simulation(num_ranks=num_ranks)
    mesh.join(b"first", 2)
    for action in script:
        mesh.now += 0.01
        perform(mesh, action)
        assert mesh.scheduler.num_requests == len(mesh.params) - len(mesh.ends)
    mesh.regroup()
    mesh.run()
    return mesh


def check_end(mesh):
    assert set(mesh.ends) == set(mesh.params), "lost or stuck"
    assert mesh.scheduler.idle
    assert mesh.states == {}, "never released"
    for request_id, end in mesh.ends.items():
        if isinstance(end, Completed):
            params = mesh.params[request_id]
            assert sum(item.steps for item in mesh.items_of(Denoise, request_id)) == params.num_inference_steps
            assert sum(item.chunks for item in mesh.items_of(Decode, request_id)) == len(CARD.decode_chunks(params))
    for name, gateway in mesh.gateways.items():
        spare = mesh.spare_credits(name)
        assert spare == gateway.limit, "credits leaked" if spare < gateway.limit else "credits from nowhere"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(script=st.lists(st.one_of(CALM), min_size=30, max_size=120), num_ranks=st.integers(1, 4))
def test_when_nothing_fails_everything_completes(script, num_ranks):
    mesh = play(script, num_ranks)
    assert {type(end) for end in mesh.ends.values()} <= {Completed}
    check_end(mesh)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(script=st.lists(st.one_of(ROUGH), min_size=30, max_size=120), num_ranks=st.integers(1, 3))
def test_whatever_happens_nothing_is_lost_repeated_or_leaked(script, num_ranks):
    mesh = play(script, num_ranks)
    again = play(script, num_ranks)
    assert (again.items, again.news, again.ends) == (mesh.items, mesh.news, mesh.ends)
    check_end(mesh)


def test_the_scripts_can_reach_every_end():
    """The properties above are worth what their actions can do."""
    first = ("report", 0)
    script = [
        *[("submit", 0, 2, 5, 9), *[first] * 6, ("send", 0), ("consume", 0)],
        *[("fail", 0), ("cancel", 1), *[first] * 6],
        *[("submit", 0, 3, 5, 9), first, first, ("lose",), ("submit", 0, 1, 1, 1), ("regroup",)],
        *[("join", 3), ("submit", 1, 3, 1, 9), first, first, ("leave", 0)],
    ]
    mesh = play(script, 2)
    assert {type(end) for end in mesh.ends.values()} == {Completed, Failed, Cancelled}
    assert {type(item) for item in mesh.items} == {Encode, Denoise, Decode, Release}
    check_end(mesh)
