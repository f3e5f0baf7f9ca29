"""The pure scheduler with simulated ranks and gateways: single policies first, then scripts of everything at once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from simulation import CARD, SECONDS, KnownCost, Simulation, State, bytes_of, ids_of

from runtime.checkpoints import UNCLAIMED_S
from runtime.cost import Constants, CostModel, Line
from runtime.fairness import AGEING, PATIENCE_S, patient_until
from runtime.layout import Layout
from runtime.protocol import (
    Cancelled,
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
    Usage,
)
from runtime.recovery import Verdict, judge
from runtime.sampling import SamplingParams
from runtime.scheduler import ITEM_SECONDS, MAX_ACTIVE, REJOIN_S


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
    mesh.scheduler.stored(b"g", "a", mesh.now)
    mesh.run(consume=False)
    mesh.now += 1000
    mesh.settle()
    assert mesh.ends == {}
    assert "a" in mesh.states
    mesh.run()
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
    assert mesh.stages("a") == ["queued", "encode", "denoise", "decode", "deliver"]
    assert mesh.states == {}


def test_nothing_is_planned_before_the_group_is_ready():
    mesh = Simulation(ready=False)
    mesh.join()
    mesh.submit("a", "b")
    mesh.submit("c")
    assert mesh.items == []
    assert [news.queue_position for _, news in mesh.news] == [1, 2, 3]
    mesh.regroup()
    assert [ids_of(item) for item in mesh.items] == [("a", "b")]


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
    guess = Constants.first_guess().lines
    wrong = {kind: Line(line.fixed * factor, line.slope * factor) for kind, line in guess.items()}
    mesh = Simulation(cost=CostModel(CARD, Constants(wrong)))
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
    assert units == {"encode": 1, "denoise": 12, "first_decode": 1, "decode": 4}


def test_the_first_chunk_goes_alone(mesh):
    mesh.submit("a", "b", steps=1, frames=33)
    mesh.run()
    for request_id in "ab":
        assert [item.chunks for item in mesh.items_of(Decode, request_id)] == [1, 3, 3, 2]


def test_what_arrives_together_is_encoded_together():
    mesh = Simulation(cost=KnownCost(SECONDS | {"encode": 0.02}), ready=False)
    mesh.join()
    mesh.submit("a", "b", "c")
    mesh.submit("d")
    mesh.regroup()
    assert ids_of(mesh.items[0]) == ("a", "b", "c")
    mesh.run()
    assert [ids_of(item) for item in mesh.items_of(Encode)] == [("a", "b", "c"), ("d",)]


def test_an_encode_lasts_no_longer_than_an_item(mesh):
    """A gateway may hand in hundreds at once; other keys and cancels would wait for all of them."""
    mesh.submit(*[f"r{n:03}" for n in range(200)], steps=1, frames=1)
    mesh.run()
    assert {len(item.requests) for item in mesh.items_of(Encode)} == {round(ITEM_SECONDS / SECONDS["encode"])}


def test_one_text_is_encoded_once_however_many_want_it():
    """Four pictures of one prompt with an encoder that takes as long as an item."""
    mesh = Simulation(cost=(cost := KnownCost(SECONDS | {"encode": 0.1})), ready=False)
    mesh.join()
    mesh.submit(*"abcd", prompt="a dog")
    mesh.submit("e")
    mesh.regroup()
    mesh.run()
    assert [ids_of(item) for item in mesh.items_of(Encode)] == [tuple("abcd"), ("e",)]
    assert [units for kind, units in cost.observed if kind == "encode"] == [1], "what four share is no measure of one"


def test_equal_texts_between_others_are_found():
    mesh = Simulation(ready=False)
    mesh.join()
    requests = [
        Request(name, CARD.check(SamplingParams(prompt=text, seed=1)))
        for name, text in zip("abcde", "xyzxy", strict=True)
    ]
    for request in requests:
        mesh.params[request.id], mesh.owner[request.id] = request.params, b"g"
    mesh.scheduler.submit(b"g", tuple(requests), mesh.now)
    mesh.regroup()
    mesh.run()
    assert [ids_of(item) for item in mesh.items_of(Encode)] == [("a", "b", "d", "e"), ("c",)]


def test_equal_texts_of_different_submits_share_an_encode_that_they_would_be_in_anyway():
    mesh = Simulation(cost=KnownCost(SECONDS | {"encode": 0.1}, growth=0.1))
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run_to(Denoise)
    mesh.submit("b", steps=20, prompt="a dog")
    mesh.submit("c", steps=20, prompt="a cow")
    mesh.submit("d", steps=20, prompt="a dog")
    mesh.run()
    assert [ids_of(item) for item in mesh.items_of(Encode)] == [("a",), ("b", "d"), ("c",)]


def test_equal_texts_are_not_parted_by_a_batch_with_room_for_one_of_them():
    mesh = Simulation(cost=KnownCost(growth=0.1), max_batch=2)
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run_to(Denoise)
    mesh.submit("b", "c", "d", steps=20, prompt="a dog")
    mesh.run()
    assert [ids_of(item) for item in mesh.items_of(Encode)] == [("a",), ("b", "c", "d")]


def test_decode_of_one_alternates_with_denoise_of_another_key():
    mesh = Simulation(num_ranks=1)
    mesh.join()
    mesh.submit("a", key="one", steps=5, frames=65)
    mesh.submit("b", key="two", steps=60)
    mesh.run_to(Decode)
    start = len(mesh.items) - 1
    mesh.run(until=lambda: len(mesh.items) > start + 6)
    kinds = [type(item) for item in mesh.items[start : start + 6]]
    assert all(first is not second for first, second in pairwise(kinds[1:])), kinds


def test_within_a_key_what_is_nearly_done_is_finished_first(mesh):
    mesh.submit("long", steps=60)
    mesh.submit("short", steps=5, frames=33)
    mesh.run()
    last = max(item.seq for item in mesh.items if "short" in ids_of(item) and not isinstance(item, Release))
    assert sum(item.steps for item in mesh.items_of(Denoise, "long") if item.seq < last) <= 5
    assert list(mesh.ends) == ["short", "long"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_decodes_use_different_ranks_one_each(num_ranks):
    mesh = Simulation(num_ranks=num_ranks, cost=KnownCost(growth=0.1))
    mesh.join()
    mesh.submit("a", "b", "c", "d", steps=1, frames=33)
    assert ids_of(mesh.run_to(Denoise)) == ("a", "b", "c", "d")
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


def test_all_free_ranks_get_their_decodes_at_once():
    mesh = Simulation(num_ranks=3, cost=KnownCost(growth=0.1))
    mesh.join()
    mesh.submit("a", "b", "c", steps=1, frames=33)
    mesh.finish(mesh.run_to(Denoise))
    assert sorted(item.ranks for item in mesh.running.values()) == [(0,), (1,), (2,)]


def test_a_decode_on_all_ranks_waits_for_them():
    mesh = Simulation(num_ranks=3, decode_on_all=True)
    mesh.join()
    mesh.submit("a", "b", steps=5, frames=17)
    mesh.run()
    assert {item.ranks for item in mesh.items_of(Decode)} == {(0, 1, 2)}
    assert {type(end) for end in mesh.ends.values()} == {Completed}


def test_a_key_pays_for_every_rank_of_its_items():
    mesh = Simulation(num_ranks=2)
    mesh.join()
    mesh.submit("a", steps=5, frames=1, key="a")
    mesh.run()
    expected = 2 * (SECONDS["encode"] + 5 * SECONDS["denoise"]) + SECONDS["decode"]
    assert mesh.scheduler._fair.clocks["a"] == pytest.approx(expected)


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


@pytest.mark.parametrize("policy", ["srpt", "fifo", "deadline"])
def test_equal_requests_are_served_in_order_of_arrival(policy):
    mesh = Simulation(policy=policy)
    mesh.join()
    for name in "fbdace":
        mesh.submit(name, steps=7)
        mesh.now += 0.001
    mesh.run()
    assert list(mesh.ends) == list("fbdace")


def test_at_most_max_active_requests_hold_state():
    mesh = Simulation(cost=KnownCost(SECONDS | {"encode": 1e-4}))
    mesh.join()
    names = [f"r{n}" for n in range(MAX_ACTIVE * 2 + 3)]
    for name in names:
        mesh.submit(name, steps=40, frames=1, key=name)
    working = 0
    while mesh.due:
        records = mesh.scheduler.requests.values()
        working = max(working, sum(record.stage in {"encode", "denoise"} for record in records))
        mesh.next_report()
    assert working == MAX_ACTIVE
    assert MAX_ACTIVE <= len(mesh.states) < MAX_ACTIVE + MAX_ACTIVE // 4, "those that it has to store first"
    mesh.run()
    assert set(mesh.ends) == set(names)
    assert {type(end) for end in mesh.ends.values()} == {Completed}


def test_a_key_that_has_nothing_in_the_ranks_memory_waits_for_nobodys_end():
    """With more keys than may hold states, a short request gets its fair share and not the place of one that ended."""
    mesh = Simulation(cost=KnownCost(growth=1.0), max_batch=1, budget=1 << 40)
    mesh.join(credits=10_000)
    for n in range(MAX_ACTIVE + 6):
        mesh.submit(f"long{n}", steps=1000, key=f"key{n}")
    mesh.run(until=lambda: all(record.stage == "denoise" for record in mesh.scheduler.requests.values()))
    mesh.submit("late", steps=4, frames=1, key="late")
    mesh.submit("later", steps=4, frames=1, key="key0")
    mesh.run(until=lambda: "late" in mesh.ends)
    assert len(mesh.ends) == 1
    assert mesh.scheduler.requests["later"].stage == "queued", "its key holds a state already"


def test_one_at_a_time_is_one_at_a_time_whoever_asks():
    mesh = Simulation(max_active=1, budget=1 << 40)
    mesh.join()
    for name in "abc":
        mesh.submit(name, key=name)
    while mesh.due:
        assert len(mesh.states) <= 1
        mesh.next_report()


def test_equal_texts_are_encoded_together_but_not_without_end():
    mesh = Simulation(max_batch=1)
    mesh.join()
    mesh.submit(*[f"r{n}" for n in range(40)], steps=4, prompt="one text")
    mesh.run()
    assert [len(item.requests) for item in mesh.items_of(Encode)] == [16, 16, 8]


# ---- batches -----------------------------------------------------------------------------------------------------


def test_requests_join_and_leave_a_batch_at_step_boundaries():
    mesh = Simulation(cost=KnownCost(growth=0.1))
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run(until=lambda: mesh.states["a"].steps == 10)
    mesh.submit("b", steps=12)
    mesh.run()
    shared = [item for item in mesh.items_of(Denoise) if len(item.request_ids) == 2]
    assert mesh.items_of(Denoise)[0].request_ids == ("a",)
    assert sum(item.steps for item in shared) == 10, "b ran beside a to the end of a"
    assert mesh.items_of(Denoise)[-1].request_ids == ("b",)
    assert {type(end) for end in mesh.ends.values()} == {Completed}


def test_a_batch_is_as_large_as_it_pays_and_as_the_operator_allows():
    for growth, max_batch, expected in [(1.0, 4, 1), (0.95, 4, 2), (0.1, 4, 4), (0.1, 3, 3), (0.1, 1, 1)]:
        mesh = Simulation(cost=KnownCost(SECONDS | {"encode": 1e-4}, growth), max_batch=max_batch)
        mesh.join()
        mesh.submit(*"abcdef", steps=20)
        mesh.run()
        assert max(len(item.request_ids) for item in mesh.items_of(Denoise)) == expected, (growth, max_batch)


def test_different_shapes_never_share_a_forward():
    mesh = Simulation(cost=KnownCost(growth=0.1))
    mesh.join()
    mesh.submit("a", "b", frames=9)
    mesh.submit("c", "d", frames=17)
    mesh.run()
    pairs = {item.request_ids for item in mesh.items_of(Denoise)}
    assert {frozenset(pair) for pair in pairs} == {frozenset("ab"), frozenset("cd")}


def test_a_batch_is_no_longer_than_an_item():
    mesh = Simulation(cost=KnownCost(growth=0.5))
    mesh.join()
    mesh.submit(*"abc", steps=20)
    item = mesh.run_to(Denoise)
    assert (len(item.request_ids), item.steps) == (3, round(ITEM_SECONDS / (SECONDS["denoise"] * 2)))


# ---- turns -------------------------------------------------------------------------------------------------------


def test_keys_get_equal_shares_whatever_they_ask_for():
    mesh = Simulation(num_ranks=1)
    mesh.join()
    mesh.submit(*[f"many{n}" for n in range(10)], key="many", steps=10)
    mesh.submit("one", key="one", steps=200)
    given = Counter()
    while mesh.due and not {"one", "many9"} & set(mesh.ends):
        item = next(iter(mesh.running.values()))
        if not isinstance(item, Encode):
            given["one" if "one" in ids_of(item) else "many"] += mesh.seconds_of(item)
            assert abs(given["one"] - given["many"]) <= 2 * ITEM_SECONDS + 10 * SECONDS["encode"]
        mesh.next_report()
        while mesh.gateways[b"g"].inbox:
            mesh.consume(b"g")
    assert min(given.values()) > 1.0


def test_a_key_that_was_away_takes_no_credit_for_it():
    mesh = Simulation(num_ranks=1)
    mesh.join()
    mesh.submit("long", key="busy", steps=500)
    mesh.run(until=lambda: mesh.states["long"].steps >= 200)
    mesh.submit("b", key="away", steps=400)
    mesh.run(until=lambda: mesh.states.get("b", State(None)).steps >= 50)
    assert 240 <= mesh.states["long"].steps <= 260


def test_priority_goes_first_within_a_key():
    mesh = Simulation()
    mesh.join()
    mesh.submit("running", steps=50)
    mesh.submit("short", steps=5)
    mesh.submit("urgent", steps=40, priority=5)
    mesh.run()
    assert list(mesh.ends) == ["urgent", "short", "running"]


def test_a_long_request_outlasts_a_stream_of_short_ones():
    """Ageing: without it the shortest would always go first."""
    mesh = Simulation(num_ranks=1)
    mesh.join()
    mesh.submit("long", steps=100)
    for number in range(400):
        mesh.submit(f"short{number}", steps=5, frames=1)
        mesh.run(until=lambda name=f"short{number}": name in mesh.ends or "long" in mesh.ends)
        if "long" in mesh.ends:
            return
    raise AssertionError("the long request starves")


def test_a_short_request_overtakes_a_long_one_within_an_item(mesh):
    mesh.submit("video", steps=50, frames=33)
    mesh.run(until=lambda: mesh.states["video"].steps == 10)
    mesh.submit("still", steps=4, frames=1)
    at = mesh.now
    mesh.run(until=lambda: "still" in mesh.ends)
    alone = SECONDS["encode"] + 4 * SECONDS["denoise"] + SECONDS["decode"]
    assert mesh.now - at <= ITEM_SECONDS + alone + 1e-9
    assert mesh.states["video"].steps <= 15


def test_low_priority_outlasts_a_stream_of_high_priority():
    mesh = Simulation(num_ranks=1, cost=KnownCost(growth=1.0))
    mesh.join()
    mesh.submit("low", steps=10, priority=-1)
    limit = patient_until(mesh.scheduler.requests["low"])
    number = 0
    while "low" not in mesh.ends:
        while sum(request.startswith("high") for request in mesh.scheduler.requests) < 2:
            mesh.submit(f"high{number}", steps=500, frames=1, priority=1)
            number += 1
        mesh.run(until=iter([False, True]).__next__)
        assert mesh.now <= limit + 10.0, "it starves"
    assert mesh.now > PATIENCE_S, "the stream did not go first at all"


@pytest.mark.parametrize("growth", [1.0, 0.1])
def test_ageing_bounds_the_wait_of_a_long_request(growth):
    """A stream of shorter ones that keeps the mesh busy: whoever comes (R - r) / AGEING later goes behind it."""
    mesh = Simulation(num_ranks=1, cost=KnownCost(growth=growth))
    mesh.join()
    mesh.submit("long", steps=100)
    start = mesh.scheduler.requests["long"].remaining_s
    number = 0
    while "long" not in mesh.ends:
        if not any(request.startswith("short") for request in mesh.scheduler.requests):
            mesh.submit(f"short{number}", steps=5, frames=5)
            number += 1
        mesh.run(until=iter([False, True]).__next__)
        assert mesh.now <= start / AGEING + start + 1.0, "it starves"
    assert mesh.now > start + 1.0, "the stream did not go first at all"


def test_shares_follow_the_weights():
    mesh = Simulation(num_ranks=1, weights={"heavy": 3.0})
    mesh.join()
    mesh.submit("h", key="heavy", steps=900)
    mesh.submit("l", key="light", steps=900)
    mesh.run(until=lambda: mesh.states.get("h", State(None)).steps >= 600)
    assert mesh.states["l"].steps == pytest.approx(200, abs=15)


def test_a_key_whose_gateway_took_no_frames_takes_no_credit_for_it():
    mesh = Simulation(num_ranks=1)
    mesh.join(b"slow", credits=1)
    mesh.join(b"fast")
    mesh.submit("slow", gateway=b"slow", key="slow", steps=1, frames=257)
    mesh.submit("busy", gateway=b"fast", key="busy", steps=900)
    mesh.run(consume=False, until=lambda: mesh.states.get("busy", State(None)).steps >= 500)
    mesh.submit("more", gateway=b"fast", key="slow", steps=400)
    mesh.run(until=lambda: mesh.states.get("more", State(None)).steps >= 100)
    assert mesh.states["busy"].steps >= 580


def test_a_key_that_was_alone_is_not_punished_for_it(mesh):
    """It had the mesh to itself while nobody else wanted it; then everybody rested, then another came first."""
    mesh.submit("a", key="first", steps=300)
    mesh.run()
    mesh.submit("b", key="second", steps=300)
    mesh.submit("c", key="first", steps=300)
    mesh.run(until=lambda: mesh.states.get("c", State(None)).steps >= 100)
    assert mesh.states["b"].steps == pytest.approx(100, abs=15)


@pytest.mark.parametrize("steps", [600, 8])
def test_a_busy_key_does_not_ride_along_with_one_that_is_always_behind(steps):
    """`one` is behind for ever, for a batch costs each member little; `many` could fill up all its batches."""
    mesh = Simulation(num_ranks=1, cost=KnownCost(SECONDS | {"encode": 1e-4}, growth=0.5), max_batch=8)
    mesh.join(credits=1000)
    mesh.submit("one", key="one", steps=600, frames=9)
    mesh.submit("other", key="other", steps=600, frames=17)
    mesh.submit(*[f"many{n}" for n in range(7 * 600 // steps)], key="many", steps=steps, frames=9)
    given = Counter()
    while mesh.due and mesh.now < 12:
        for item in mesh.running.values():
            if isinstance(item, Denoise):
                for request_id in item.request_ids:
                    given[request_id.rstrip("0123456789")] += mesh.seconds_of(item) / len(item.request_ids)
        mesh.next_report()
        while mesh.gateways[b"g"].inbox:
            mesh.consume(b"g")
    assert given["other"] > 0.8 * given["many"], given


@pytest.mark.parametrize("policy", ["srpt", "deadline", "fifo"])
def test_an_urgent_deadline_goes_first_but_not_before_a_higher_priority(policy):
    mesh = Simulation(policy=policy, num_ranks=1)
    mesh.join()
    mesh.submit("running", steps=100)
    mesh.now += 0.001
    mesh.submit("short", steps=10)
    mesh.now += 0.001
    mesh.submit("urgent", steps=80, timeout_s=80 * 0.02 + 0.05 + 3 * 0.03 + 0.5)
    mesh.submit("important", steps=5, priority=1)
    mesh.run()
    completed = [request_id for request_id, end in mesh.ends.items() if isinstance(end, Completed)]
    if policy == "fifo":
        assert completed == ["running", "short", "important"]
    else:
        assert completed == ["important", "urgent", "short", "running"]
    assert isinstance(mesh.ends["urgent"], Cancelled if policy == "fifo" else Completed)


def test_the_deadline_policy_orders_by_slack():
    mesh = Simulation(policy="deadline", num_ranks=1)
    mesh.join()
    for name, timeout_s, steps in [("never", None, 1), ("late", 90.0, 5), ("soon", 30.0, 50), ("slack", 30.5, 100)]:
        mesh.submit(name, steps=steps, timeout_s=timeout_s)
    mesh.run()
    first_steps = list(dict.fromkeys(item.request_ids for item in mesh.items_of(Denoise)))
    assert first_steps == [("slack",), ("soon",), ("late",), ("never",)]


# ---- outlook -----------------------------------------------------------------------------------------------------


def test_the_outlook_counts_who_is_ahead():
    mesh = Simulation(ready=False)
    mesh.join()
    one = SECONDS["encode"] + 10 * SECONDS["denoise"] + 3 * SECONDS["decode"]
    for number in range(4):
        mesh.submit(f"r{number}", steps=10, frames=9)
        news = mesh.news[-1][1]
        assert (news.queue_position, news.eta_s) == (number + 1, pytest.approx((number + 1) * one))
    mesh.submit("first", steps=10, frames=9, priority=1)
    assert (mesh.news[-1][1].queue_position, mesh.news[-1][1].eta_s) == (1, pytest.approx(one))
    assert mesh.scheduler.outlook(mesh.scheduler.requests["r0"]) == (2, pytest.approx(2 * one))


def test_the_eta_of_several_is_kept_when_nothing_else_arrives(mesh):
    mesh.submit("a", steps=30)
    mesh.submit("b", steps=50)
    mesh.submit("c", steps=80)
    mesh.settle()
    promised = {name: mesh.now + mesh.scheduler.outlook(mesh.scheduler.requests[name])[1] for name in "abc"}
    took = {}
    while mesh.due:
        mesh.next_report()
        while mesh.gateways[b"g"].inbox:
            mesh.consume(b"g")
        took |= {name: mesh.now for name in mesh.ends if name not in took}
    assert took == {name: pytest.approx(promised[name], abs=2 * ITEM_SECONDS + 0.05) for name in "abc"}


# ---- timeouts --------------------------------------------------------------------------------------------------


def test_a_timeout_ends_queued_work_on_time(mesh):
    mesh.scheduler.ready = False
    mesh.submit("a", timeout_s=5.0)
    mesh.submit("b", timeout_s=9.0)
    assert mesh.scheduler.next_deadline() == 5.0
    mesh.now = 4.9
    mesh.settle()
    assert mesh.ends == {}
    mesh.now = 5.0
    mesh.settle()
    assert mesh.ends == {
        "a": Cancelled("a", "its timeout of 5 s passed in the queued stage", Usage(queue_s=5.0), "timed_out")
    }
    assert mesh.scheduler.next_deadline() == 9.0


def test_a_timeout_ends_running_work_after_its_item(mesh):
    mesh.submit("a", steps=100, timeout_s=1.0)
    mesh.run()
    assert isinstance(mesh.ends["a"], Cancelled)
    assert mesh.ends["a"].code == "timed_out"
    assert mesh.ends["a"].reason.startswith("its timeout of 1 s passed in denoising, after step ")
    assert 1.0 <= mesh.now <= 1.0 + 2 * ITEM_SECONDS
    assert mesh.states == {}


def test_a_timeout_of_an_earlier_submission_is_forgotten(mesh):
    mesh.submit("a", timeout_s=5.0)
    mesh.finish_with(mesh.run_to(Denoise), ("internal_error", "boom"))
    ended = mesh.ends.pop("a")
    assert isinstance(ended, Failed)
    mesh.now = 4.0
    mesh.submit("a", timeout_s=5.0)
    mesh.now = 6.0
    mesh.settle()
    assert mesh.ends == {}
    mesh.regroup()
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)


# ---- memory ------------------------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_with_what_would():
    mesh = Simulation(budget=bytes_of("decode", 17))
    mesh.join()
    mesh.submit("a", frames=257)
    assert mesh.ends["a"].code == "out_of_memory"
    assert mesh.ends["a"].reason.endswith("; 17 frames of 64x64 or 257 frames of 32x32 would fit")
    mesh.submit("b", frames=17)
    mesh.run()
    assert isinstance(mesh.ends["b"], Completed)


def test_what_turns_out_to_be_too_large_is_refused_and_does_not_block_the_line():
    mesh = Simulation(budget=bytes_of("decode", 17), ready=False)
    mesh.join()
    mesh.submit("large", frames=257, steps=1)
    mesh.submit("small", frames=17)
    mesh.regroup()
    mesh.run()
    assert mesh.ends["large"].code == "out_of_memory"
    assert isinstance(mesh.ends["small"], Completed)


def test_as_many_are_admitted_as_leave_room_for_a_decode():
    budget = bytes_of("decode", 9) + 3 * bytes_of("denoise", 9)
    mesh = Simulation(budget=budget, cost=KnownCost(growth=0.1))
    mesh.join()
    mesh.submit(*"abcdefgh")
    most = 0
    while mesh.due:
        most = max(most, len(mesh.states))
        mesh.next_report()
        while mesh.gateways[b"g"].inbox:
            mesh.consume(b"g")
    assert most == 4
    assert len(mesh.ends) == 8


@pytest.mark.parametrize("growth", [0.1, 1.0])
def test_a_large_request_is_not_overtaken_for_ever_by_those_that_fit_beside_others(growth):
    """Small ones could join the running batch, each at another step, or take turns, and there would never be room."""
    mesh = Simulation(num_ranks=1, budget=bytes_of("decode", 257), cost=KnownCost(growth=growth))
    mesh.join()
    mesh.submit("s0", steps=30, key="small")
    mesh.run(until=lambda: mesh.states["s0"].steps >= 10)
    mesh.submit("s1", steps=30, key="small")
    mesh.run(until=lambda: mesh.states.get("s1", State(None)).steps >= 10)
    mesh.submit("large", frames=257, steps=1, key="large")
    for number in range(2, 40):
        mesh.submit(f"s{number}", steps=30, key="small")
        mesh.run(until=lambda number=number: len(mesh.ends) >= number or "large" in mesh.states)
        if "large" in mesh.states:
            return
    raise AssertionError("the large request starves")


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


@pytest.mark.parametrize(("credits", "frames"), [(1, 33), (1000, 1)])
@pytest.mark.parametrize("key", ["", "another"])
def test_a_gateway_that_stores_nothing_keeps_nobody_out(credits, frames, key):
    """Its requests wait for room for their frames, or for its word; those of other gateways pass them."""
    mesh = Simulation(cost=KnownCost(SECONDS | {"encode": 0.001}))
    mesh.join(b"slow", credits=credits)
    mesh.join(b"fast")
    mesh.submit(*[f"s{n}" for n in range(3 * MAX_ACTIVE)], gateway=b"slow", steps=1, frames=frames)
    mesh.run(consume=False)
    assert len(mesh.states) < MAX_ACTIVE + MAX_ACTIVE // 4
    names = [f"f{n}" for n in range(2 * MAX_ACTIVE)]
    mesh.submit(*names, gateway=b"fast", steps=1, frames=1, key=key)
    while mesh.due or mesh.gateways[b"fast"].inbox:
        if mesh.gateways[b"fast"].inbox:
            mesh.consume(b"fast")
        else:
            mesh.next_report()
    assert set(mesh.ends) == set(names)
    mesh.run()
    assert len(mesh.ends) == 5 * MAX_ACTIVE


def test_a_gateway_that_is_slow_to_store_keeps_no_rank(mesh):
    """The decoder is done with its last chunk, whoever still has to keep the frames."""
    mesh.submit("a", "b", "c", steps=1, frames=9)
    mesh.run(consume=False)
    assert {mesh.stages(request_id)[-1] for request_id in "abc"} == {"deliver"}


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
        mesh.report(*item.ranks, item.seq, ("internal_error", "boom"))
        mesh.run()
    assert {(end.code, end.reason) for end in mesh.ends.values()} == {("internal_error", "boom")}
    assert mesh.spare_credits(b"g") == 3


def test_credits_of_a_failed_decode_go_back_to_the_gateway_that_paid():
    """Another one took the request over meanwhile."""
    mesh = Simulation()
    mesh.join(b"old", credits=2)
    mesh.join(b"new", credits=2)
    mesh.submit("a", gateway=b"old", steps=1, frames=33)
    item = mesh.run_to(Decode)
    mesh.resubmit("a", b"new")
    mesh.report(*item.ranks, item.seq, ("internal_error", "boom"))
    mesh.run()
    assert (mesh.spare_credits(b"old"), mesh.spare_credits(b"new")) == (2, 2)


def test_credits_come_back_when_the_group_is_lost():
    mesh = Simulation()
    mesh.join(credits=3)
    for number in range(5):
        mesh.submit(f"r{number}", steps=1, frames=33)
        mesh.run_to(Decode)
        mesh.lose_group()
        mesh.regroup()
        mesh.run()
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
    assert mesh.ends == {"a": Cancelled("a", "why not", mesh.ends["a"].usage)}
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


# ---- what fails and what is lost ---------------------------------------------------------------------------------


def test_a_failed_item_of_one_request_ends_it_when_every_rank_reported(mesh):
    mesh.submit("a", "b", steps=50)
    item = mesh.run_to(Denoise)
    mesh.report(0, item.seq, ("internal_error", "boom"))
    assert mesh.ends == {}
    mesh.report(1, item.seq)
    assert mesh.ends == {"a": Failed("a", "internal_error", "boom", mesh.ends["a"].usage)}
    assert [ids_of(later) for later in mesh.items_of(Release)] == [("a",)]
    mesh.run()
    assert isinstance(mesh.ends["b"], Completed)


def test_a_failed_encode_is_repeated_one_by_one(mesh):
    """One bad prompt does not take the others with it."""
    mesh.submit("a", "b")
    mesh.submit("c")
    mesh.report(0, 1)
    mesh.report(1, 1, ("internal_error", "boom"))
    assert mesh.ends == {}
    while "b" not in mesh.ends:
        seq, item = next(iter(mesh.running.items()))
        bad = isinstance(item, Encode) and ids_of(item) == ("b",)
        for rank in item.ranks:
            mesh.report(rank, seq, ("internal_error", "boom") if bad else None)
        while mesh.gateways[b"g"].inbox:
            mesh.consume(b"g")
    assert [ids_of(item) for item in mesh.items_of(Encode)][:2] == [("a", "b"), ("a",)]
    assert mesh.ends["b"] == Failed("b", "internal_error", "boom", mesh.ends["b"].usage)
    mesh.run()
    assert {type(mesh.ends[name]) for name in "ac"} == {Completed}


def batching(**setting):
    """A mesh where batches pay."""
    simulation = Simulation(cost=KnownCost(growth=0.1), **setting)
    simulation.join()
    return simulation


def run_to_batch(mesh, size):
    mesh.run(until=lambda: any(isinstance(i, Denoise) and len(ids_of(i)) == size for i in mesh.running.values()))
    return next(item for item in mesh.running.values() if isinstance(item, Denoise))


OOM = ("out_of_memory", "CUDA out of memory")


def test_that_memory_ran_out_explains_what_the_other_ranks_say(mesh):
    mesh.submit("a", steps=50)
    item = mesh.run_to(Denoise)
    mesh.report(0, item.seq, OOM)
    mesh.report(1, item.seq, ("internal_error", "rank 0 left"))
    assert mesh.ends["a"].code == "out_of_memory"


def test_a_batch_that_runs_out_of_memory_is_halved_until_it_fits():
    mesh = batching()
    mesh.submit("a", "b", "c", "d", steps=50)
    for size in (4, 2):
        item = run_to_batch(mesh, size)
        for rank in item.ranks:
            mesh.report(rank, item.seq, OOM)
    mesh.run()
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    sizes = [len(ids_of(item)) for item in mesh.items_of(Denoise)]
    assert sizes[-20:] == [1] * 20, "the shape keeps its limit"


def test_what_runs_out_of_memory_alone_fails_with_advice(mesh):
    mesh.submit("a", steps=50)
    item = mesh.run_to(Denoise)
    mesh.finish_with(item, OOM)
    assert mesh.ends["a"].code == "out_of_memory"
    assert mesh.ends["a"].reason == (
        "CUDA out of memory; 9 frames of 32x32 need half as much; more ranks share its activations (--ulysses-degree)"
    )


def test_a_decode_that_runs_out_of_memory_beside_others_is_repeated_alone(mesh):
    mesh.submit("a", "b", steps=5)
    mesh.finish_with(mesh.run_to(Decode), OOM)
    assert mesh.ends == {}
    mesh.run()
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    assert sum(item.steps for item in mesh.items_of(Denoise)) == 15


@pytest.mark.parametrize("kind", [Encode, Denoise, Decode])
def test_what_runs_out_of_memory_beside_the_states_of_others_gets_a_mesh_without_any(mesh, kind):
    """Its items are always its own here; what fills the memory is what others hold meanwhile."""
    mesh.submit("first", steps=100, key="another")
    mesh.run_to(Denoise)
    mesh.submit("large", steps=5, key="its own")
    company, number = [], 0
    while "large" not in mesh.ends:
        assert mesh.now < 100, "it never gets it"
        if len(mesh.scheduler.requests) < 4:
            mesh.submit(f"other{number}", steps=5, key=f"key {number % 2}")
            number += 1
        for item in list(mesh.running.values()):
            if isinstance(item, kind) and ids_of(item) == ("large",):
                company.append(len(mesh.states) - 1)
                mesh.finish_with(item, OOM if len(mesh.states) > 1 else None)
        mesh.run(until=iter([False, True]).__next__)
    mesh.run()
    assert company[0] > 0, "nothing else held memory at first"
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    assert not mesh.scheduler.losses.crash_loop(mesh.now)


def test_a_suspect_of_a_loss_keeps_nobody_out():
    """Only memory is kept free of others; the items of a suspect run alone, but others may be taken in between."""
    mesh = batching()
    mesh.submit("suspect", steps=20)
    for _ in range(2):
        mesh.run_to(Denoise)
        mesh.lose_group()
        mesh.regroup()
    mesh.submit("other", steps=5, key="another")
    mesh.run(until=lambda: {"suspect", "other"} <= set(mesh.states))
    assert {"suspect", "other"} <= set(mesh.states)


@pytest.mark.parametrize("code", ["internal_error", "out_of_memory", "checkpoint_unusable"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_active", [1, 3, 9])
def test_who_is_to_blame_for_a_failed_item(code, batch, num_active):
    requests = tuple(Request(name, CARD.check(SamplingParams(prompt="a cat", seed=1))) for name in "abc"[:batch])
    ids, layout = tuple(request.id for request in requests), Layout(1, 1, 1)
    items = [Encode(1, (0,), requests), Denoise(1, (0,), layout, ids, 1), Decode(1, (0,), ids[0], 1, "ipc://g", 0, 0)]
    smaller = Verdict.ALONE if batch > 1 else Verdict.FAILS
    beside = Verdict.SOLE if num_active > 1 else Verdict.FAILS
    expected = {
        "internal_error": (smaller, smaller, Verdict.FAILS),
        "out_of_memory": (
            (Verdict.ALONE, Verdict.IN_SMALLER_BATCHES, beside) if batch > 1 else (beside, beside, beside)
        ),
        "checkpoint_unusable": (Verdict.WITHOUT_CHECKPOINT,) * 3,
    }
    assert tuple(judge(item, code, num_active) for item in items) == expected[code]


def test_a_group_that_breaks_by_a_full_memory_halves_the_batch_and_blames_nobody():
    mesh = batching()
    mesh.submit("a", "b", "c", "d", steps=50)
    for size in (4, 2):
        item = run_to_batch(mesh, size)
        mesh.lose_group("rank 1: CUDA out of memory", (item.seq, "out_of_memory"))
        mesh.regroup()
    mesh.run()
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    assert not mesh.scheduler.losses.crash_loop(mesh.now)


def test_a_lost_group_sends_what_was_active_back_into_the_line():
    mesh = Simulation()
    mesh.join(credits=1)
    mesh.submit("decoding", steps=5, frames=33)
    mesh.submit("denoising", steps=20)
    mesh.run(consume=False, until=lambda: mesh.states.get("denoising", State(None)).steps == 10)
    mesh.submit("queued")
    mesh.lose_group("rank 1 died")
    assert mesh.ends == {}
    issued = len(mesh.items)
    mesh.submit("later")
    assert len(mesh.items) == issued
    mesh.regroup()
    mesh.run()
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    assert sum(item.steps for item in mesh.items_of(Denoise, "denoising")) == 30, "5 were done, 5 under way"
    assert {item.attempt for item in mesh.items_of(Decode, "decoding")} == {0, 1}


def test_a_request_goes_on_from_its_newest_checkpoint():
    mesh = Simulation(checkpoint_every=5)
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run(until=lambda: mesh.states.get("a", State(None)).steps == 15)
    mesh.write()
    assert [(item.ranks, item.request_ids) for item in mesh.items_of(Checkpoint)] == [((0,), ("a",))] * 2
    mesh.lose_group()
    mesh.regroup()
    (resume,) = [item.resume for item in mesh.items_of(Encode)[1:]]
    assert resume == {"a": SavedState(10, "a-10", 1)}
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert sum(item.steps for item in mesh.items_of(Denoise)) == 25
    assert mesh.files == {}


def test_a_lost_decode_is_repeated_from_the_final_latents():
    mesh = Simulation(checkpoint_every=50)
    mesh.join()
    mesh.submit("a", steps=20, frames=33)
    mesh.run_to(Decode)
    mesh.write()
    mesh.run(until=lambda: mesh.states["a"].chunks > 1)
    mesh.lose_group()
    mesh.regroup()
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert sum(item.steps for item in mesh.items_of(Denoise)) == 20, "no step twice"
    assert next(item.first_chunk for item in mesh.items_of(Decode) if item.attempt == 1) == 0


def test_a_checkpoint_that_is_told_of_after_the_loss_is_used():
    """It was durable before the rank died; its request is in the line again, ordered by what is left."""
    mesh = Simulation(checkpoint_every=5)
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run(until=lambda: len(mesh.writing) == 1)
    mesh.lose_group(durable=1)
    before = mesh.scheduler.requests["a"].remaining_s
    mesh.tell()
    record = mesh.scheduler.requests["a"]
    assert (record.step, record.saved_upto) == (5, 5)
    assert record.remaining_s == pytest.approx(before - 5 * SECONDS["denoise"])
    mesh.regroup()
    assert mesh.items_of(Encode)[-1].resume == {"a": SavedState(5, "a-5", 1)}
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)


def test_a_checkpoint_that_is_told_of_after_the_end_goes():
    mesh = Simulation(checkpoint_every=5)
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run(until=lambda: len(mesh.writing) == 1)
    mesh.lose_group(durable=1)
    mesh.cancel("a")
    mesh.regroup()
    mesh.tell()
    assert mesh.files == {}


def test_what_ends_as_it_starts_again_is_released_with_its_checkpoints():
    mesh = Simulation(checkpoint_every=5)
    mesh.join()
    mesh.submit("a", "b", steps=20)
    item = mesh.run_to(Encode)
    mesh.scheduler.failed(0, item.seq, "internal_error", "boom", mesh.now)
    mesh.scheduler.failed(1, item.seq, "internal_error", "boom", mesh.now)
    mesh.scheduler.cancel("a", "why not", mesh.now)
    releases = [planned for planned in mesh.scheduler.plan(mesh.now) if isinstance(planned, Release)]
    released = [(release.request_ids, release.keep_saved) for release in releases]
    assert released == [(("b",), True), (("a",), False)]


def test_a_checkpoint_that_cannot_be_read_is_forgotten():
    mesh = Simulation(checkpoint_every=5)
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run(until=lambda: mesh.states.get("a", State(None)).steps == 15)
    mesh.lose_group()
    mesh.regroup()
    mesh.files.clear()
    mesh.told.clear()
    mesh.finish_with(mesh.run_to(Encode), ("checkpoint_unusable", "no such file"))
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert mesh.items_of(Encode)[-1].resume == {}


def test_a_checkpoint_of_an_earlier_life_is_used():
    mesh = Simulation(checkpoint_every=5, found={"a": SavedState(15, "a-15", 1), "b": SavedState(20, "b-20", 1)})
    mesh.join()
    mesh.submit("a", "b", steps=20)
    mesh.run()
    assert {type(end) for end in mesh.ends.values()} == {Completed}
    assert sum(item.steps for item in mesh.items_of(Denoise, "a")) == 5
    assert mesh.items_of(Denoise, "b") == []


def test_the_checkpoint_of_a_request_that_ended_in_an_earlier_life_goes():
    saved = {name: SavedState(20, f"{name}-20", 1) for name in ("stored", "cancelled", "claimed", "unclaimed")}
    mesh = Simulation(checkpoint_every=5, found=saved)
    mesh.join()
    mesh.scheduler.stored(b"g", "stored", mesh.now)
    mesh.cancel("cancelled")
    mesh.submit("claimed", steps=20)
    mesh.run()
    assert set(mesh.files) == {"unclaimed"}
    mesh.now = mesh.scheduler.next_deadline()
    mesh.settle()
    assert mesh.now >= UNCLAIMED_S
    assert mesh.files == {}
    assert mesh.scheduler.next_deadline() is None


def test_what_dead_ranks_were_told_to_release_is_released_again():
    mesh = Simulation(checkpoint_every=50)
    mesh.join()
    mesh.submit("a", steps=5, frames=1)
    mesh.run(consume=False)
    mesh.dead = True
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert set(mesh.files) == {"a"}
    mesh.lose_group()
    mesh.regroup()
    assert mesh.files == {}
    # What the ranks have shown to have done is not said again.
    mesh.submit("b", "c", steps=5, frames=1)
    mesh.run()
    mesh.submit("d", steps=5)
    mesh.run_to(Denoise)
    mesh.lose_group()
    mesh.regroup()
    again = [item.request_ids for item in mesh.items_of(Release) if not item.keep_saved]
    assert sum("b" in ids for ids in again) == 1, again


def test_a_request_that_kills_its_workers_fails_alone_and_takes_nobody_with_it():
    mesh = batching()
    mesh.submit("killer", "a", "b", steps=50)
    kills = 0
    while set(mesh.ends) != {"killer", "a", "b"}:
        mesh.run(until=lambda: any("killer" in ids_of(i) for i in mesh.running.values() if isinstance(i, Denoise)))
        if mesh.running:
            kills += 1
            mesh.lose_group("rank 0 died")
            mesh.regroup()
    assert kills == 3
    assert {type(mesh.ends[name]) for name in "ab"} == {Completed}
    assert mesh.ends["killer"].code == "worker_lost"
    assert mesh.ends["killer"].reason == (
        "rank 0 died in denoising, after step 0 of 50; it ran while the workers died 3 times, the last time alone"
    )
    assert not mesh.scheduler.losses.crash_loop(mesh.now), "the mesh is well"


def test_nothing_starts_beside_the_decode_of_a_suspect():
    mesh = Simulation()
    mesh.join()
    mesh.submit("suspect", steps=1, frames=33)
    for _ in range(2):
        mesh.run_to(Decode)
        mesh.lose_group()
        mesh.regroup()
    mesh.submit("other", steps=1, frames=33, key="another")
    mesh.run(until=lambda: any(ids_of(item) == ("suspect",) for item in mesh.items_of(Decode)[2:]))
    assert [ids_of(item) for item in mesh.running.values()] == [("suspect",)]
    mesh.run()
    assert {type(end) for end in mesh.ends.values()} == {Completed}


def test_a_request_that_is_cancelled_in_the_line_leaves_no_checkpoint():
    mesh = Simulation(checkpoint_every=5)
    mesh.join()
    mesh.submit("a", steps=50)
    mesh.run(until=lambda: "a" in mesh.files)
    mesh.lose_group()
    mesh.cancel("a")
    assert isinstance(mesh.ends["a"], Cancelled)
    mesh.regroup()
    assert mesh.files == {}


def test_losses_that_nobody_explains_are_a_crash_loop():
    mesh = Simulation()
    for _ in range(3):
        assert not mesh.scheduler.losses.crash_loop(mesh.now)
        mesh.lose_group()
        mesh.regroup()
    assert mesh.scheduler.losses.crash_loop(mesh.now)
    assert not mesh.scheduler.losses.crash_loop(mesh.now + 301)


def test_one_killer_after_another_is_a_crash_loop():
    mesh = Simulation()
    mesh.join()
    for number in range(3):
        mesh.submit(f"killer{number}", steps=50)
        while f"killer{number}" not in mesh.ends:
            mesh.run_to(Denoise)
            mesh.lose_group()
            mesh.regroup()
    assert mesh.scheduler.losses.crash_loop(mesh.now)


# ---- the end of the mesh -----------------------------------------------------------------------------------------


def test_a_draining_mesh_finishes_and_refuses(mesh):
    mesh.submit("a", "b")
    mesh.scheduler.drain(None, mesh.now)
    mesh.submit("late")
    assert mesh.ends == {"late": Failed("late", "draining", "the mesh is draining and takes no new work")}
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert isinstance(mesh.ends["b"], Completed)
    assert mesh.scheduler.idle


def test_a_drain_takes_what_was_accepted_in_an_earlier_life():
    """The scheduler was started anew during the drain, and hears of that before the gateways hand in what they owe."""
    mesh = Simulation(checkpoint_every=5, found={"saved": SavedState(15, "saved-15", 1)}, ready=False)
    mesh.scheduler.drain(300.0, mesh.now)
    mesh.join()
    mesh.submit("new", "saved", steps=20)
    mesh.submit("begun", steps=20, attempt=1)
    assert {name: end.code for name, end in mesh.ends.items()} == {"new": "draining"}
    mesh.regroup()
    mesh.run()
    assert {type(mesh.ends[name]) for name in ("saved", "begun")} == {Completed}
    assert sum(item.steps for item in mesh.items_of(Denoise, "saved")) == 5
    assert mesh.scheduler.drained(mesh.now + REJOIN_S)


def test_a_drain_of_a_scheduler_that_has_just_begun_waits_for_gateways(mesh):
    fresh = Simulation(ready=False)
    fresh.scheduler.drain(None, fresh.now)
    fresh.regroup()
    assert not fresh.scheduler.drained(fresh.now + REJOIN_S - 0.1)
    assert fresh.scheduler.drained(fresh.now + REJOIN_S)
    mesh.scheduler.drain(None, mesh.now)
    assert mesh.scheduler.drained(mesh.now), "who has seen its ranks has seen its gateways"


def test_a_checkpoint_stays_for_whoever_may_still_come_for_it():
    mesh = Simulation(checkpoint_every=5, found={"a": SavedState(15, "a-15", 1)})
    mesh.submit("a", steps=20, gateway=b"given up")
    assert mesh.ends.pop("a").code == "gateway_lost"
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.run()
    assert sum(item.steps for item in mesh.items_of(Denoise)) == 5
    assert mesh.files == {}


def test_what_is_due_twice_is_saved_once():
    """The item that ends as the drain's time does made a checkpoint due by itself."""
    mesh = Simulation(checkpoint_every=5)
    mesh.join()
    mesh.submit("a", steps=20)
    item = mesh.run_to(Denoise)
    mesh.scheduler.drain(0.0, mesh.now)
    mesh.finish(item)
    assert mesh.writing == [("a", 5)]


