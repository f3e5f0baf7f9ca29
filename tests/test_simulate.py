"""The simulator: the same twice, right where queueing theory has the answer, and no rank idle beside waiting work."""

from __future__ import annotations

import io
import json
import sys

import msgspec
import pytest

from bench.simulate import (
    HOME,
    Costs,
    ItemDone,
    RecordingScheduler,
    Row,
    Setup,
    Simulation,
    Submitted,
    Unit,
    average,
    learn,
    main,
    measured_units,
    measured_weather,
    quantile,
    resolved,
    simulate,
    unit_key,
)
from bench.workloads import (
    LONG,
    SHORT,
    TRACES,
    WORKLOADS,
    Shape,
    Workload,
    at_rate,
    bursty,
    encode_trace,
    poisson,
    read_trace,
    write_trace,
)
from runtime.cost import Constants, Line

LINES = {"encode": Line(0.0, 0.004), "denoise": Line(0.008, 2e-12), "decode": Line(0.002, 2.5e-6)}
COSTS = Costs(note="made up for tests", learnt=Constants(LINES), gap_s=0.001)
SETUP = Setup(costs=COSTS)
STILL = Workload("stills", (Shape(1.0, 1, 64, 64, 4),))
MIX = WORKLOADS["mix"]


def latencies(outcome):
    return [(ended.arrival.id, ended.seconds, ended.completed) for ended in outcome.ended]


def mean(outcome):
    return sum(ended.seconds for ended in outcome.ended) / len(outcome.ended)


def alone(workload, setup=SETUP, policy="whole-request"):
    return simulate(workload.trace(1.0, 1, 1), policy, setup).ended[0].seconds


def test_a_trace_is_the_same_for_a_seed_and_survives_its_file(tmp_path):
    trace = MIX.trace(2.0, 7, 50, keys=3)
    assert trace == MIX.trace(2.0, 7, 50, keys=3) != MIX.trace(2.0, 8, 50, keys=3)
    write_trace(trace, tmp_path / "trace.jsonl")
    assert read_trace(tmp_path / "trace.jsonl") == trace
    assert len(encode_trace(trace).splitlines()) == 50
    assert {arrival.key for arrival in trace} == {"k0", "k1", "k2"}


def test_the_files_that_serving_is_measured_with_are_those_of_the_command():
    for seed, path in enumerate(TRACES):
        assert path.read_bytes() == encode_trace(MIX.trace(1.0, seed, 300))


def test_another_rate_changes_the_gaps_and_nothing_else():
    trace = read_trace(TRACES[0])
    quick = at_rate(trace, 8.0)
    assert len(quick) / quick[-1].arrival_s == pytest.approx(8.0)
    stretch = trace[-1].arrival_s / quick[-1].arrival_s
    assert [a.arrival_s * stretch for a in quick] == pytest.approx([a.arrival_s for a in trace])
    assert [msgspec.structs.replace(a, arrival_s=0.0) for a in quick] == [
        msgspec.structs.replace(a, arrival_s=0.0) for a in trace
    ]


@pytest.mark.parametrize("clock", [poisson, bursty])
def test_the_mean_rate_is_the_one_asked_for(clock):
    trace = Workload("long", (SHORT, LONG), clock).trace(5.0, 1, 20_000)
    assert len(trace) / trace[-1].arrival_s == pytest.approx(5.0, rel=0.1)


def test_bursts_vary_more_than_poisson():
    def spread(clock):
        trace = Workload("bursts", (SHORT,), clock).trace(1.0, 1, 5000)
        counts = [0] * (int(trace[-1].arrival_s / 20) + 1)
        for arrival in trace:
            counts[int(arrival.arrival_s / 20)] += 1
        middle = sum(counts) / len(counts)
        return sum((count - middle) ** 2 for count in counts) / len(counts) / middle

    assert spread(poisson) == pytest.approx(1.0, abs=0.3)
    assert spread(bursty) > 3


