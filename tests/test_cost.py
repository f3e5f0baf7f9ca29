"""The cost model: what the fit recovers, what it never becomes, and which of its figures a prediction takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import CARD

from runtime.batching import BatchLimits, batch_budget
from runtime.cost import SMOOTHING, CostModel, Line
from runtime.layout import Layout
from runtime.predictions import Predictions
from runtime.protocol import Decode, Denoise, Encode, Measurement, Request
from runtime.sampling import SamplingParams
from runtime.scheduler import Scheduler

LAYOUT = Layout(1, 1, 2)


def params(side=64, frames=9, guidance=5.0):
    return CARD.check(
        SamplingParams(prompt="a cat", seed=1, height=side, width=side, num_frames=frames, guidance_scale=guidance)
    )


# ---- the line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fixed", "slope"), [(0.003, 2e-11), (0.5, 1e-12), (0.0, 3e-11)])
@pytest.mark.parametrize("guess", [(0.002, 5e-11), (1.0, 1e-9), (0.0, 1e-14)])
def test_the_fit_recovers_the_line_that_made_its_points(fixed, slope, guess):
    line = Line(*guess)
    for work in [1e9, 4e9, 2e9, 1e10] * 5:
        line.add(work, fixed + slope * work)
    assert line.fixed == pytest.approx(fixed, abs=1e-6)
    assert line.slope == pytest.approx(slope, rel=1e-4)
    assert line.at(3e9) == pytest.approx(fixed + 3e9 * slope, rel=1e-3)


def test_the_fit_follows_a_machine_that_changes():
    line = Line(0.01, 1e-11)
    for factor in (1.0, 3.0):
        for work in [1e9, 5e9, 1e10] * 100:
            line.add(work, factor * (0.01 + 2e-11 * work))
    assert line.at(5e9) == pytest.approx(3 * (0.01 + 0.1), rel=0.05)


def test_one_shape_alone_scales_the_first_guess():
    line, guess = Line(0.002, 5e-11), Line(0.002, 5e-11)
    for _ in range(50):
        line.add(1e9, 10 * guess.at(1e9))
    assert line.at(1e9) == pytest.approx(10 * guess.at(1e9))
    assert line.at(5e9) == pytest.approx(10 * guess.at(5e9))


@pytest.mark.parametrize("points", [[(1e9, 0.5), (2e9, 0.1)], [(1e9, 0.01), (2e9, 5.0)]])
def test_points_that_no_such_line_has_made_leave_it_non_negative(points):
    line = Line(0.002, 5e-11)
    for x, y in points * 10:
        line.add(x, y)
    assert line.fixed >= 0
    assert line.slope >= 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(1, 1e14), st.floats(1e-6, 1e3)), min_size=1, max_size=40))
def test_whatever_is_measured_every_prediction_is_positive(points):
    line = Line(0.002, 5e-11)
    for x, y in points:
        line.add(x, y)
        assert line.fixed >= 0
        assert line.slope >= 0
        assert line.at(x) > 0


# ---- the model ---------------------------------------------------------------------------------------------------


def test_every_kind_has_a_first_guess_that_grows_with_its_work():
    cost = CostModel(CARD)
    for kind in ("encode", "denoise", "decode"):
        assert cost.predict(kind, params(), LAYOUT) > 0
    for kind in ("denoise", "decode"):
        assert cost.predict(kind, params(256), LAYOUT) > cost.predict(kind, params(64), LAYOUT)
    assert cost.predict("denoise", params(), LAYOUT, 4) > cost.predict("denoise", params(), LAYOUT)
    assert cost.predict("denoise", params(), Layout(1, 1, 8)) < cost.predict("denoise", params(), LAYOUT)
    assert cost.predict("denoise", params(guidance=1.0), LAYOUT) < cost.predict("denoise", params(), LAYOUT)


def test_what_was_measured_is_preferred_and_smoothed():
    cost = CostModel(CARD)
    cost.observe("denoise", params(), LAYOUT, 5, 2.0)
    assert cost.predict("denoise", params(), LAYOUT) == pytest.approx(0.4)
    cost.observe("denoise", params(), LAYOUT, 1, 0.9)
    assert cost.predict("denoise", params(), LAYOUT) == pytest.approx(0.4 + SMOOTHING * 0.5)
    cost.observe("denoise", params(256), LAYOUT, 1, 9.0)
    assert cost.predict("denoise", params(), LAYOUT) == pytest.approx(0.5), "another shape is another figure"


def test_a_measured_step_grows_with_the_batch_as_the_line_does():
    cost = CostModel(CARD)
    cost.observe("denoise", params(), LAYOUT, 1, 0.4)
    cost.observe("denoise", params(256), LAYOUT, 1, 0.5)
    cost.observe("denoise", params(128), LAYOUT, 1, 0.1)
    growth = cost.fitted("denoise", params(), LAYOUT, 3) / cost.fitted("denoise", params(), LAYOUT, 1)
    assert cost.predict("denoise", params(), LAYOUT, 3) == pytest.approx(0.4 * growth)
    cost.observe("denoise", params(), LAYOUT, 2, 1.0, 3)
    assert cost.predict("denoise", params(), LAYOUT, 3) == pytest.approx(0.5)


def test_other_shapes_gain_from_what_was_measured():
    """Ten times slower than the guess, by two shapes: a third is predicted within a few percent."""
    cost, truth = CostModel(CARD), CostModel(CARD)
    for _ in range(20):
        for side in (64, 256):
            seconds = 10 * truth.fitted("denoise", params(side), LAYOUT, 1)
            cost.observe("denoise", params(side), LAYOUT, 1, seconds)
    third = params(128, 17)
    assert cost.predict("denoise", third, LAYOUT) == pytest.approx(
        10 * truth.fitted("denoise", third, LAYOUT, 1), rel=0.05
    )


@pytest.mark.parametrize(("units", "seconds"), [(0, 1.0), (1, 0.0), (3, -1.0)])
def test_nonsense_is_not_learnt(units, seconds):
    cost = CostModel(CARD)
    before = cost.predict("denoise", params(), LAYOUT)
    cost.observe("denoise", params(), LAYOUT, units, seconds)
    assert cost.predict("denoise", params(), LAYOUT) == before
    assert cost.error is None


def test_the_error_is_the_median_absolute_percentage_error():
    cost = CostModel(CARD)
    cost.observe("decode", params(), LAYOUT, 1, 1.0)
    assert cost.error is None, "what is only learnt from is no prediction"
    for _ in range(20):
        cost.compare("decode", params(), LAYOUT, 2, 1.6)
    assert cost.error == pytest.approx(abs(1.0 - 0.8) / 0.8)
    cost.compare("decode", params(), LAYOUT, 1, 1e-3)
    assert cost.error == pytest.approx(0.25), "one outlier moves no median"
    cost.compare("decode", params(), LAYOUT, 1, 0.0)
    assert cost.error == pytest.approx(0.25)


def test_the_error_counts_shapes_that_were_never_seen():
    predictions = Predictions(CostModel(CARD), CARD, LAYOUT)
    for side in (64, 96, 128):
        predictions.observe(denoise(), params(side), 10.0)
    assert predictions.cost.error > 0.5


def test_a_text_that_many_requests_share_is_not_learnt_from():
    predictions = Predictions(CostModel(CARD), CARD, LAYOUT)
    before = predictions.unit("encode", params())
    alike = tuple(Request(f"r{n}", params()) for n in range(9))
    predictions.observe(Encode(1, (0,), alike), params(), 3.0)
    assert predictions.unit("encode", params()) == before
    predictions.observe(Encode(2, (0,), alike[:1]), params(), 3.0)
    assert predictions.unit("encode", params()) == pytest.approx(3.0)


def test_a_new_model_shares_no_constants_with_another():
    CostModel(CARD).observe("encode", params(), LAYOUT, 1, 99.0)
    assert CostModel(CARD).predict("encode", params(), LAYOUT) < 1.0


# ---- what a unit really runs on ----------------------------------------------------------------------------------

CFG = Layout(2, 1, 1)
"""Of a mesh whose two guidance groups both denoise a request without guidance."""


def denoise(steps=1):
    return Denoise(0, (0, 1), CFG, ("a",), steps)


def decode(ranks, first_chunk=1):
    return Decode(0, ranks, "a", 1, "ipc:///x", first_chunk, 0)


def test_without_guidance_the_guidance_groups_do_sequence_parallelism_and_that_is_what_is_learnt():
    predictions = Predictions(CostModel(CARD), CARD, CFG)
    plain = params(guidance=1.0)
    assert predictions.runs_on("denoise", params()) == CFG
    assert predictions.runs_on("denoise", plain) == Layout(1, 1, 2)
    predictions.observe(denoise(4), plain, 2.0)
    assert predictions.seconds(denoise(), plain) == pytest.approx(0.5)
    assert predictions.measured(denoise(), plain)
    assert not predictions.measured(denoise(), params())
    # The same request on a mesh that is Ulysses anyway costs the same.
    assert predictions.cost.predict("denoise", plain, Layout(1, 1, 2)) == pytest.approx(0.5)


def test_guided_and_unguided_steps_do_not_spoil_each_others_line():
    """Guidance groups send next to nothing; Ulysses pays for its all-to-alls, which are most of a small step."""
    predictions, plain, guided = Predictions(CostModel(CARD), CARD, CFG), (0.08, 1e-11), (0.004, 1e-11)
    shapes = [(64, 1), (64, 9), (128, 9), (128, 17)]
    flops = {(s, f, g): CARD.step_flops(params(s, f, g)) / 2 for s, f in shapes for g in (1.0, 5.0)}
    for _ in range(10):
        for side, frames in shapes:
            for guidance, (fixed, slope) in ((1.0, plain), (5.0, guided)):
                seconds = fixed + slope * flops[side, frames, guidance]
                predictions.observe(denoise(), params(side, frames, guidance), seconds)
    predictions.cost.constants.measured.clear()
    for guidance, (fixed, slope) in ((1.0, plain), (5.0, guided)):
        work = CARD.step_flops(params(96, 9, guidance)) / 2
        assert predictions.unit("denoise", params(96, 9, guidance)) == pytest.approx(fixed + slope * work, rel=0.02)

    def budget(guidance):
        shape = params(64, 1, guidance)
        return batch_budget(predictions.cost, BatchLimits(16), shape, predictions.runs_on("denoise", shape))

    # What a batch shares is the fixed part, so the budgets differ as the lines do.
    assert budget(1.0) > budget(5.0)


def test_a_layout_that_was_not_seen_starts_from_what_another_has_learnt_and_then_learns_its_own():
    cost = CostModel(CARD)
    for side in (64, 128, 256) * 40:
        cost.observe("denoise", params(side), CFG, 1, 1.0 + CARD.step_flops(params(side)) * 1e-10)
    learnt = cost.fitted("denoise", params(128), CFG, 1)
    assert cost.fitted("denoise", params(128), Layout(1, 2, 1), 1) == pytest.approx(learnt)
    for side in (64, 128, 256):
        cost.observe("denoise", params(side), Layout(1, 2, 1), 1, 3.0 + CARD.step_flops(params(side)) * 3e-10)
    assert cost.fitted("denoise", params(128), Layout(1, 2, 1), 1) == pytest.approx(3 * learnt)
    assert cost.fitted("denoise", params(128), CFG, 1) == pytest.approx(learnt)


def test_a_decode_on_all_ranks_is_booked_apart_from_one_on_a_single_rank():
    cost = CostModel(CARD)
    one, all_ = Predictions(cost, CARD, LAYOUT), Predictions(cost, CARD, LAYOUT, decode_on_all=True)
    before = one.seconds(decode((0,)), params())
    # By the line alone a strip takes its share of the time.
    line = cost.constants.lines["decode"]
    assert all_.seconds(decode((0, 1)), params()) - line.fixed == pytest.approx((before - line.fixed) / 2)
    all_.observe(decode((0, 1)), params(), 0.3)
    assert all_.seconds(decode((0, 1)), params()) == pytest.approx(0.3)
    assert one.seconds(decode((0,)), params()) != pytest.approx(0.3)
    one.observe(decode((1,)), params(), 0.5)
    assert one.seconds(decode((0,)), params()) == pytest.approx(0.5)
    assert all_.seconds(decode((0, 1)), params()) == pytest.approx(0.3)


def test_what_the_ranks_measured_at_the_start_is_booked_where_it_ran():
    scheduler = Scheduler(CARD, CFG, CostModel(CARD), decode_on_all=True)
    plain = params(guidance=1.0)
    scheduler.calibrate((Measurement("denoise", plain, 1, 0.7), Measurement("decode", plain, 1, 0.2)))
    cost = scheduler.cost
    assert cost.measured("denoise", plain, Layout(1, 1, 2))
    assert not cost.measured("denoise", plain, CFG)
    assert cost.measured("decode", plain, CFG)
    assert not cost.measured("decode", plain, Layout())
