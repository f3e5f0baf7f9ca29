"""Ulysses sequence parallelism: tokens are split over n ranks outside attention, heads inside it.

    q, k, v  (B, S/n, H, D)  --all-to-all-->  (B, S, H/n, D)  attend  (B, S, H/n, D)  --all-to-all-->  (B, S/n, H, D)

Two collectives per attention: q, k and v travel together. Neither S nor H needs to divide by n: shares are uneven,
nothing is padded. DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.parallel.comm import Group


def gather_tokens(tensors_BSHD: Sequence[torch.Tensor], sizes: Sequence[int], group: Group) -> tuple[torch.Tensor, ...]:
    """(B, S/n, H, D) each -> (B, S, H/n, D) each, in one collective; `sizes[rank]` tokens come from each rank."""
    batch, mine, num_heads, dim = tensors_BSHD[0].shape
    heads = group.share(num_heads)
    held = heads[group.rank]
    send, receive = [mine * count for count in heads], [size * held for size in sizes]
    # Rows (peer, token, head): one copy here, and what arrives is already in the order of tokens.
    rows = tensors_BSHD[0].new_empty(sum(send), len(tensors_BSHD), batch, dim)
    for place, x_BSHD in enumerate(tensors_BSHD):
        for block, part in zip(rows[:, place].split(send), x_BSHD.permute(1, 2, 0, 3).split(heads, dim=1), strict=True):
            block.unflatten(0, part.shape[:2]).copy_(part)
    received = group.all_to_all(rows, send, receive).unflatten(0, (sum(sizes), held))
    return tuple(x_SHBD.permute(2, 0, 1, 3) for x_SHBD in received.unbind(2))


def gather_heads(x_BSHD: torch.Tensor, sizes: Sequence[int], heads: Sequence[int], group: Group) -> torch.Tensor:
    """(B, S, H/n, D) -> (B, S/n, H, D); `heads[rank]` heads come from each rank."""
    mine, held = sizes[group.rank], heads[group.rank]
    send, receive = [size * held for size in sizes], [mine * count for count in heads]
    received = group.all_to_all(x_BSHD.permute(1, 2, 0, 3).flatten(0, 1), send, receive)
    parts = [part.unflatten(0, (mine, count)) for part, count in zip(received.split(receive), heads, strict=True)]
    return torch.cat(parts, dim=1).permute(2, 0, 1, 3)