def test_a_drain_that_runs_out_of_time_saves_what_is_left():
    mesh = Simulation(checkpoint_every=10)
    mesh.join()
    mesh.submit("a", steps=20)
    mesh.submit("queued", steps=50)
    item = mesh.run_to(Denoise)
    mesh.scheduler.drain(1.0, mesh.now)
    assert mesh.scheduler.next_deadline() == mesh.now + 1.0
    mesh.now += 1.0
    mesh.settle()
    assert not mesh.scheduler.drained(mesh.now), "an item runs"
    mesh.finish(item)
    assert mesh.running == {}
    assert mesh.writing == [("a", 5)]
    assert not mesh.scheduler.drained(mesh.now), "a checkpoint is being written"
    mesh.write()
    assert mesh.scheduler.drained(mesh.now)
    assert mesh.ends == {}, "the gateway's store brings them back"


def test_a_drain_does_not_wait_for_ever_for_a_checkpoint():
    mesh = Simulation(checkpoint_every=10)
    mesh.join()
    mesh.submit("a", steps=20)
    item = mesh.run_to(Denoise)
    mesh.scheduler.drain(0.0, mesh.now)
    mesh.finish(item)
    assert not mesh.scheduler.drained(mesh.now + 9)
    assert mesh.scheduler.drained(mesh.now + 11)


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


