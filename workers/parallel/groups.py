"""Process groups of the mesh, made at start-up in one global order on every rank."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from runtime.config import Backend
from runtime.layout import Axis, Layout
from workers.parallel.comm import ALONE, Group


@dataclass(frozen=True)
class Groups:
    """This rank's groups in one layout; see `runtime.layout.VARYING`."""

    cfg: Group = ALONE
    ring: Group = ALONE
    ulysses: Group = ALONE
    sp: Group = ALONE
    """ring and ulysses together; token shares are in its order."""
    replica: Group = ALONE
    """Every rank."""


SOLO = Groups()
AXES: tuple[Axis, ...] = ("cfg", "ring", "ulysses", "sp", "replica")


_timeout: datetime.timedelta | None = None
"""Of this process's collectives; None before `init_distributed`."""


def init_distributed(backend: Backend, timeout_s: int, generation: int) -> None:
    """Join the process group that torchrun's environment describes.

    torchrun keeps one store over all restarts of the group; without a prefix of its own a restarted rank would read
    the addresses of dead ones.
    """
    global _timeout  # noqa: PLW0603  The groups that it is for are global as well.
    _timeout = datetime.timedelta(seconds=timeout_s)
    store, rank, num_ranks = next(rendezvous("env://", timeout=_timeout))
    dist.init_process_group(
        "nccl" if backend == "nccl" else "gloo",
        store=PrefixStore(f"generation{generation}", store),
        rank=rank,
        world_size=num_ranks,
        timeout=_timeout,
    )


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group whose collectives have the timeout of the process's: torch gives a new one its own default.

    Every rank has to call it, members or not, in the same order as for other groups.
    """
    made: dist.ProcessGroup = dist.new_group(list(ranks), timeout=_timeout)
    return made


def make_groups(layouts: Sequence[Layout], rank: int, backend: Backend) -> dict[Layout, Groups]:
    """The groups of every layout; those with the same ranks are one, communicators and all.

    Every rank makes every group, also those that it is no member of: torch.distributed requires it.
    """
    made: dict[tuple[int, ...], Group] = {}
    for layout in layouts:
        for axis in AXES:
            for ranks in dict.fromkeys(layout.group(axis, member) for member in range(layout.num_ranks)):
                if len(ranks) > 1 and ranks not in made:
                    process_group = new_group(ranks)
                    mine = ranks.index(rank) if rank in ranks else -1
                    made[ranks] = Group(len(ranks), mine, process_group, backend == "staged")
    return {layout: Groups(**{axis: made.get(layout.group(axis, rank), ALONE) for axis in AXES}) for layout in layouts}


def warm_up(groups: dict[Layout, Groups], device: torch.device) -> None:
    """Bring every communicator to life before the first request; all ranks must call it."""
    seen: set[int] = set()
    for of_layout in groups.values():
        for axis in AXES:
            group: Group = getattr(of_layout, axis)
            if id(group) not in seen:
                seen.add(id(group))
                group.warm_up(device)
