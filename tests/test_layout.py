"""derive_layout: every degree that may be left out, and every equation that may not hold."""

from __future__ import annotations

import re

import pytest

from runtime.errors import InvalidInput
from runtime.layout import Layout, derive_layout


@pytest.mark.parametrize(
    ("ranks", "degrees", "expected"),
    [
        (1, {}, Layout(1, 1, 1)),
        (8, {}, Layout(1, 1, 8)),
        (6, {}, Layout(1, 1, 6)),
        (8, {"sp_degree": 8}, Layout(1, 1, 8)),
        (8, {"ulysses_degree": 8}, Layout(1, 1, 8)),
        (8, {"ulysses_degree": 4}, Layout(1, 2, 4)),
        (8, {"ulysses_degree": 1}, Layout(1, 8, 1)),
        (8, {"ring_degree": 8}, Layout(1, 8, 1)),
        (8, {"ring_degree": 2}, Layout(1, 2, 4)),
        (8, {"sp_degree": 8, "ring_degree": 2}, Layout(1, 2, 4)),
        (8, {"sp_degree": 8, "ulysses_degree": 2}, Layout(1, 4, 2)),
        (8, {"sp_degree": 8, "ulysses_degree": 2, "ring_degree": 4}, Layout(1, 4, 2)),
        (8, {"ulysses_degree": 2, "ring_degree": 4}, Layout(1, 4, 2)),
        (2, {"cfg_degree": 2}, Layout(2, 1, 1)),
        (8, {"cfg_degree": 2}, Layout(2, 1, 4)),
        (8, {"cfg_degree": 2, "ring_degree": 2}, Layout(2, 2, 2)),
        (8, {"cfg_degree": 2, "sp_degree": 4}, Layout(2, 1, 4)),
    ],
)
def test_unset_degrees_are_filled_in(ranks, degrees, expected):
    layout = derive_layout(ranks, **degrees)
    assert layout == expected
    assert layout.num_ranks == ranks
    assert layout.sp * layout.cfg == ranks


@pytest.mark.parametrize(
    ("ranks", "degrees", "field", "equation"),
    [
        (0, {}, "num_gpus", "0 is not a degree"),
        (4, {"sp_degree": 0}, "sp_degree", "0 is not a degree"),
        (4, {"ulysses_degree": -2}, "ulysses_degree", "-2 is not a degree"),
        (4, {"ring_degree": 0}, "ring_degree", "0 is not a degree"),
        (4, {"cfg_degree": 0}, "enable_cfg_parallel", "0 is not a degree"),
        (3, {"cfg_degree": 2}, "enable_cfg_parallel", "cfg(2) does not divide 3 ranks"),
        (8, {"sp_degree": 4}, "sp_degree", "cfg(1) * ring(1) * ulysses(4) = 4 ranks != 8"),
        (2, {"sp_degree": 4}, "sp_degree", "cfg(1) * ring(1) * ulysses(4) = 4 ranks != 2"),
        (8, {"cfg_degree": 2, "sp_degree": 8}, "sp_degree", "cfg(2) * ring(1) * ulysses(8) = 16 ranks != 8"),
        (8, {"ulysses_degree": 3}, "ulysses_degree", "cfg(1) * ring(2) * ulysses(3) = 6 ranks != 8"),
        (2, {"ulysses_degree": 4}, "ulysses_degree", "cfg(1) * ring(1) * ulysses(4) = 4 ranks != 2"),
        (8, {"ring_degree": 3}, "ring_degree", "cfg(1) * ring(3) * ulysses(2) = 6 ranks != 8"),
        (8, {"ulysses_degree": 2, "ring_degree": 2}, "ulysses_degree", "cfg(1) * ring(2) * ulysses(2) = 4 ranks != 8"),
        (8, {"sp_degree": 8, "ulysses_degree": 3}, "sp_degree", "ring(2) * ulysses(3) = 6 != sp(8)"),
        (8, {"sp_degree": 8, "ring_degree": 16}, "sp_degree", "ring(16) * ulysses(1) = 16 != sp(8)"),
        (8, {"sp_degree": 8, "ulysses_degree": 2, "ring_degree": 2}, "sp_degree", "ring(2) * ulysses(2) = 4 != sp(8)"),
    ],
)
def test_a_refusal_names_the_field_and_states_the_equation(ranks, degrees, field, equation):
    with pytest.raises(InvalidInput, match=re.escape(equation)) as refusal:
        derive_layout(ranks, **degrees)
    assert refusal.value.field == field
