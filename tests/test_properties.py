"""What holds for the scheduler whatever happens, in thousands of random scripts: nothing lost, repeated or leaked, the
same plan for the same happenings, and bounds on how far a key lags and how long a request waits."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import CALM, ROUGH, SETTINGS, Setting, check_end, play, scripts
from simulation import CARD, SECONDS, KnownCost, Simulation, bytes_of

import runtime.fairness
from runtime.fairness import AGEING, PATIENCE_S, patient_until
from runtime.planner import Emit, Enter, Planner
from runtime.protocol import Cancelled, Checkpoint, Completed, Decode, Denoise, Encode, Failed, Release
from runtime.request import Stage
from runtime.scheduler import ITEM_SECONDS

LONG_SCRIPTS = int(os.environ.get("LONG_SCRIPTS", "200"))
"""Thousands are for a machine that has nothing else to do."""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(script=scripts(CALM), setting=SETTINGS)
def test_when_nothing_fails_everything_completes(script, setting):
    mesh = play(script, setting)
    refused = {request_id for request_id, end in mesh.ends.items() if not isinstance(end, Completed)}
    largest = setting.budget or math.inf
    assert refused == {r for r, params in mesh.params.items() if CARD.state_bytes(params, "decode") > largest}
    check_end(mesh)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(script=scripts(ROUGH), setting=SETTINGS)
def test_whatever_happens_nothing_is_lost_repeated_or_leaked(script, setting):
    check_end(play(script, setting))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=LONG_SCRIPTS, deadline=None, derandomize=True)
@given(script=scripts(ROUGH, 90), setting=SETTINGS)
def test_nor_in_longer_scripts(script, setting):
    check_end(play(script, setting))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(script=scripts(ROUGH), setting=SETTINGS)
def test_the_same_happenings_give_the_same_plan(script, setting):
    mesh, again = play(script, setting), play(script, setting)
    assert (again.items, again.news, again.ends) == (mesh.items, mesh.news, mesh.ends)


def test_the_plan_does_not_depend_on_the_order_of_hashes():
    """A set that is walked without being sorted shows in another process."""
    here = Path(__file__).parent
    digests = set()
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
        }
        command = [sys.executable, str(here / "scripts.py"), "60"]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1
    assert digests != {""}


def test_the_scripts_can_reach_every_end():
    """The properties above are worth what their actions can do."""
    first = ("report", 0, 1)
    script = [
        *[("submit", 0, 2, 5, 9), *[first] * 6, ("send", 0), ("consume", 0, 1), ("write", 0)],
        *[("fail", 0, "internal_error"), ("fail", 0, "internal_error"), ("cancel", 1), *[first] * 6],
        *[("submit", 0, 3, 5, 9), first, first, ("lose", False, 0), ("submit", 0, 1, 1, 1), ("regroup",)],
        *[("join", 3), ("submit", 1, 3, 1, 9), first, first, ("leave", 0)],
    ]
    mesh = play(script, Setting(2, "srpt", 0.5, None, 4))
    assert {type(end) for end in mesh.ends.values()} == {Completed, Failed, Cancelled}
    assert {type(item) for item in mesh.items} == {Encode, Denoise, Decode, Checkpoint, Release}
    check_end(mesh)


SLOW = 100.0
"""Items of seconds, so that the patience of ten minutes is over after a few hundred."""


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    policy=st.sampled_from(["srpt", "deadline", "fifo"]),
    keys=st.integers(1, 3),
    num_ranks=st.integers(1, 2),
    growth=st.sampled_from([1.0, 0.5]),
    frames=st.sampled_from([9, 33]),
    budget=st.sampled_from([1 << 50, bytes_of("decode", 33)]),
    stream=st.lists(st.tuples(st.sampled_from([1, 1, 2, 6]), st.sampled_from([1, 9])), min_size=5, max_size=15),
    events=st.lists(st.tuples(st.integers(1, 120), st.sampled_from(["cancel", "lose"])), max_size=6),
)
def test_no_request_waits_for_ever_whoever_comes_with_higher_priority(
    policy, keys, num_ranks, growth, frames, budget, stream, events
):
    """Every key has a stream without end, of higher priority than the one request that is watched and mostly shorter.

    With the real constants: after PATIENCE_S + R / AGEING it is the first of its key, and what it waits for is the work
    left of those that hold the ranks' memory, what its key is ahead of the others, one more request, which another key
    may get in before it, and its own R seconds. Each key has its turn beside, each loss of the group costs it again.
    """
    cost = KnownCost({kind: SLOW * seconds for kind, seconds in SECONDS.items()}, growth)
    mesh = Simulation(policy=policy, num_ranks=num_ranks, cost=cost, budget=budget, slow=SLOW)
    mesh.join(credits=1000)
    flood, happenings = cycle(stream), sorted(events)
    refill(mesh, keys, flood)
    mesh.submit("patient", key="key 0", steps=4, frames=frames, priority=-1)
    patient = mesh.scheduler.requests["patient"]
    work, first_at, limit, reports = patient.remaining_s, patient_until(patient), math.inf, 0
    assert first_at == PATIENCE_S + work / AGEING
    while "patient" not in mesh.ends:
        refill(mesh, keys, flood)
        mesh.run(until=iter([False, True]).__next__)
        reports += 1
        while happenings and happenings[0][0] <= reports:
            happen(mesh, happenings.pop(0)[1])
        if mesh.now >= first_at and math.isinf(limit):
            held = sum(r.remaining_s for r in mesh.scheduler.requests.values() if r.stage is not Stage.QUEUED)
            losses = 1 + sum(name == "lose" for _, name in happenings)
            clocks = mesh.scheduler._fair.clocks
            ahead = clocks["key 0"] - min(clocks.values())
            longest = max(mesh.predicted.values())
            limit = mesh.now + losses * keys * num_ranks * (held + work + ahead + longest)
        assert mesh.now <= limit, "it starves"


def refill(mesh, keys, flood):
    """Four of every key in line or at work."""
    for key in range(keys):
        while sum(record.key == f"key {key}" for record in mesh.scheduler.requests.values()) < 4:
            steps, frames = next(flood)
            mesh.submit(f"flood{len(mesh.params)}", key=f"key {key}", steps=steps, frames=frames, priority=1)


def happen(mesh, event):
    if event == "lose":
        mesh.lose_group()
        mesh.regroup()
    elif others := [name for name in mesh.scheduler.requests if name != "patient"]:
        mesh.cancel(others[0])


ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 0.5),
        st.sampled_from(["one", "two", "three"]),
        st.sampled_from([1, 4, 20, 60]),
        st.sampled_from([1, 9, 9, 33]),
    ),
    min_size=5,
    max_size=40,
)
"""(seconds after the last, key, steps, frames)."""


# ---- the bounds that runtime/fairness.py states -------------------------------------------------------------------


@dataclass
class Watch:
    """Stands before a planner and asks at every choice who was kept waiting for it, and by whom.

    The planner changes nothing, so it can be asked what it would have chosen for each key alone.
    """

    planner: Planner
    furthest_ahead: float = 0.0
    """Of a key in an item, before a key that could have run instead and shares nothing with it, clock seconds."""
    admitted: Counter[str] = field(default_factory=Counter)
    """Encodes since a request's last step of those who are to join it."""

    def waiting(self, now):
        return self.planner.waiting(now)

    def choose(self, waiting, free):
        choice = self.planner.choose(waiting, free)
        if choice is not None:
            served = {record.key for record in self.records(choice)}
            ahead = max(self.planner.clocks[key] for key in served)
            for key in self.held_back(waiting, free, choice, served):
                self.furthest_ahead = max(self.furthest_ahead, ahead - self.planner.clocks[key])
            if joins(choice):
                self.admitted[choice.turn.id] += 1
            else:
                for record in self.records(choice):
                    self.admitted.pop(record.id, None)
        return choice

    def records(self, choice):
        return (choice.turn,) if isinstance(choice, Emit) else choice.records

    def held_back(self, waiting, free, choice, served):
        """Keys without a part in the item that could have run, by themselves and in their turn."""
        door_shut = False
        for key in sorted(waiting, key=lambda key: (self.planner.clocks[key], key)):
            alone = self.planner.choose({key: waiting[key]}, free)
            queued = any(record.stage is Stage.QUEUED for record in waiting[key])
            could = alone is not None and not (door_shut and isinstance(alone, Enter))
            if could and key not in served and not (joins(choice) and alike(choice.turn, waiting[key][0])):
                yield key
            door_shut = door_shut or (queued and not isinstance(alone, Enter))