def test_a_lost_gateways_requests_end_after_a_while_and_no_others():
    mesh = Simulation()
    mesh.join(b"stays")
    mesh.join(b"leaves")
    mesh.submit("a", gateway=b"leaves", steps=6)
    mesh.submit("b", gateway=b"stays", steps=50)
    mesh.run_to(Denoise)
    mesh.leave(b"leaves")
    mesh.run()
    assert set(mesh.ends) == {"b"}
    assert mesh.items_of(Decode, "a") == [], "there is nobody to take its frames"
    assert mesh.states["a"].steps == 6
    mesh.now = mesh.scheduler.next_deadline()
    mesh.settle()
    assert mesh.ends["a"] == Cancelled("a", "its gateway is gone", mesh.ends["a"].usage)
    assert mesh.states == {}


def test_an_orphan_is_taken_up_where_it_is(mesh):
    mesh.submit("a", steps=20)
    mesh.run_to(Denoise)
    mesh.leave(b"g")
    mesh.join(b"again")
    mesh.resubmit("a", b"again")
    mesh.run()
    mesh.now += 100
    mesh.settle()
    assert isinstance(mesh.ends["a"], Completed)
    assert sum(item.steps for item in mesh.items_of(Denoise)) == 20


def test_a_gateway_that_comes_back_under_its_name_keeps_its_requests(mesh):
    mesh.submit("a", steps=50)
    mesh.run_to(Denoise)
    mesh.leave(b"g")
    mesh.now += 1
    mesh.join()
    mesh.now += 100
    mesh.settle()
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)


