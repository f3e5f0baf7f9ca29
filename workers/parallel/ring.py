"""Ring attention: queries stay, keys and values go round; every rank sees all of them and never holds more than two.

    q, k, v  (B, S/n, H, D)  --n turns: attend to one share of the keys while the next one travels-->  (B, S/n, H, D)

n - 1 exchanges per attention, k and v together, each behind the kernel of the turn before. Parts are merged by their
log-sum-exp in fp32. Ring Attention (arXiv 2310.01889); the merge is FlashAttention's (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.attention.backends import Bias, Kernel
from workers.parallel.comm import Group


def ring_attention(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    sizes: Sequence[int],
    group: Group,
    kernel: Kernel,
    bias: Bias | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to all keys, of which rank r holds `sizes[r]`; `bias` has all their columns."""
    kv = torch.stack((k_BSHD, v_BSHD))
    columns = [None] * group.size if bias is None else bias.split(list(sizes), dim=-1)
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for turn in range(group.size):
        owner, following = (group.rank - turn) % group.size, (group.rank - turn - 1) % group.size
        last = turn + 1 == group.size
        shape = (*kv.shape[:2], sizes[following], *kv.shape[3:])
        coming = None if last else group.start_exchange(kv, shape)
        part = kernel.attend_lse(q_BSHD, kv[0], kv[1], columns[owner])
        merged = merge(merged, part)
        if coming is not None:
            kv = coming.wait()
    assert merged is not None
    return merged[0].to(q_BSHD.dtype)


def merge(
    merged: tuple[torch.Tensor, torch.Tensor] | None, part: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two disjoint sets of keys, (out, lse) each -> to both; lse -inf is a set without a key.

    Shapes (B, S, H, D) and (B, S, H); computed in the dtype of lse, which is at least fp32.
    """
    new, new_lse = part[0].to(part[1].dtype), part[1]
    if merged is None:
        return new, new_lse
    out, lse = merged
    # Both -inf: neither has anything to say, and inf - inf is not a number.
    weight = torch.sigmoid(new_lse - lse).nan_to_num(0.0).unsqueeze(-1)
    return out - weight * (out - new), torch.logaddexp(lse, new_lse)
