"""How the ranks of one replica are laid out: cfg × ring × ulysses, in integers. Knows no process groups."""

from __future__ import annotations

import msgspec

from runtime.bounds import Degree
from runtime.errors import InvalidInput


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

    def __str__(self) -> str:
        return f"cfg({self.cfg}) * ring({self.ring}) * ulysses({self.ulysses}) = {self.num_ranks} ranks"


def derive_layout(
    num_ranks: int,
    *,
    sp_degree: int | None = None,
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    cfg_degree: int = 1,
) -> Layout:
    """The layout with unset degrees filled in; whatever SP is left over goes to Ulysses, then to ring.

    Raises:
        InvalidInput: a degree is not positive, or the degrees do not multiply to the ranks; states the equation.
    """
    degrees = {"sp_degree": sp_degree, "ulysses_degree": ulysses_degree, "ring_degree": ring_degree}
    for name, value in {"num_gpus": num_ranks, "enable_cfg_parallel": cfg_degree, **degrees}.items():
        if value is not None and value < 1:
            raise InvalidInput(name, f"{value} is not a degree; it must be 1 or more")
    if num_ranks % cfg_degree:
        raise InvalidInput("enable_cfg_parallel", f"cfg({cfg_degree}) does not divide {num_ranks} ranks (num_gpus)")
    sp = sp_degree if sp_degree is not None else num_ranks // cfg_degree
    ulysses, ring = _split_sp(sp, ulysses_degree, ring_degree)
    if sp_degree is not None and sp_degree != ring * ulysses:
        raise InvalidInput(
            "sp_degree", f"ring({ring}) * ulysses({ulysses}) = {ring * ulysses} != sp({sp_degree}); change one of them"
        )
    layout = Layout(cfg_degree, ring, ulysses)
    if layout.num_ranks != num_ranks:
        culprit = next((name for name, value in degrees.items() if value is not None), "num_gpus")
        raise InvalidInput(culprit, f"{layout} != {num_ranks} (num_gpus); the degrees must multiply to the ranks")
    return layout


def _split_sp(sp: int, ulysses: int | None, ring: int | None) -> tuple[int, int]:
    """(ulysses, ring) for an SP degree, either of which may be given."""
    if ulysses is None and ring is None:
        return sp, 1
    if ulysses is None:
        assert ring is not None
        return max(sp // ring, 1), ring
    return ulysses, ring if ring is not None else max(sp // ulysses, 1)
