"""Ulysses sequence parallelism: tokens are split over n ranks outside attention, heads inside it.

    q, k, v  (B, S/n, H, D)  --all-to-all-->  (B, S, H/n, D)  attend  (B, S, H/n, D)  --all-to-all-->  (B, S/n, H, D)

Two collectives per attention: q, k and v travel together. Neither S nor H needs to divide by n: shares are uneven,
nothing is padded. DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.parallel.comm import Group


def gather_tokens(x_NBSHD: torch.Tensor, sizes: Sequence[int], group: Group) -> torch.Tensor:
    """(N, B, S/n, H, D) -> (N, B, S, H/n, D); `sizes[rank]` tokens come from each rank."""
    heads = group.share(x_NBSHD.shape[3])
    mine, held = sizes[group.rank], heads[group.rank]
    send, receive = [mine * count for count in heads], [size * held for size in sizes]
    # Rows (peer, token, head): one copy here, and what arrives is already in the order of tokens.
    x_SHNBD = x_NBSHD.permute(2, 3, 0, 1, 4)
    rows = x_NBSHD.new_empty(sum(send), *x_SHNBD.shape[2:])
    for block, part in zip(rows.split(send), x_SHNBD.split(heads, dim=1), strict=True):
        block.view_as(part).copy_(part)
    received = group.all_to_all(rows, send, receive)
    return received.unflatten(0, (sum(sizes), held)).permute(2, 3, 0, 1, 4)


def gather_heads(x_NBSHD: torch.Tensor, sizes: Sequence[int], heads: Sequence[int], group: Group) -> torch.Tensor:
    """(N, B, S, H/n, D) -> (N, B, S/n, H, D); `heads[rank]` heads come from each rank."""
    mine, held = sizes[group.rank], heads[group.rank]
    send, receive = [size * held for size in sizes], [mine * count for count in heads]
    received = group.all_to_all(x_NBSHD.permute(2, 3, 0, 1, 4).flatten(0, 1), send, receive)
    parts = [part.unflatten(0, (mine, count)) for part, count in zip(received.split(receive), heads, strict=True)]
    return torch.cat(parts, dim=1).permute(2, 3, 0, 1, 4)