def joins(choice):
    """Whether it admits somebody to the batch of the request whose turn it is."""
    return isinstance(choice, Enter) and choice.turn.stage is Stage.DENOISE


def alike(record, other):
    """Whether two that denoise share their forwards."""
    keys = [CARD.batch_key(each.request.params, each.step) for each in (record, other)]
    return other.stage is Stage.DENOISE and not other.alone and keys[0] == keys[1]


WEIGHTS = {"two": 2.0, "three": 0.5}
CROWD = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3]),
        st.sampled_from(["one", "two", "three", "four"]),
        st.sampled_from([1, 4, 20, 60]),
        st.sampled_from([1, 9, 9, 33]),
        st.sampled_from([0, 0, 0, 1]),
        st.sampled_from(["", "", "", "", "", "", "lose", "cancel"]),
    ),
    min_size=20,
    max_size=40,
)
"""(seconds after the last, key, steps, frames, priority, what happens beside)."""


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    crowd=CROWD,
    num_ranks=st.integers(1, 3),
    growth=st.sampled_from([1.0, 0.5, 0.1]),
    budget=st.sampled_from([1 << 50, bytes_of("decode", 33), 3 * bytes_of("decode", 33)]),
)
def test_nobody_is_served_an_item_ahead_of_a_key_that_could_run_instead(crowd, num_ranks, growth, budget):
    mesh = Simulation(
        num_ranks=num_ranks, cost=KnownCost(growth=growth), budget=budget, weights=WEIGHTS, checkpoint_every=5
    )
    mesh.join(credits=1000)
    watch = mesh.scheduler._planner = Watch(mesh.scheduler._planner)
    for number, (pause, key, steps, frames, priority, beside) in enumerate(crowd):
        until = mesh.now + pause
        mesh.run(until=lambda until=until: not mesh.due or min(mesh.due.values()) >= until)
        mesh.now = max(mesh.now, until)
        mesh.submit(f"r{number}", key=key, steps=steps, frames=frames, priority=priority)
        if beside:
            watch.admitted.clear()
        if beside == "cancel":
            mesh.cancel(f"r{number // 2}")
        elif beside == "lose":
            mesh.lose_group(durable=number % 3)
            mesh.regroup()
        assert max(watch.admitted.values(), default=0) < mesh.scheduler.limits.max_size
    mesh.run()
    assert set(mesh.ends) == set(mesh.params)
    assert watch.furthest_ahead <= ITEM_SECONDS * num_ranks + 1e-9