@pytest.mark.parametrize("policy", ["whole-request", "static-batch", "fifo", "srpt", "deadline"])
def test_the_same_seed_gives_the_same_outcome_and_everything_ends(policy):
    setup = Setup(costs=COSTS, cv=0.2, replicas=2)
    trace = MIX.trace(20.0, 3, 80)
    first, second, other = (simulate(trace, policy, setup, seed) for seed in (1, 1, 2))
    assert latencies(first) == latencies(second) != latencies(other)
    assert sorted(ended.arrival.id for ended in first.ended) == [arrival.id for arrival in trace]
    assert all(ended.completed for ended in first.ended)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_whole_requests_wait_as_in_an_m_d_1_queue(load):
    """Pollaczek-Khinchine: with a constant service S the mean latency is S + load * S / (2 (1 - load))."""
    service = alone(STILL)
    expected = service + load * service / (2 * (1 - load))
    runs = [simulate(STILL.trace(load / service, seed, 3000), "whole-request", SETUP) for seed in (1, 2)]
    assert sum(mean(run) for run in runs) / 2 == pytest.approx(expected, rel=0.1)


def test_alone_a_request_takes_its_items_and_their_gaps():
    key = unit_key("decode", resolved(STILL.trace(1.0, 1, 1)[0]), 2, 1, True)
    costs = Costs(note="", learnt=Constants(LINES), units={"encode": Unit(0.5), key: Unit(0.25)}, gap_s=0.1)
    outcome = simulate(STILL.trace(1.0, 1, 1), "fifo", Setup(costs=costs))
    assert outcome.items == 3
    assert outcome.ended[0].seconds == pytest.approx(outcome.busy_rank_s / 2 + 0.25 / 2 + 3 * 0.1)


@pytest.mark.parametrize("policy", ["fifo", "srpt", "static-batch"])
def test_the_mesh_never_stands_still_while_work_waits(policy):
    """Single ranks may: those that are due for an item on all of them."""
    trace = MIX.trace(1000.0, 5, 60)
    outcome = simulate(trace, policy, SETUP)
    assert outcome.stalled_s == 0
    assert outcome.busy_rank_s <= 2 * outcome.makespan_s


def test_every_step_and_chunk_is_paid_once():
    """Without batching the ranks' seconds do not depend on the order."""
    trace = MIX.trace(30.0, 5, 40)
    plain = Setup(costs=Costs(note="", learnt=Constants({**LINES, "denoise": Line(0.0, 2e-12)}), gap_s=0.0))
    totals = [simulate(trace, policy, plain).busy_rank_s for policy in ("whole-request", "srpt", "fifo")]
    assert totals == pytest.approx([totals[0]] * 3)


def test_steps_beat_whole_requests_on_a_mix():
    rate = 0.8 / (SHORT.weight * alone(Workload("s", (SHORT,))) + LONG.weight * alone(Workload("l", (LONG,))))
    trace = MIX.trace(rate, 4, 200)
    whole, srpt = (simulate(trace, policy, SETUP) for policy in ("whole-request", "srpt"))
    assert mean(srpt) < 0.7 * mean(whole)


def test_pre_emptions_are_counted_where_a_shorter_request_goes_first():
    """One long video and a still that comes in its middle: put off once; in order, never."""
    (video,) = Workload("l", (LONG,)).trace(1.0, 1, 1)
    (still,) = Workload("s", (SHORT,)).trace(1.0, 1, 1)
    middle = alone(Workload("l", (LONG,))) / 2
    trace = [
        msgspec.structs.replace(video, id="video", arrival_s=0.0),
        msgspec.structs.replace(still, id="still", arrival_s=middle),
    ]
    counts = {policy: simulate(trace, policy, SETUP).preemptions for policy in ("srpt", "fifo", "whole-request")}
    assert counts == {"srpt": 1, "fifo": 0, "whole-request": 0}
    stills = [msgspec.structs.replace(still, id=f"s{n}", arrival_s=n * middle / 2) for n in (1, 2, 3)]
    assert simulate([trace[0], *stills], "srpt", SETUP).preemptions == 3


