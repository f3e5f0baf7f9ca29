"""PyTorch's scaled-dot-product attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sdpa(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, key_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask: (B, S, H, D) -> (B, S, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias).transpose(1, 2)
