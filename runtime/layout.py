"""How the ranks of one replica are laid out: cfg × ring × ulysses, in integers. Knows no process groups."""

from __future__ import annotations

import math
from itertools import product
from typing import Literal, Protocol

import msgspec

from runtime.bounds import Degree
from runtime.errors import InvalidInput

Axis = Literal["cfg", "ring", "ulysses", "sp", "replica"]
"""Mesh axes; "sp" is ring and ulysses together, "replica" all three."""

VARYING: dict[Axis, tuple[bool, bool, bool]] = {
    "cfg": (True, False, False),
    "ring": (False, True, False),
    "ulysses": (False, False, True),
    "sp": (False, True, True),
    "replica": (True, True, True),
}
"""Axis -> which of the coordinates (cfg, ring, ulysses) differ among the ranks of one of its groups."""


class Heads(Protocol):
    """What of a family's card decides over layouts."""

    @property
    def heads(self) -> int:
        """Attention heads of the denoiser."""
        ...


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """A mesh of ``cfg × ring × ulysses`` ranks; the last dimension varies fastest.

    With cfg=2, ring=1, ulysses=2: ranks 0, 1 hold the first guidance branch, 2, 3 the second, and the
    Ulysses groups are {0, 1} and {2, 3}.
    """

    cfg: Degree = 1
    ring: Degree = 1
    ulysses: Degree = 1

    @property
    def sp(self) -> int:
        """Sequence-parallel degree: tokens of one forward are split over this many ranks."""
        return self.ring * self.ulysses

    @property
    def num_ranks(self) -> int:
        return self.cfg * self.sp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(cfg, ring, ulysses) index of a rank."""
        return rank // self.sp, rank // self.ulysses % self.ring, rank % self.ulysses

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks, in order, that `rank` shares its group along an axis with; itself among them."""
        strides, degrees = (self.sp, self.ulysses, 1), (self.cfg, self.ring, self.ulysses)
        along = zip(self.coordinates(rank), VARYING[axis], degrees, strict=True)
        places = product(*(range(degree) if varies else (mine,) for mine, varies, degree in along))
        return tuple(sum(at * stride for at, stride in zip(place, strides, strict=True)) for place in places)

    def __str__(self) -> str:
        return f"cfg({self.cfg}) * ring({self.ring}) * ulysses({self.ulysses}) = {_ranks(self.num_ranks)}"


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def derive_layout(
    num_ranks: int,
    *,
    sp_degree: int | None = None,
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    cfg_degree: int = 1,
    cfg_setting: str = "enable_cfg_parallel",
    heads: int | None = None,
) -> Layout:
    """The layout with unset degrees filled in; whatever SP is left over goes to Ulysses, then to ring.

    With `heads` of the model, Ulysses gets the largest degree that divides them, and ring the rest. `cfg_setting` is
    the name that a refusal of the guidance groups bears.

    Raises:
        InvalidInput: a degree is not positive, or the degrees do not multiply to the ranks; states the equation.
    """
    degrees = {"sp_degree": sp_degree, "ulysses_degree": ulysses_degree, "ring_degree": ring_degree}
    for name, value in {"num_gpus": num_ranks, cfg_setting: cfg_degree, **degrees}.items():
        if value is not None and value < 1:
            raise InvalidInput(name, f"{value} is not a degree; it must be 1 or more")
    if num_ranks % cfg_degree:
        raise InvalidInput(cfg_setting, f"cfg({cfg_degree}) does not divide {_ranks(num_ranks)} (num_gpus)")
    sp = sp_degree if sp_degree is not None else num_ranks // cfg_degree
    ulysses, ring = _split_sp(sp, ulysses_degree, ring_degree, heads)
    if sp_degree is not None and sp_degree != ring * ulysses:
        raise InvalidInput(
            "sp_degree", f"ring({ring}) * ulysses({ulysses}) = {ring * ulysses} != sp({sp_degree}); change one of them"
        )
    layout = Layout(cfg_degree, ring, ulysses)
    if layout.num_ranks != num_ranks:
        culprit = next((name for name, value in degrees.items() if value is not None), "num_gpus")
        raise InvalidInput(culprit, f"{layout} != {num_ranks} (num_gpus); the degrees must multiply to the ranks")
    return layout


def _split_sp(sp: int, ulysses: int | None, ring: int | None, heads: int | None) -> tuple[int, int]:
    """(ulysses, ring) for an SP degree, either of which may be given."""
    if ulysses is None and ring is None:
        ulysses = sp if heads is None else math.gcd(sp, heads)
        return ulysses, sp // ulysses
    if ulysses is None:
        assert ring is not None
        return max(sp // ring, 1), ring
    return ulysses, ring if ring is not None else max(sp // ulysses, 1)


def layout_for(layout: Layout, branches: int, card: Heads) -> Layout:
    """How the ranks of `layout` run a step that evaluates so many guidance branches.

    A guidance group without a branch would idle, so its ranks join sequence parallelism: Ulysses where the heads
    divide by it, ring otherwise. The same ranks in every case, and `layout` itself if all its groups have a branch.
    """
    cfg = max(degree for degree in range(1, layout.cfg + 1) if layout.cfg % degree == 0 and degree <= max(branches, 1))
    spare = layout.cfg // cfg
    if spare == 1:
        return layout
    if card.heads % (spare * layout.ulysses) == 0:
        return Layout(cfg, layout.ring, spare * layout.ulysses)
    return Layout(cfg, spare * layout.ring, layout.ulysses)


def layouts_of(layout: Layout, card: Heads) -> tuple[Layout, ...]:
    """Every layout that `layout_for` can give, `layout` first; the same order on every rank."""
    return tuple(dict.fromkeys(layout_for(layout, branches, card) for branches in range(layout.cfg, 0, -1)))


def share_sizes(total: int, size: int) -> list[int]:
    """`total` things over `size` ranks, the first ones one more: no padding at all."""
    return [total // size + (rank < total % size) for rank in range(size)]


MOST_LINES = 64
"""Ranks that are described one by one."""


def describe_layout(layout: Layout, card: Heads) -> tuple[str, ...]:
    """The equation, then a line for each of the first ranks on what it holds."""
    heads = share_sizes(card.heads, layout.ulysses)
    lines = [f"layout {layout}"]
    for rank in range(min(layout.num_ranks, MOST_LINES)):
        branch, ring, ulysses = layout.coordinates(rank)
        first = sum(heads[:ulysses])
        holds = [f"guidance group {branch + 1} of {layout.cfg}"] if layout.cfg > 1 else []
        holds += [f"tokens {ring * layout.ulysses + ulysses + 1}/{layout.sp}"] if layout.sp > 1 else ["all tokens"]
        if layout.ulysses > 1:
            holds.append(f"attention heads {first}-{first + heads[ulysses] - 1} of {card.heads}")
        if layout.ring > 1:
            around = layout.group("ring", rank)
            holds.append(f"keys and values go on to rank {around[(ring + 1) % layout.ring]}")
        lines.append(f"  rank {rank}: {', '.join(holds)}")
    if layout.num_ranks > MOST_LINES:
        lines.append(f"  ranks {MOST_LINES} to {layout.num_ranks - 1}: likewise")
    spare = layouts_of(layout, card)[1:]
    return (*lines, *(f"  with fewer guidance branches: {other}" for other in spare))
