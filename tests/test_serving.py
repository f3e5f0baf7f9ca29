"""The serving benchmark itself: it fails when two servers do not make the same frames, and says what it replayed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import bench.serving
from bench.serving import BASE, Outcome, _difference
from bench.workloads import TRACES, read_trace


def outcome(trace, brighter=0):
    frames = {a.id: np.full((a.num_frames, 2, 2, 3), 100 + brighter, np.uint8) for a in trace}
    return Outcome(dict.fromkeys(frames, 1.0), frames, 2.0)


@pytest.fixture
def run(monkeypatch):
    """A function that runs the benchmark over servers whose frames are so much brighter than the base's."""
    saved = []

    def run(brighter, requests=12):
        def replay(name, ranks, trace):
            return outcome(trace, 0 if name == BASE else brighter)

        async def through_mesh(overrides, ranks, trace):
            return outcome(trace)

        monkeypatch.setattr(bench.serving, "_replay", replay)
        monkeypatch.setattr(bench.serving, "_through_mesh", through_mesh)
        monkeypatch.setattr(bench.serving, "save", lambda name, where, figures: saved.append(figures))
        monkeypatch.setattr(sys, "argv", ["serving", "--policies", BASE, "srpt", "--requests", str(requests)])
        bench.serving.main()
        return saved[-1]

    run.saved = saved
    return run


def test_what_was_replayed_is_in_the_result(run):
    figures = run(brighter=1)
    assert figures["requests"] == {path.stem: 12 for path in TRACES}
    assert figures["largest_difference_of_outputs_in_255"] == 1
    assert figures["policies"]["srpt"]["makespan_s"]["n"] == len(TRACES)


def test_frames_that_differ_fail_the_run_after_it_was_written_down(run):
    with pytest.raises(SystemExit) as failed:
        run(brighter=2)
    assert failed.value.code
    assert "2/255" in str(failed.value.code)
    assert run.saved[-1]["largest_difference_of_outputs_in_255"] == 2


def test_frames_that_are_missing_or_of_another_size_differ_most():
    trace = read_trace(TRACES[0])[:2]
    one, other = outcome(trace), outcome(trace)
    assert _difference(one, other) == 0
    other.frames[trace[1].id] = other.frames[trace[1].id][:, :1]
    assert _difference(one, other) == 255
    del other.frames[trace[1].id]
    assert _difference(one, other) == 255
