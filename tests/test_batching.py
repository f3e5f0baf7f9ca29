"""How many share a forward: the cost model's budget, the operator's rules and the refusals of a wrong file."""

from __future__ import annotations

import json

import msgspec
import pytest
from simulation import CARD, KnownCost

from runtime.batching import MARGINAL_GAIN, BatchLimits, batch_budget
from runtime.batchrules import GIB, BatchRule, read_batch_rules
from runtime.cost import Constants, CostModel, Line
from runtime.errors import InvalidInput
from runtime.layout import Layout
from runtime.sampling import SamplingParams

LAYOUT = Layout(1, 1, 2)


def params(side=64, frames=9):
    return CARD.check(SamplingParams(prompt="a cat", seed=1, height=side, width=side, num_frames=frames))


def fitted(fixed, slope):
    """A cost model with this line for denoising."""
    return CostModel(CARD, Constants({"denoise": Line(fixed, slope)}))


def test_a_batch_grows_as_long_as_each_member_makes_the_others_cheaper():
    work = CARD.step_flops(params()) / LAYOUT.num_ranks
    cost = fitted(0.010, 0.010 / work)
    budget = batch_budget(cost, BatchLimits(16), params(), LAYOUT)
    share = [cost.fitted("denoise", params(), LAYOUT, n) / n for n in range(1, 17)]
    assert 1 < budget < 16
    assert all(share[n] <= share[n - 1] * (1 - MARGINAL_GAIN) for n in range(1, budget))
    assert share[budget] > share[budget - 1] * (1 - MARGINAL_GAIN)


def test_large_shapes_run_alone_and_small_ones_together():
    work = CARD.step_flops(params()) / LAYOUT.num_ranks
    cost = fitted(0.010, 0.010 / work)
    assert batch_budget(cost, BatchLimits(16), params(1024, 81), LAYOUT) == 1
    assert batch_budget(cost, BatchLimits(16), params(), LAYOUT) > 4


@pytest.mark.parametrize(("fixed", "slope", "expected"), [(0.0, 1e-12, 1), (0.01, 0.0, 7)])
def test_no_fixed_part_is_no_batch_and_nothing_else_is_the_most(fixed, slope, expected):
    assert batch_budget(fitted(fixed, slope), BatchLimits(7), params(), LAYOUT) == expected


def test_a_noisy_measurement_of_one_size_does_not_end_the_search():
    cost = fitted(0.01, 0.0)
    expected = batch_budget(cost, BatchLimits(16), params(), LAYOUT)
    key = cost._key("denoise", params(), LAYOUT, 2)
    cost.constants.measured[key] = 100.0
    assert batch_budget(cost, BatchLimits(16), params(), LAYOUT) == expected == 16


@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_operators_limit_holds(most):
    assert batch_budget(KnownCost(growth=0.0), BatchLimits(most), params(), LAYOUT) == most


def test_a_deterministic_request_shares_with_nobody():
    """Not as the first of a batch, by its limit, and not as a later member, by its key."""
    alone = msgspec.structs.replace(params(), deterministic=True)
    assert batch_budget(KnownCost(growth=0.0), BatchLimits(7), alone, LAYOUT) == 1
    assert batch_budget(KnownCost(growth=0.0), BatchLimits(7), params(), LAYOUT) == 7
    assert CARD.batch_key(alone, 0) != CARD.batch_key(params(), 0)


# ---- rules -------------------------------------------------------------------------------------------------------


def test_every_rule_that_matches_bounds_the_batch():
    rules = (
        BatchRule(max_batch_size=99),
        BatchRule(max_batch_size=5, resolution="64x64"),
        BatchRule(max_batch_size=3, resolution="64x64", model_contains="WAN"),
        BatchRule(max_batch_size=2, resolution="64x64", model="other"),
        BatchRule(max_batch_size=4, resolution="*"),
    )
    for in_order in (rules, rules[::-1]):
        limits = BatchLimits(8, in_order, ("some/folder", "my-wan-2.1"))
        assert limits.of(params(64)) == 3
        assert limits.of(params(128)) == 4
        assert BatchLimits(8, in_order, ("some/folder", "other")).of(params(64)) == 2
        assert BatchLimits(8, in_order, ("flux",)).of(params(64)) == 4
    assert BatchLimits(8, rules[:2]).of(params(64)) == 5
    limits = BatchLimits(8, rules, ("my-wan-2.1",))
    assert BatchLimits(8).of(params(64)) == 8
    assert batch_budget(KnownCost(growth=0.0), limits, params(64), LAYOUT) == 3


