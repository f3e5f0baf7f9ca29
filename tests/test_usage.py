"""What a request took of the mesh: rank-seconds, attempts, time in line, memory; and the scheduler's books of it."""

from __future__ import annotations

from collections import Counter

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import KnownCost, Simulation, ids_of

from runtime.diary import Diary
from runtime.protocol import Completed, Decode, Denoise, Encode, Failed, Progress, Request
from runtime.totals import MOST_ACCOUNTS, OTHER_ACCOUNTS, Histogram, Tally


class Books(Simulation):
    """A simulation that keeps books of its own: how long ranks were busy with items that came to their end."""

    def __init__(self, **options):
        super().__init__(**options)
        self.busy = 0.0
        self.busy_of = Counter()
        self.records = {}
        self.memory = {}
        """Peak that a rank reports."""
        completed = self.scheduler.completed
        self.scheduler.completed = lambda rank, seq, seconds, now: completed(
            rank, seq, seconds, now, self.memory.get(rank, 0)
        )

    def start(self, item):
        super().start(item)
        if isinstance(item, Encode | Denoise | Decode):
            self.records |= {id(self.scheduler.requests[one]): self.scheduler.requests[one] for one in ids_of(item)}

    def report(self, rank, seq, failure=None):
        item = self.running[seq]
        super().report(rank, seq, failure)
        if seq not in self.running and seq not in self.failed:
            spent = self.seconds_of(item) * len(item.ranks)
            self.busy += spent
            self.busy_of.update(dict.fromkeys(ids_of(item), spent / len(ids_of(item))))


@pytest.fixture
def mesh():
    simulation = Books()
    simulation.join()
    return simulation


def usage(mesh, request_id):
    return mesh.ends[request_id].usage


def test_a_request_alone_pays_for_all_its_items_on_all_their_ranks(mesh):
    mesh.memory = {0: 5, 1: 7}
    mesh.submit("a", steps=12, frames=17)
    mesh.run()
    assert usage(mesh, "a").rank_seconds == pytest.approx(2 * 0.05 + 2 * 12 * 0.02 + 5 * 0.03)
    assert (usage(mesh, "a").attempts, usage(mesh, "a").peak_memory_bytes) == (1, 7)
    assert usage(mesh, "a").queue_s == mesh.ends["a"].timings["queued"] == 0


def test_a_batch_is_split_evenly_and_the_line_is_not_charged():
    mesh = Books(cost=KnownCost(growth=0.5))
    mesh.join()
    mesh.submit("a", "b", key="one")
    mesh.submit("c", key="two", steps=3)
    mesh.run()
    assert {len(item.request_ids) for item in mesh.items_of(Denoise)} != {1}
    assert usage(mesh, "a").rank_seconds == pytest.approx(usage(mesh, "b").rank_seconds)
    spent = {one: usage(mesh, one).rank_seconds for one in "abc"}
    assert spent == pytest.approx(dict(mesh.busy_of))
    assert mesh.scheduler.tally.rank_seconds == pytest.approx({"one": spent["a"] + spent["b"], "two": spent["c"]})


def test_every_attempt_counts_and_so_does_its_time_in_line(mesh):
    mesh.submit("a", steps=10)
    mesh.run_to(Denoise)
    mesh.next_report()
    mesh.next_report()
    mesh.lose_group()
    mesh.now += 3.0
    mesh.regroup()
    mesh.run()
    assert usage(mesh, "a").attempts == 2
    assert usage(mesh, "a").queue_s == pytest.approx(3.0)
    assert usage(mesh, "a").rank_seconds == pytest.approx(mesh.busy)
    assert mesh.busy > 2 * (0.05 + 10 * 0.02) + 3 * 0.03