def test_a_timeout_ends_what_is_late():
    trace = MIX.trace(1000.0, 5, 60)
    for policy in ("srpt", "deadline", "static-batch"):
        outcome = simulate(trace, policy, Setup(costs=COSTS, timeout_scale=3.0))
        late = [ended for ended in outcome.ended if not ended.completed]
        assert len(outcome.ended) == 60
        assert 0 < len(late) < 60


def test_overheads_are_charged_per_item():
    trace = STILL.trace(0.01, 1, 1)
    slow, quick = (simulate(trace, "fifo", Setup(costs=COSTS, decision_s=seconds)) for seconds in (0.01, 0.0))
    assert slow.ended[0].seconds - quick.ended[0].seconds == pytest.approx(0.01 * quick.items)


def test_4096_ranks_in_64_replicas():
    setup = Setup(costs=COSTS, ranks=4096, replicas=64)
    outcome = simulate(MIX.trace(400.0, 1, 300), "srpt", setup)
    assert all(ended.completed for ended in outcome.ended)
    assert outcome.ranks == 4096
    with pytest.raises(ValueError, match="do not divide"):
        Setup(costs=COSTS, ranks=10, replicas=4)


def test_figures():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 1.0], 0.9) == pytest.approx(0.9)
    merged = average([{"mean_s": 1.0, "slo": 0.5}, {"mean_s": 3.0, "slo": 0.5}])
    assert merged["mean_s"] == 2.0
    assert merged["slo_95"] == 0.0


def test_a_plot_without_matplotlib_is_refused_before_the_study(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("bench.simulate._study", lambda args: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        main(["--workload", "mix", "--plot", "x.png"])
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


def test_a_replay_is_kept_under_a_name_only(tmp_path, monkeypatch, capsys):
    trace, kept = tmp_path / "trace.jsonl", tmp_path / "simulate_mine.json"
    write_trace(MIX.trace(2.0, 1, 3), trace)
    monkeypatch.setattr("bench.report.RESULTS", tmp_path)
    words = ["--trace", str(trace), "--constants", str(HOME / MIX.constants), "--policies", "fifo", "--seeds", "1"]
    main(words)
    assert json.loads(capsys.readouterr().out)["rows"][0]["policy"] == "fifo"
    assert list(tmp_path.iterdir()) == [trace]
    main([*words, "--name", "mine"])
    assert json.loads(kept.read_text())["trace"] == "trace.jsonl"


def test_what_a_recorded_run_teaches_replays_it():
    """Calibration is a fixed point: a simulated mesh stands for the real one, slow in its second half."""
    sink = RecordingScheduler.sink = io.BytesIO()
    slow = Setup(costs=COSTS, weather=(1.0, 1.0, 1.5, 1.5))
    trace = MIX.trace(4.0, 2, 40)
    real = Simulation(trace, RecordingScheduler, slow).run()
    rows = [msgspec.json.decode(line, type=Row) for line in sink.getvalue().splitlines()]
    items = [row for row in rows if isinstance(row, ItemDone)]
    params = {arrival.id: resolved(arrival) for arrival in trace}
    units = measured_units(items, params)
    costs = msgspec.structs.replace(COSTS, units=units, start=COSTS.learnt)
    weather = measured_weather(items, params, units, 0.0)
    replay = Simulation(trace, RecordingScheduler, Setup(costs=costs, cv=0.0, weather=weather, as_measured=True)).run()
    assert len(items) == real.items
    assert [row.id for row in rows if isinstance(row, Submitted)] == [arrival.id for arrival in trace]
    assert mean(replay) == pytest.approx(mean(real), rel=0.05)
    assert replay.busy_rank_s == pytest.approx(real.busy_rank_s, rel=0.05)
    assert learn(items, params, slow, COSTS.learnt).measured["encode"] == pytest.approx(0.004, rel=0.5)
