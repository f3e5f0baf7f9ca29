"""All tensor traffic between ranks: one `Group`, two collectives. Knows no attention and no model.

Shapes are the same arithmetic on every rank and are computed before a collective is entered: a mismatch inside gloo
aborts the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Some ranks that exchange tensors; `rank` is this process's place among them."""

    size: int
    rank: int
    process_group: dist.ProcessGroup | None = None

    def all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Rows of x, cut into `send[peer]` rows for each peer -> `sum(receive)` rows, `receive[peer]` from each."""
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.process_group)
        return out

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """x with `sizes[rank]` along `dim` -> the whole tensor, `sum(sizes)` along `dim`, on every rank."""
        most = max(sizes)
        # gloo gathers equal sizes only: pad to the largest share and cut afterwards.
        mine = x.transpose(0, dim)
        if mine.shape[0] < most:
            mine = torch.cat([mine, mine.new_zeros(most - mine.shape[0], *mine.shape[1:])])
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, mine.contiguous(), group=self.process_group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.transpose(0, dim)


def share_sizes(total: int, size: int) -> list[int]:
    """`total` tokens over `size` ranks, the first ones one longer: no padding at all."""
    return [total // size + (rank < total % size) for rank in range(size)]
