"""Process groups of the mesh, made at start-up in one global order on every rank."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from runtime.layout import Layout
from workers.parallel.comm import Group


@dataclass(frozen=True)
class Groups:
    """This rank's groups in one layout."""

    ulysses: Group


def init_distributed(device: torch.device, timeout_s: int, generation: int) -> None:
    """Join the process group that torchrun's environment describes: NCCL for CUDA, gloo for CPUs.

    torchrun keeps one store over all restarts of the group; without a prefix of its own a restarted rank would read
    the addresses of dead ones.
    """
    store, rank, num_ranks = next(rendezvous("env://", timeout=datetime.timedelta(seconds=timeout_s)))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"generation{generation}", store),
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def make_groups(layout: Layout, rank: int) -> Groups:
    """Every rank makes every group, also those that it is no member of: torch.distributed requires it."""
    mine: Group | None = None
    for start in range(0, layout.num_ranks, layout.ulysses):
        ranks = list(range(start, start + layout.ulysses))
        process_group = dist.new_group(ranks) if layout.ulysses > 1 else None
        if rank in ranks:
            mine = Group(layout.ulysses, rank - start, process_group)
    assert mine is not None
    return Groups(ulysses=mine)
