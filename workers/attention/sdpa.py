"""PyTorch's scaled-dot-product attention, alone and with the log-sum-exp that a ring needs to merge its parts."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

ALIGNED = 16
"""The memory-efficient CUDA kernel reads biases in rows of a multiple of so many elements."""
DIM_ALIGNED, MOST_FLASH_DIM = 8, 256
"""CUDA kernels take head dims that are multiples of the one, flash none above the other."""
FLASH_CAPABILITY = (8, 0)
"""The oldest GPUs that the flash kernel runs on: Ampere."""


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
    out, lse = (_cpu if q.device.type == "cpu" else _cuda)(q, k, v, bias)
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


def _cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, S, D); by flash where it can. Zeros behind a head dim that does not fit change no score."""
    dim = q.shape[-1]
    q, k, v = (F.pad(x, (0, -dim % DIM_ALIGNED)) if dim % DIM_ALIGNED else x for x in (q, k, v))
    if bias is None and _flash_takes(q):
        out, lse = _cuda_flash(q, k, v, dim**-0.5)
    else:
        out, lse = _cuda_efficient(q, k, v, bias, dim**-0.5)
    return out.narrow(-1, 0, dim), lse


def _flash_takes(q: torch.Tensor) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.shape[-1] <= MOST_FLASH_DIM and _capability(q.device) >= FLASH_CAPABILITY


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# torch's own operators behind scaled_dot_product_attention, which keeps the log-sum-exp to itself. Their signatures
# are private and the same from 2.11 to 2.13; a test holds them to shapes without a GPU.


def _cuda_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention.default
    out, lse, *_ = kernel(q, k, v, 0.0, False, False, scale=scale)
    return out, lse


def _cuda_efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is not None:
        keys = k.shape[2]
        padded = F.pad(bias, (0, -keys % ALIGNED))
        bias = padded.narrow(-1, 0, keys).expand(q.shape[0], q.shape[1], q.shape[2], keys)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
    out, lse, *_ = kernel(q, k, v, bias, True, scale=scale)
    # The kernel rounds the number of queries up.
    return out, lse.narrow(-1, 0, q.shape[2])
