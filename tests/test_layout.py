"""derive_layout: every degree that may be left out, and every equation that may not hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from runtime.config import Config, describe_mesh
from runtime.errors import InvalidInput
from runtime.layout import Layout, derive_layout, describe_layout, layout_for, layouts_of, share_sizes


@dataclass(frozen=True)
class Model:
    """All that layouts ask of a card."""

    heads: int


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


@pytest.mark.parametrize(
    ("ranks", "heads", "degrees", "expected"),
    [
        (8, 40, {}, Layout(1, 1, 8)),
        (8, 12, {}, Layout(1, 2, 4)),
        (8, 12, {"cfg_degree": 2}, Layout(2, 1, 4)),
        (6, 4, {}, Layout(1, 3, 2)),
        (4, 3, {}, Layout(1, 4, 1)),
        (6, 3, {"sp_degree": 6}, Layout(1, 2, 3)),
        (8, 12, {"ulysses_degree": 8}, Layout(1, 1, 8)),
        (8, 12, {"ring_degree": 1}, Layout(1, 1, 8)),
    ],
)
def test_the_heads_decide_what_is_left_open_and_only_that(ranks, heads, degrees, expected):
    assert derive_layout(ranks, heads=heads, **degrees) == expected


@pytest.mark.parametrize(
    ("layout", "branches", "heads", "expected"),
    [
        (Layout(2, 1, 2), 2, 4, Layout(2, 1, 2)),
        (Layout(2, 1, 2), 3, 4, Layout(2, 1, 2)),
        (Layout(2, 1, 2), 1, 4, Layout(1, 1, 4)),
        (Layout(2, 1, 2), 1, 6, Layout(1, 2, 2)),
        (Layout(2, 2, 2), 1, 40, Layout(1, 2, 4)),
        (Layout(2, 1, 1), 1, 3, Layout(1, 2, 1)),
        (Layout(4, 1, 1), 2, 4, Layout(2, 1, 2)),
        (Layout(3, 1, 1), 2, 4, Layout(1, 3, 1)),
        (Layout(2, 1, 3), 2, 4, Layout(2, 1, 3)),
        (Layout(1, 2, 2), 1, 3, Layout(1, 2, 2)),
    ],
)
def test_groups_without_a_branch_do_sequence_parallelism(layout, branches, heads, expected):
    found = layout_for(layout, branches, Model(heads))
    assert found == expected
    assert found.num_ranks == layout.num_ranks
    assert layout_for(found, branches, Model(heads)) == found
    assert layouts_of(layout, Model(heads))[0] == layout
    assert found in layouts_of(layout, Model(heads)) or branches > layout.cfg


def test_a_layout_is_written_as_its_equation():
    assert str(Layout(2, 3, 4)) == "cfg(2) * ring(3) * ulysses(4) = 24 ranks"
    assert str(Layout()) == "cfg(1) * ring(1) * ulysses(1) = 1 rank"


@pytest.mark.parametrize("layout", [Layout(2, 3, 4), Layout(1, 4, 2), Layout(3, 1, 1), Layout(2, 2, 2)])
def test_groups_cut_the_mesh(layout):
    sizes = {"cfg": layout.cfg, "ring": layout.ring, "ulysses": layout.ulysses, "sp": layout.sp}
    for axis, size in {**sizes, "replica": layout.num_ranks}.items():
        groups = {layout.group(axis, rank) for rank in range(layout.num_ranks)}
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.num_ranks))
        assert all(layout.group(axis, rank) == group for group in groups for rank in group)


def test_the_last_dimension_varies_fastest():
    layout = Layout(2, 2, 2)
    assert [layout.coordinates(rank) for rank in (0, 1, 2, 4, 7)] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 1),
    ]
    assert (layout.group("ulysses", 5), layout.group("ring", 5), layout.group("cfg", 5)) == ((4, 5), (5, 7), (1, 5))
    assert layout.group("sp", 5) == (4, 5, 6, 7)


@pytest.mark.parametrize(("total", "size"), [(0, 3), (1, 4), (27, 4), (64, 8), (67, 5)])
def test_shares_are_even_to_one_and_lose_nothing(total, size):
    sizes = share_sizes(total, size)
    assert (len(sizes), sum(sizes)) == (size, total)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({}, "weights on a rank: all of them; text encoders: every rank alone; decodes: one rank each"),
        (
            {"use_fsdp_inference": True, "tp_size": 2, "vae_sp": True},
            "weights on a rank: 1/2 of denoiser and text encoders; text encoders: heads and hidden units split over 2 "
            "ranks; decodes: a strip of rows of every frame on each rank",
        ),
    ],
)
def test_the_start_says_how_all_else_is_shared(settings, shared):
    config = Config(num_gpus=2, ulysses_degree=2, **settings)
    *layout, last = describe_mesh(config, Model(4))
    assert tuple(layout) == describe_layout(config.layout, Model(4))
    assert last == f"  {shared}"


def test_the_printed_layout_says_what_each_rank_holds():
    lines = describe_layout(Layout(2, 2, 2), Model(5))
    assert lines[0] == "layout cfg(2) * ring(2) * ulysses(2) = 8 ranks"
    assert lines[8] == (
        "  rank 7: guidance group 2 of 2, tokens 4/4, attention heads 3-4 of 5, keys and values go on to rank 5"
    )
    assert lines[9:] == ("  with fewer guidance branches: cfg(1) * ring(4) * ulysses(2) = 8 ranks",)
    *most, rest = describe_layout(Layout(1, 50_000, 1), Model(5))
    assert len(most) == 65, "a line per rank is for people"
    assert rest == "  ranks 64 to 49999: likewise"
    assert describe_layout(Layout(), Model(4)) == (f"layout {Layout()}", "  rank 0: all tokens")
