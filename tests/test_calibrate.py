"""The warm-up that measures: what it tells the cost model, by a clock that only the model's own work advances."""

from __future__ import annotations

import pytest
from single_rank import ALONE, SingleRank
from tiny_wan import DEMO

import workers.calibrate
from runtime.cost import CostModel
from runtime.protocol import Encode
from runtime.scheduler import Scheduler

EMBED_S = 1.0
"""What one text takes in the encoder; everything else is free."""


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    return SingleRank(DEMO, tmp_path_factory.mktemp("spool"))


@pytest.fixture
def clock(rank, monkeypatch):
    clock = Clock()
    embed = rank.family._embed

    def slow(*texts):
        clock.now += EMBED_S
        return embed(*texts)

    monkeypatch.setattr(rank.family, "_embed", slow)
    monkeypatch.setattr(workers.calibrate, "time", clock)
    return clock


def test_a_requests_encode_costs_what_it_takes_alone(rank, clock):
    """Equal texts of one item are encoded once: a batch of them tells nothing about one."""
    measured = workers.calibrate.measure(rank.executor, rank.family, rank.card, ALONE)
    request = rank.request()
    before = clock.now
    rank.executor.run(Encode(1, (0,), (request,)))
    alone = clock.now - before
    assert alone == pytest.approx(2 * EMBED_S), "a prompt and a negative one"
    assert [each.seconds for each in measured if each.kind == "encode"] == [pytest.approx(alone)]
    scheduler = Scheduler(rank.card, ALONE, CostModel(rank.card))
    scheduler.calibrate(measured)
    assert scheduler.cost.predict("encode", request.params, ALONE) == pytest.approx(alone)
    assert {each.kind for each in measured} == {"encode", "denoise", "first_decode", "decode"}
    assert {each.batch for each in measured if each.kind == "denoise"} == {1, 4}


def test_it_leaves_nothing_behind(rank, clock):
    rank.executor.states.clear()
    workers.calibrate.measure(rank.executor, rank.family, rank.card, ALONE)
    assert rank.executor.states == {}
    assert rank.frames.chunks == []
