"""Whose turn it is: clocks of keys, and one key's line against a line that is sorted anew each time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import CARD

import runtime.fairness
from runtime.fairness import AGEING, MANY_KEYS, PATIENCE_S, URGENT_S, FairShare, WaitingLine, order, patient_until, turn
from runtime.protocol import Request
from runtime.request import RequestRecord
from runtime.sampling import SamplingParams

PARAMS = CARD.check(SamplingParams(prompt="a cat", seed=1))


def record(request_id, *, remaining=1.0, arrived=0.0, priority=0, timeout_s=None):
    request = Request(request_id, PARAMS, priority=priority, timeout_s=timeout_s)
    return RequestRecord(request, b"g", arrived, remaining_s=remaining)


def line_of(policy, *records):
    line = WaitingLine(policy)
    for each in records:
        line.add(each)
    return line


# ---- clocks ------------------------------------------------------------------------------------------------------


def serve(fair, keys, cost):
    """The furthest behind gets an item."""
    fair.wait(set(keys))
    key = min(keys, key=lambda key: (fair.clocks[key], key))
    fair.serve(key)
    fair.charge(key, cost(key))
    return key


def lag_of(fair, keys):
    """Furthest ahead less furthest behind, seconds of service."""
    return max(fair.clocks[key] for key in keys) - min(fair.clocks[key] for key in keys)


def test_equal_weights_get_equal_service_whatever_an_item_costs():
    fair, given_to = FairShare(), {"a": 0.0, "b": 0.0}
    for _ in range(1000):
        key = serve(fair, "ab", {"a": 0.5, "b": 0.02}.get)
        given_to[key] += {"a": 0.5, "b": 0.02}[key]
        assert lag_of(fair, "ab") <= 0.5 + 1e-9
    assert given_to["a"] == pytest.approx(given_to["b"], abs=0.5)


def test_service_follows_the_weights():
    fair, given_to = FairShare({"a": 3.0}), {"a": 0.0, "b": 0.0}
    for _ in range(1000):
        given_to[serve(fair, "ab", lambda key: 0.1)] += 0.1
    assert given_to["a"] == pytest.approx(3 * given_to["b"], abs=0.5)


def test_a_key_that_comes_back_starts_at_the_present():
    fair = FairShare()
    serve(fair, "ab", lambda key: 1.0)
    for _ in range(100):
        serve(fair, "a", lambda key: 1.0)
    served = [serve(fair, "ab", lambda key: 1.0) for _ in range(10)]
    assert served.count("b") in {5, 6}


def test_a_key_that_was_alone_owes_nothing_for_it():
    fair = FairShare()
    for _ in range(100):
        serve(fair, "a", lambda key: 1.0)
    fair.wait(set())
    served = [serve(fair, "ab", lambda key: 1.0) for _ in range(10)]
    assert served.count("a") in {4, 5}


def test_a_key_that_is_ahead_gains_nothing_by_leaving():
    fair = FairShare()
    fair.wait({"a", "b"})
    fair.charge("a", 5.0)
    fair.wait({"b"})
    fair.wait({"a", "b"})
    assert fair.clocks["a"] - fair.clocks["b"] == 5.0


def test_clocks_of_keys_that_are_away_are_forgotten():
    fair = FairShare()
    for number in range(3 * MANY_KEYS):
        for _ in range(4):
            serve(fair, [f"key {number}", "always"], lambda key: 0.1)
    assert len(fair.clocks) <= MANY_KEYS + 5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sets(st.sampled_from("abcdefg")), st.floats(0.01, 1.0)), min_size=1, max_size=80))
def test_what_is_forgotten_changes_no_turn(turns):
    quick, whole = FairShare(), FairShare()
    for keys, seconds in turns:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime.fairness, "MANY_KEYS", -2 * len(keys) - 1)
            quick.wait(keys)
        whole.wait(keys)
        assert {key: quick.clocks[key] for key in keys} == {key: whole.clocks[key] for key in keys}
        if keys:
            key = min(keys, key=lambda one: (whole.clocks[one], one))
            for fair in (quick, whole):
                fair.serve(key)
                fair.charge(key, seconds)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sets(st.sampled_from("abcd")), st.floats(0.01, 1.0)), min_size=1, max_size=80),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.5, 4.0)),
)
def test_the_lag_of_waiting_keys_is_bounded_whoever_comes_and_goes(turns, weights):
    fair = FairShare(weights)
    bound = 1.0 / min([1.0, *weights.values()])
    for keys, seconds in turns:
        if keys:
            serve(fair, sorted(keys), lambda key, seconds=seconds: seconds)
            assert lag_of(fair, keys) <= 2 * bound + 1e-9
        else:
            fair.wait(set())


# ---- a key's line ------------------------------------------------------------------------------------------------


def test_fifo_is_arrival():
    line = line_of("fifo", record("b", arrived=2, priority=9), record("a", arrived=1, remaining=99, timeout_s=1.0))
    assert [each.id for each in line] == ["a", "b"]
    assert line.first(0.0).id == "a"


def test_srpt_is_priority_then_remaining_work():
    line = line_of("srpt", record("long", remaining=9), record("short"), record("high", remaining=99, priority=1))
    assert [each.id for each in line] == ["high", "short", "long"]


def test_deadline_is_priority_then_slack_then_remaining_work():
    records = [record("never", remaining=2), record("nor I"), record("tight", remaining=9, timeout_s=10.0)]
    line = line_of("deadline", *records, record("loose", timeout_s=10.0), record("high", priority=1))
    assert [each.id for each in line] == ["high", "tight", "loose", "nor I", "never"]


def test_ageing_forgives_work():
    """R seconds of work wait at most (R - r) / AGEING for newcomers of r seconds."""
    old, limit = record("old", remaining=10.0), (10.0 - 1.0) / AGEING
    assert order(record("before", arrived=limit - 1), "srpt") < order(old, "srpt")
    assert order(record("after", arrived=limit + 1), "srpt") > order(old, "srpt")


@pytest.mark.parametrize(
    ("now", "first"),
    [(0.0, "short"), (4.9 - URGENT_S, "short"), (5.1 - URGENT_S, "urgent"), (5.5, "urgent"), (5.1 + URGENT_S, "short")],
)
def test_who_has_to_start_now_goes_first_under_srpt(now, first):
    urgent, short = record("urgent", remaining=95.0, timeout_s=100.0), record("short")
    line = line_of("srpt", urgent, short)
    assert line.first(now).id == first
    assert min([urgent, short], key=lambda each: turn(each, "srpt", now)).id == first


def test_urgency_does_not_go_before_priority():
    urgent = [record("low", remaining=4.9, timeout_s=5.0), record("high", remaining=4.8, timeout_s=5.0, priority=1)]
    line = line_of("srpt", *urgent, record("head", priority=1, remaining=0.1))
    assert line.first(0.0).id == "high"
    line.remove(urgent[1])
    assert line.first(0.0).id == "head"


@pytest.mark.parametrize("policy", ["srpt", "deadline"])
def test_patience_ends_before_priority(policy):
    low, high = record("low", remaining=2.0), record("high", remaining=1.0, arrived=700.0, priority=9)
    line, limit = line_of(policy, low, high), PATIENCE_S + 2.0 / AGEING
    assert patient_until(low) == limit
    assert line.first(limit - 1).id == "high"
    assert line.first(limit).id == "low"
    assert min([low, high], key=lambda each: turn(each, policy, limit)) is low


RECORDS = st.lists(
    st.tuples(st.floats(0.1, 50), st.floats(0, 100), st.integers(0, 2), st.none() | st.floats(0.1, 100)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(RECORDS, st.sampled_from(["fifo", "srpt", "deadline"]), st.randoms(use_true_random=False), st.floats(0, 3000))
def test_a_line_is_what_sorting_would_give(rows, policy, random, now):
    records = [
        record(f"r{n}", remaining=left, arrived=arrived, priority=priority, timeout_s=timeout)
        for n, (left, arrived, priority, timeout) in enumerate(rows)
    ]
    line = line_of(policy, *records)
    for gone in random.sample(records, len(records) // 2):
        line.remove(gone)
        assert gone not in line
        records = [each for each in records if each is not gone]
    expected = sorted(records, key=lambda each: (order(each, policy), each.id))
    assert [each.id for each in line] == [each.id for each in expected]
    assert len(line) == len(expected)
    assert all(each in line for each in records)
    for place, each in enumerate(expected):
        position, before_s = line.ahead_of(each)
        assert (position, before_s) == (place + 1, pytest.approx(sum(other.remaining_s for other in expected[:place])))
    if records:
        best = min(turn(each, policy, now) for each in records)
        assert turn(line.first(now), policy, now)[:2] == best[:2]
        assert line.first(now) is min(records, key=lambda each: (turn(each, policy, now), each.id))


def test_no_deadline_is_no_urgency():
    assert record("a").deadline == math.inf
    assert turn(record("a"), "srpt", 500.0) == order(record("a"), "srpt")
