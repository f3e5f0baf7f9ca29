"""PyTorch's scaled-dot-product attention, alone and with the log-sum-exp that a ring needs to merge its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ALIGNED = 16
"""The memory-efficient CUDA kernel reads biases in rows of a multiple of so many elements."""


def sdpa(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: (B, S, H, D) -> (B, S, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def sdpa_lse(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and log(sum(exp(scores))): (B, S, H, D), (B, S, H). A query that sees no key has 0 and -inf."""
    if q_BSHD.numel() == 0 or k_BSHD.shape[1] == 0:
        # The kernels below divide by these sizes; the CPU's ends the process.
        return torch.zeros_like(q_BSHD), torch.full(q_BSHD.shape[:3], -torch.inf, device=q_BSHD.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    kernel = _cpu if q.device.type == "cpu" else _cuda_flash if _flash_takes(q, bias) else _cuda_efficient
    out, lse = kernel(q, k, v, bias)
    if bias is not None:
        # What the kernels give for a query without a key (0, or not a number) would corrupt a merge.
        blind = torch.isneginf(bias).all(dim=-1)
        out = out.masked_fill(blind.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(blind, -torch.inf)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, S, D); the kernel that scaled_dot_product_attention itself takes on the CPU, to the bit."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)
    return out, lse


def _flash_takes(q: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return bias is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _cuda_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
    return out, lse


def _cuda_efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is not None:
        keys = k.shape[2]
        padded = F.pad(bias, (0, -keys % ALIGNED))
        bias = padded[..., :keys].expand(q.shape[0], q.shape[1], q.shape[2], keys)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
    # The kernel rounds the number of queries up.
    return out, lse[..., : q.shape[2]]