def test_work_of_a_gateway_that_was_given_up_is_refused(mesh):
    """It lives and does not know it, or its last words arrive late: nobody would take the frames."""
    mesh.leave(b"g")
    mesh.submit("a")
    assert mesh.ends["a"].code == "gateway_lost"
    mesh.run()
    assert mesh.items == []


# ---- a gateway that was started anew ------------------------------------------------------------------------------


@pytest.fixture
def two_gateways():
    simulation = Simulation()
    simulation.join(b"old")
    simulation.join(b"new")
    return simulation


@pytest.mark.parametrize("kind", [Encode, Denoise, Decode])
def test_a_running_request_goes_on_for_the_gateway_that_takes_it_over(two_gateways, kind):
    mesh = two_gateways
    mesh.submit("a", gateway=b"old", steps=20, frames=33)
    mesh.run_to(kind)
    told = len(mesh.news)
    mesh.resubmit("a", b"new")
    mesh.resubmit("a", b"new")
    assert mesh.adoptions["a"] == 1
    mesh.run()
    assert {gateway for gateway, _ in mesh.news[told:]} == {b"new"}
    assert isinstance(mesh.ends["a"], Completed)
    assert sum(item.steps for item in mesh.items_of(Denoise)) == 20, "no step is done twice"
    decodes = [item for item in mesh.items_of(Decode) if item.endpoint == "ipc://new"]
    assert decodes[0].first_chunk == 0
    assert sum(item.chunks for item in decodes) == 9
    assert mesh.states == {}
    assert mesh.scheduler.idle
    assert (mesh.spare_credits(b"old"), mesh.spare_credits(b"new")) == (64, 64)