@settings(max_examples=80, deadline=None, derandomize=True)
@given(arrivals=ARRIVALS, num_ranks=st.integers(1, 3))
def test_no_key_that_waits_lags_by_more_than_its_turns_items(arrivals, num_ranks):
    """Clocks of keys that could run, where no batch pays: an item of the one ahead and one of the one behind.

    Where batches pay, a key with many members in a shared one runs ahead of a key with few for as long as both share;
    the one behind loses nothing by it and goes first afterwards, so no such bound holds there.
    """
    mesh = Simulation(num_ranks=num_ranks, cost=KnownCost(growth=1.0), budget=1 << 50)
    mesh.join(credits=1000)
    bound = 3 * ITEM_SECONDS * num_ranks
    for number, (pause, key, steps, frames) in enumerate(arrivals):
        until = mesh.now + pause
        while mesh.due and min(mesh.due.values()) < until:
            mesh.next_report()
            check_lag(mesh, bound)
        mesh.now = max(mesh.now, until)
        mesh.submit(f"r{number}", key=key, steps=steps, frames=frames)
        check_lag(mesh, bound)
    while mesh.due or mesh.gateways[b"g"].inbox:
        mesh.run(until=iter([False, True]).__next__)
        check_lag(mesh, bound)
    assert {type(end) for end in mesh.ends.values()} == {Completed}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(arrivals=ARRIVALS, num_ranks=st.integers(1, 3))
def test_no_request_waits_longer_than_for_the_work_that_may_go_before_it(arrivals, num_ranks):
    """Within a key: ageing lets nothing overtake a request of R seconds that arrives R / AGEING later or more, and as
    long as there is work the mesh does a second of it per second. With quick ageing the bound is a sharp one."""
    ageing = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.fairness, "AGEING", ageing)
        check_waits(arrivals, num_ranks, ageing)


def check_waits(arrivals, num_ranks, ageing):
    mesh = Simulation(num_ranks=num_ranks, cost=KnownCost(growth=1.0), budget=1 << 50)
    mesh.join(credits=1000)
    arrived, ended = {}, {}

    def note():
        ended.update(dict.fromkeys(mesh.ends.keys() - ended.keys(), mesh.now))

    for number, (pause, _, steps, frames) in enumerate(arrivals):
        until = mesh.now + pause
        mesh.run(until=lambda t=until: note() or not mesh.due or min(mesh.due.values()) >= t)
        mesh.now = max(mesh.now, until)
        mesh.submit(f"r{number}", steps=steps, frames=frames)
        arrived[f"r{number}"] = (mesh.now, mesh.predicted[f"r{number}"])
    mesh.run(until=note)
    note()
    for name, (at, work) in arrived.items():
        horizon = at + work / ageing
        before = sum(seconds for when, seconds in arrived.values() if when <= horizon)
        assert ended[name] <= horizon + before + 4 * ITEM_SECONDS


def check_lag(mesh, bound):
    scheduler = mesh.scheduler
    if not scheduler.running:
        return
    waiting = scheduler._planner.waiting(mesh.now).keys() & scheduler._fair.clocks.keys() & scheduler._fair._waiting
    clocks = [scheduler._fair.clocks[key] for key in waiting]
    assert max(clocks, default=0.0) - min(clocks, default=0.0) <= bound + 1e-9