@pytest.mark.parametrize(
    ("gib", "small", "large", "middle"),
    [(10, 1, 16, 16), (24, 1, 16, 4), (30, 16, 16, 4), (80, 16, 8, 4), (81, 16, 8, 16)],
)
def test_a_rule_is_for_devices_of_some_memory(gib, small, large, middle):
    rules = {
        "small": BatchRule(max_batch_size=1, device_memory_gb_max=24),
        "large": BatchRule(max_batch_size=8, device_memory_gb_min=80),
        "middle": BatchRule(max_batch_size=4, device_memory_gb_min=24, device_memory_gb_max=80),
    }
    limits = {name: BatchLimits(16, (rule,), device_memory=gib * GIB) for name, rule in rules.items()}
    assert [limits[name].of(params()) for name in ("small", "large", "middle")] == [small, large, middle]


def test_before_the_ranks_have_told_their_memory_every_such_rule_holds():
    rules = (BatchRule(max_batch_size=2, device_memory_gb_min=80), BatchRule(max_batch_size=3, device_memory_gb_max=8))
    limits = BatchLimits(16, rules)
    assert limits.of(params()) == 2
    limits.device_memory = 40 * GIB
    assert limits.of(params()) == 16


def test_a_rule_names_width_before_height():
    wide = CARD.check(SamplingParams(prompt="a cat", height=64, width=128))
    assert BatchRule(max_batch_size=1, resolution="128x64").matches(("m",), wide)
    assert not BatchRule(max_batch_size=1, resolution="64x128").matches(("m",), wide)


RULES = [{"max_batch_size": 4, "resolution": "832x480"}, {"max_batch_size": 8, "model_contains": "wan"}]
READ = (BatchRule(max_batch_size=4, resolution="832x480"), BatchRule(max_batch_size=8, model_contains="wan"))


def test_a_file_of_the_reference_product_is_read(tmp_path):
    """As its documentation has it; what is for people changes nothing."""
    path = tmp_path / "rules.json"
    rule = {"model_contains": "Qwen-Image", "resolution": "512x512", "device_memory_gb_min": 120, "offload": False}
    notes = {"device_memory_gb_max": 160.5, "max_batch_size": 8, "calibration": {"hardware": "H200", "runs": [1, 2]}}
    path.write_text(json.dumps({"schema_version": 1, "rules": [rule | notes]}))
    (read,) = read_batch_rules(path)
    assert (read.device_memory_gb_min, read.device_memory_gb_max, read.max_batch_size) == (120, 160.5, 8)


@pytest.mark.parametrize("content", [RULES, {"rules": RULES}])
def test_rules_are_read_from_json(tmp_path, content):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(content))
    assert read_batch_rules(path) == READ


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_rules_are_read_from_yaml(tmp_path, suffix):
    path = tmp_path / f"rules.{suffix}"
    path.write_text(
        "rules:\n  - {max_batch_size: 4, resolution: 832x480}\n  - max_batch_size: 8\n    model_contains: wan\n"
    )
    assert read_batch_rules(path) == READ


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[", "cannot be read"),
        ("a.yaml", "rules: [", "cannot be read"),
        ("a.json", "3", "no list of rules"),
        ("a.json", '{"rule": []}', "no list of rules"),
        ("a.yaml", "", "no list of rules"),
        ("a.json", '[{"max_batch_size": 1}, 7]', "rule 2 of"),
        ("a.json", '[{"max_batchsize": 1}]', "unknown key max_batchsize; did you mean max_batch_size?"),
        ("a.json", '[{"max_batch_size": 1, "zzz": 1}]', "unknown key zzz; there are max_batch_size, model"),
        ("a.yaml", "[{1: 2}]", "unknown key 1"),
        ("a.json", '[{"max_batch_size": 1, "device_memory_gb_min": -1}]', "device_memory_gb_min"),
        ("a.json", '[{"max_batch_size": 1, "device_memory_gb_min": "80"}]', "device_memory_gb_min"),
        (
            "a.json",
            '[{"max_batch_size": 1, "device_memory_gb_min": 80, "device_memory_gb_max": 24}]',
            "device_memory_gb_min(80) > device_memory_gb_max(24)",
        ),
        ("a.yaml", "[{max_batch_size: 1, device_memory_gb_max: .nan}]", "device_memory_gb_max"),
        ("a.json", '[{"max_batch_size": 1, "offload": true}]', "no weights are offloaded here"),
        (
            "a.json",
            '[{"max_batch_size": 1, "max_cost": 1000}]',
            "max_cost, which does nothing here: a batch is bounded",
        ),
        ("a.json", '{"schema_version": 2, "rules": []}', "schema_version 2; only 1 is known"),
        ("a.json", "[{}]", "missing required field `max_batch_size`"),
        ("a.json", '[{"max_batch_size": "many"}]', "Expected `int`, got `str`"),
        ("a.json", '[{"max_batch_size": 0}]', "max_batch_size is 0; take 1 or more"),
        ("a.json", '[{"max_batch_size": 1, "resolution": "480p"}]', "resolution is 480p; write it as 832x480"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        read_batch_rules(path)
    assert refused.value.field == "batching_config"
    assert said in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path, content):
    path = tmp_path / "rules.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_batch_rules(path)