def test_a_waiting_request_is_taken_over_at_once(two_gateways):
    mesh = two_gateways
    mesh.submit("short", gateway=b"old", steps=20)
    mesh.submit("queued", gateway=b"old", steps=50)
    mesh.resubmit("queued", b"new")
    mesh.run_to(Denoise)
    mesh.leave(b"old")
    mesh.run()
    assert isinstance(mesh.ends["queued"], Completed)
    mesh.now += 31
    mesh.settle()
    assert isinstance(mesh.ends["short"], Cancelled)


def test_a_deadline_holds_for_whoever_takes_the_request_over(two_gateways):
    """It passed during an item: the old gateway's cancel is forgotten, the deadline is not."""
    mesh = two_gateways
    mesh.submit("a", gateway=b"old", steps=100, timeout_s=1.0)
    item = mesh.run_to(Denoise)
    mesh.now = 1.5
    mesh.settle()
    mesh.resubmit("a", b"new")
    mesh.finish(item)
    assert mesh.ends["a"].reason.startswith("its timeout of 1 s passed")


def test_what_was_delivered_but_not_stored_is_decoded_again(two_gateways):
    mesh = two_gateways
    mesh.submit("a", gateway=b"old", steps=5)
    mesh.run(consume=False)
    mesh.resubmit("a", b"new")
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert sum(item.steps for item in mesh.items_of(Denoise)) == 5