STEPS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 3), st.integers(1, 12), st.sampled_from(["x", "y"])),
    st.tuples(st.just("report")),
    st.tuples(st.just("fail")),
    st.tuples(st.just("consume")),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("lose")),
    st.tuples(st.just("wait"), st.floats(0, 5)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(script=st.lists(STEPS, max_size=60), num_ranks=st.sampled_from([1, 2, 4]), growth=st.sampled_from([0.3, 1.0]))
def test_the_sum_over_all_requests_is_the_time_that_ranks_were_busy(script, num_ranks, growth):
    mesh = Books(num_ranks=num_ranks, cost=KnownCost(growth=growth))
    mesh.join()
    names = iter(f"r{n}" for n in range(1000))
    for kind, *args in [*script, ("submit", 2, 4, "x")]:
        match kind:
            case "submit":
                count, steps, key = args
                mesh.submit(*(next(names) for _ in range(count)), steps=steps, key=key)
            case "report" if mesh.due:
                mesh.next_report()
            case "fail" if mesh.due:
                mesh.report(*min(mesh.due), ("internal_error", "boom"))
            case "consume" if mesh.gateways[b"g"].inbox:
                mesh.consume(b"g")
            case "cancel":
                mesh.cancel(f"r{args[0]}")
            case "lose":
                mesh.lose_group()
                mesh.regroup()
            case "wait":
                mesh.now += args[0]
    mesh.run()
    assert mesh.scheduler.idle
    assert sum(record.rank_seconds for record in mesh.records.values()) == pytest.approx(mesh.busy)
    assert sum(end.usage.rank_seconds for end in mesh.ends.values()) == pytest.approx(mesh.busy), "whatever the end"
    assert sum(mesh.scheduler.tally.rank_seconds.values()) == pytest.approx(mesh.busy)
    completed = {one: end for one, end in mesh.ends.items() if isinstance(end, Completed)}
    for one, end in completed.items():
        assert end.usage.rank_seconds == pytest.approx(mesh.busy_of[one])
        assert 1 <= end.usage.attempts == sum(one in ids_of(item) for item in mesh.items_of(Encode))


# ---- the scheduler's books ---------------------------------------------------------------------------------------


def test_values_fall_under_the_first_bound_that_they_do_not_exceed():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.add(value)
    histogram.add(1.5, times=10)
    assert histogram.buckets.counts == (2, 12, 1)
    assert histogram.buckets.total == pytest.approx(23.0)


def test_items_are_counted_by_step_by_batch_and_by_how_well_they_were_foreseen(mesh):
    mesh.submit("a", "b", steps=10)
    mesh.run()
    totals = mesh.scheduler.tally.totals
    items = mesh.items_of(Denoise)
    assert sum(totals.step_seconds.counts) == sum(item.steps for item in items)
    assert totals.step_seconds.total == pytest.approx(sum(mesh.seconds_of(item) for item in items))
    assert sum(totals.batch_sizes.counts) == len(items)
    assert totals.batch_sizes.total == sum(len(item.request_ids) for item in items)
    assert {*totals.cost_errors} == {"encode", "denoise", "first_decode", "decode"}
    assert all(spread.counts[0] == sum(spread.counts) for spread in totals.cost_errors.values()), "it knew the cost"


def test_the_books_stay_small_however_many_ask():
    tally = Tally()
    for number in range(MOST_ACCOUNTS + 500):
        tally.charge(f"account {number}", 1.0)
    tally.charge("account 0", 1.0)
    assert len(tally.rank_seconds) == MOST_ACCOUNTS + 1
    assert (tally.rank_seconds["account 0"], tally.rank_seconds[OTHER_ACCOUNTS]) == (2.0, 500.0)


# ---- the scheduler's log -----------------------------------------------------------------------------------------


def test_the_log_follows_a_request_through_its_stages_under_the_calls_id(mesh):
    mesh.submit("a", steps=2, frames=5)
    params = mesh.params["a"]
    diary = Diary()
    diary.submitted([Request("a", params, trace="req_1", traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01")])
    mesh.run()
    with structlog.testing.capture_logs() as logs:
        for _, news in mesh.news:
            diary.told(news)
        diary.told(Failed("b", "internal_error", "boom"))
    *ours, other = logs
    stages = [entry.get("stage", entry["event"]) for entry in ours]
    assert stages == ["queued", "encode", "denoise", "decode", "deliver", "completed"]
    assert {(entry["request"], entry["trace"], entry["trace_id"]) for entry in ours} == {("a", "req_1", "ab" * 16)}
    assert (other["event"], other["request"], other["log_level"]) == ("failed", "b", "warning")
    assert "trace" not in other
    with structlog.testing.capture_logs() as logs:
        diary.told(Progress("a", "queued", 0, 2, 1.0))
    assert "trace" not in logs[0], "what has ended is forgotten"
