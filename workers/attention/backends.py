"""The attention kernels by name. A kernel is chosen once per component, never by try and error."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.attention.sdpa import sdpa

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""attend(q, k, v): (B, S, H, D) each -> (B, Sq, H, D)."""

BACKENDS: dict[str, Attend] = {"torch_sdpa": sdpa}


def choose(name: str) -> Attend:
    """The kernel for `--attention-backend`; "auto" takes the best exact one."""
    return BACKENDS["torch_sdpa" if name == "auto" else name]