def test_the_thanks_of_a_gateway_that_lost_the_request_count_for_nothing(two_gateways):
    mesh = two_gateways
    mesh.submit("a", gateway=b"old", steps=5)
    mesh.run(consume=False)
    mesh.resubmit("a", b"new")
    mesh.scheduler.stored(b"old", "a", mesh.now)
    mesh.settle()
    assert mesh.ends == {}


@pytest.mark.parametrize("event", ["cancel", "lost", "failed", "group", "old lost"])
def test_whatever_happens_before_the_item_is_over(two_gateways, event):
    mesh = two_gateways
    mesh.submit("a", gateway=b"old", steps=20)
    item = mesh.run_to(Denoise)
    mesh.resubmit("a", b"new")
    failure = None
    match event:
        case "cancel":
            mesh.cancel("a")
        case "lost":
            mesh.leave(b"new")
        case "old lost":
            mesh.leave(b"old")
        case "failed":
            failure = ("internal_error", "boom")
        case "group":
            mesh.lose_group()
            mesh.regroup()
    assert mesh.ends == {}
    if event != "group":
        mesh.finish_with(item, failure)
    mesh.run()
    mesh.now += 31
    mesh.settle()
    ends = {"cancel": Cancelled, "lost": Cancelled, "failed": Failed}
    assert isinstance(mesh.ends["a"], ends.get(event, Completed))
    assert mesh.states == {}


def test_a_gateway_that_nobody_knows_takes_nothing_over(mesh):
    mesh.submit("a", steps=20)
    mesh.run_to(Denoise)
    mesh.resubmit("a", b"nobody")
    mesh.run()
    assert isinstance(mesh.ends["a"], Completed)
    assert len(mesh.items_of(Encode)) == 1
