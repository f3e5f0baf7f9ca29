"""Ulysses sequence parallelism: tokens are split over n ranks outside attention, heads inside it.

    q, k, v  (B, S/n, H, D)  --all-to-all-->  (B, S, H/n, D)  attend  (B, S, H/n, D)  --all-to-all-->  (B, S/n, H, D)

Two collectives per attention: q, k and v travel together. S need not divide by n, H must.
DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.attention.backends import Attend
from workers.parallel.comm import Group


def ulysses_attention(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    sizes: Sequence[int],
    group: Group,
    attend: Attend,
) -> torch.Tensor:
    """Attention over all tokens of which this rank holds `sizes[group.rank]`; returns this rank's rows."""
    q, k, v = gather_tokens(torch.stack((q_BSHD, k_BSHD, v_BSHD)), sizes, group).unbind(0)
    out = attend(q, k, v)
    return gather_heads(out.unsqueeze(0), sizes, group).squeeze(0)


def gather_tokens(x_NBSHD: torch.Tensor, sizes: Sequence[int], group: Group) -> torch.Tensor:
    """(N, B, S/n, H, D) -> (N, B, S, H/n, D)."""
    n, mine = group.size, sizes[group.rank]
    # Rows (peer, token): peer p gets the p-th slice of the heads of all my tokens.
    rows = x_NBSHD.unflatten(3, (n, -1)).permute(3, 2, 0, 1, 4, 5).flatten(0, 1)
    received = group.all_to_all(rows, send=[mine] * n, receive=sizes)
    return received.permute(1, 2, 0, 3, 4)


def gather_heads(x_NBSHD: torch.Tensor, sizes: Sequence[int], group: Group) -> torch.Tensor:
    """(N, B, S, H/n, D) -> (N, B, S/n, H, D)."""
    n, mine = group.size, sizes[group.rank]
    received = group.all_to_all(x_NBSHD.permute(2, 0, 1, 3, 4), send=sizes, receive=[mine] * n)
    # Rows (peer, token) again: peer p sent its slice of the heads for my tokens.
    return received.unflatten(0, (n, mine)).permute(2, 3, 1, 0, 4, 5).flatten(3, 4)
