"""CFG parallelism: the guidance branches of a step on separate groups of ranks.

    group g of m runs branches g, g + m, …  (B, …) each  --all-gather over the groups-->  every branch on every rank

The family then combines them by its own sequential formula, so that the result is that of one branch after another,
to the bit; a weighted all-reduce would round differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from workers.parallel.comm import Group


def branches_of(branches: Sequence[str], group: Group, rank: int | None = None) -> tuple[str, ...]:
    """What this guidance group, or the one of `rank`, evaluates."""
    return tuple(branches[group.rank if rank is None else rank :: group.size])


def gather_branches(mine: Mapping[str, torch.Tensor], branches: Sequence[str], group: Group) -> dict[str, torch.Tensor]:
    """This group's predictions, (B, …) each -> those of all branches; at least one branch per group."""
    if group.size == 1:
        return dict(mine)
    spread = [branches_of(branches, group, rank) for rank in range(group.size)]
    rows = next(iter(mine.values())).shape[0]
    stacked = torch.cat([mine[branch] for branch in spread[group.rank]])
    whole = group.all_gather(stacked, 0, [rows * len(names) for names in spread])
    names = [branch for names in spread for branch in names]
    found = dict(zip(names, whole.split(rows), strict=True))
    return {branch: found[branch] for branch in branches}
