"""Unified sequence parallelism: Ulysses inside, ring outside; with one of the degrees 1 it is the other alone.

Token shares are numbered over ring x ulysses, ulysses fastest, so that a Ulysses group holds one contiguous row:

    (B, S/ru, H, D)  --Ulysses-->  (B, S/r, H/u, D)  --ring over rows-->  the same  --Ulysses-->  (B, S/ru, H, D)

Exact for self-, joint (text and picture tokens of a rank side by side) and cross-attention, with biases, with shares
of any size, also none. USP (arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from workers.attention.backends import Bias, Kernel, add_biases
from workers.parallel import ring, ulysses
from workers.parallel.groups import Groups


class Engine(Protocol):
    """Attention over the ranks of `groups`."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_sizes: Sequence[int],
        kv_sizes: Sequence[int],
        groups: Groups,
        kernel: Kernel,
        bias: Bias | None = None,
    ) -> torch.Tensor:
        """This rank's share of the tokens, (B, S share, H, D) each -> (B, Sq share, H, D).

        Args:
            q: queries.
            k: keys.
            v: values.
            q_sizes: tokens of each rank of `groups.sp` in q.
            kv_sizes: tokens of each rank in k and v.
            groups: of the layout.
            kernel: what attends on one rank.
            bias: as `spread_bias` made it.

        Raises:
            ValueError: a tensor does not fit the sizes; before anything is sent.
        """
        ...


def usp_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_sizes: Sequence[int],
    kv_sizes: Sequence[int],
    groups: Groups,
    kernel: Kernel,
    bias: Bias | None = None,
) -> torch.Tensor:
    """The `Engine` of our own."""
    check_shapes(q, k, v, q_sizes, kv_sizes, groups)
    heads = groups.ulysses.share(q.shape[2])
    row = _rows(q_sizes, groups)[groups.ring.rank]
    if groups.ulysses.size > 1:
        q, k, v = _gather(q, k, v, row, _rows(kv_sizes, groups)[groups.ring.rank], groups)
    if groups.ring.size > 1:
        out = ring.ring_attention(q, k, v, [sum(r) for r in _rows(kv_sizes, groups)], groups.ring, kernel, bias)
    else:
        out = kernel.attend(q, k, v, bias)
    if groups.ulysses.size > 1:
        out = ulysses.gather_heads(out, row, heads, groups.ulysses)
    return out


def spread_bias(
    key_bias: Bias | None,
    bias: Bias | None,
    heads: int,
    q_sizes: Sequence[int],
    kv_sizes: Sequence[int],
    groups: Groups,
) -> Bias | None:
    """The biases of `Attend`, this rank's part -> the bias of the kernel on this rank.

    key_bias (B | 1, H | 1, 1, Sk share) and bias (B | 1, H | 1, Sq share | 1, Sk)
    -> (B | 1, H/u | 1, Sq of the row | 1, Sk).
    """
    if key_bias is not None:
        key_bias = groups.sp.all_gather(key_bias, 3, kv_sizes)
    if bias is not None and bias.shape[2] > 1:
        bias = groups.ulysses.all_gather(bias, 2, _rows(q_sizes, groups)[groups.ring.rank])
    mine = groups.ulysses.share(heads)
    return add_biases(*(_heads_of(part, mine, groups.ulysses.rank) for part in (key_bias, bias)))


def check_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_sizes: Sequence[int],
    kv_sizes: Sequence[int],
    groups: Groups,
) -> None:
    """Raises ValueError where q, k and v do not fit their ranks' shares: inside gloo it would end the process."""
    rank, size = groups.sp.rank, groups.sp.size
    if not len(q_sizes) == len(kv_sizes) == size:
        raise ValueError(f"shares of {len(q_sizes)} and {len(kv_sizes)} ranks on {size} ranks")
    for name, x, sizes in (("q", q, q_sizes), ("k", k, kv_sizes), ("v", v, kv_sizes)):
        if x.shape[1] != sizes[rank]:
            raise ValueError(
                f"{name} has {x.shape[1]} tokens on rank {rank}, which holds {sizes[rank]} of {sum(sizes)}"
            )
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or q.shape[0] != k.shape[0]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")


def _gather(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_row: Sequence[int], kv_row: Sequence[int], groups: Groups
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads for tokens, in one collective where q and k have the same shares."""
    if list(q_row) == list(kv_row):
        q, k, v = ulysses.gather_tokens((q, k, v), q_row, groups.ulysses)
        return q, k, v
    (q,) = ulysses.gather_tokens((q,), q_row, groups.ulysses)
    k, v = ulysses.gather_tokens((k, v), kv_row, groups.ulysses)
    return q, k, v


def _rows(sizes: Sequence[int], groups: Groups) -> list[list[int]]:
    """Token shares by ring place and, inside, by Ulysses rank."""
    width = groups.ulysses.size
    return [list(sizes[start : start + width]) for start in range(0, len(sizes), width)]


def _heads_of(bias: Bias | None, heads: Sequence[int], rank: int) -> Bias | None:
    return bias if bias is None or bias.shape[1] == 1 else bias.split(list(heads), dim=1)[rank]
