"""The attention kernels by name. A kernel is chosen once per component, never by try and error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.errors import InvalidInput
from workers.attention.sdpa import sdpa, sdpa_lse

Bias = torch.Tensor
"""Added to the scores, -inf hides a key: (B | 1, H | 1, Sq | 1, Sk), in the dtype of q."""


class Attend(Protocol):
    """What an attention processor calls, whatever the layout."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        key_bias: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S, H, D) each -> (B, Sq, H, D); S may be this rank's share of the tokens.

        Args:
            q: queries of this rank's tokens.
            k: keys of this rank's tokens.
            v: values of this rank's tokens.
            key_bias: one number per key of this rank, (B | 1, H | 1, 1, Sk): a padding mask, for example.
            bias: this rank's queries against all keys in rank order, (B | 1, H | 1, Sq | 1, Sk over all ranks).
        """
        ...


@dataclass(frozen=True)
class Kernel:
    """One attention kernel on one device: (B, S, H, D) each, any Sq and Sk, a `Bias` or none."""

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None], torch.Tensor]
    """(q, k, v, bias) -> (B, Sq, H, D)."""
    attend_lse: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None], tuple[torch.Tensor, torch.Tensor]]
    """The same, and the log-sum-exp of the scores: (B, Sq, H), at least fp32, -inf where a query sees no key."""


KERNELS: dict[str, Kernel] = {"torch_sdpa": Kernel("torch_sdpa", sdpa, sdpa_lse)}


def choose(name: str) -> Kernel:
    """The kernel for `--attention-backend`; "auto" takes the best exact one.

    Raises:
        InvalidInput: there is no such kernel (lists those that there are).
    """
    known = "torch_sdpa" if name == "auto" else name
    if known not in KERNELS:
        raise InvalidInput("attention_backend", f"there is no kernel {name}; take one of {', '.join(KERNELS)}")
    return KERNELS[known]


def as_bias(keep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask (B, Sk), true where a key may be attended to -> the key bias (B, 1, 1, Sk) that says the same."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    return bias.masked_fill_(~keep.bool(), -torch.inf)[:, None, None, :]


def add_biases(key_bias: Bias | None, bias: Bias | None) -> Bias | None:
    """Both, where both concern the same keys."""
    return key_bias if bias is None else bias if key_bias is None else key_bias + bias
