"""yunchang's attention as an `Engine`: the one file that knows it, and which of its paths are right.

Only `LongContextAttention` with the "basic" ring and flash-attn is used. It takes neither biases nor uneven shares or
heads, and on other kernels it is silently wrong with a ring (zero log-sum-exp); what it cannot take goes to our own
engine, with a warning. USP (arXiv 2405.07719), github.com/feifeibear/long-context-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from runtime.log import get_logger
from workers.attention.backends import Bias, Kernel
from workers.parallel.comm import Group
from workers.parallel.groups import Groups, new_group
from workers.parallel.usp import check_shapes, usp_attention

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM = 256
"""What flash-attn takes."""

log = get_logger("worker")


class YunchangEngine:
    """Keeps one yunchang module per layout."""

    def __init__(self, num_ranks: int, kernel: str) -> None:
        """`kernel` is a name of `yunchang.kernels.AttnType`. Every rank must call it: it makes process groups."""
        self._kernel = kernel
        self._modules: dict[int, tuple[Groups, Any]] = {}
        self._warned: set[str] = set()
        # yunchang takes a missing group for the whole world: an axis of one rank needs a real group of one.
        singles = [new_group([rank]) for rank in range(num_ranks)]
        self._single = singles[dist.get_rank()]

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
        """As `workers.parallel.usp.Engine`; the sizes are the same on all ranks, so all choose the same way."""
        reason = _cannot_take(q, q_sizes, kv_sizes, groups, bias)
        if reason is not None:
            if reason not in self._warned:
                self._warned.add(reason)
                log.warning("yunchang cannot take this attention, the native engine does it", reason=reason)
            return usp_attention(q, k, v, q_sizes, kv_sizes, groups, kernel, bias)
        check_shapes(q, k, v, q_sizes, kv_sizes, groups)
        out: torch.Tensor = self._module(groups)(q.contiguous(), k.contiguous(), v.contiguous())
        return out

    def _module(self, groups: Groups) -> Any:
        if id(groups) not in self._modules:
            from yunchang import LongContextAttention
            from yunchang.globals import PROCESS_GROUP
            from yunchang.kernels import AttnType

            # The groups are one singleton of the process, which a module reads when it is made.
            PROCESS_GROUP.ULYSSES_PG = self._of(groups.ulysses)
            PROCESS_GROUP.RING_PG = self._of(groups.ring)
            module = LongContextAttention(ring_impl_type="basic", attn_type=AttnType[self._kernel])
            self._modules[id(groups)] = groups, module
        return self._modules[id(groups)][1]

    def _of(self, group: Group) -> dist.ProcessGroup | None:
        return self._single if group.size == 1 else group.process_group


def _cannot_take(
    q: torch.Tensor, q_sizes: Sequence[int], kv_sizes: Sequence[int], groups: Groups, bias: Bias | None
) -> str | None:
    heads, dim = q.shape[2:]
    if q.device.type == "cuda" and (q.dtype not in FLASH_DTYPES or dim > FLASH_HEAD_DIM):
        return f"flash-attn on {q.dtype} with head dim {dim}"
    if bias is not None:
        return "a mask or bias"
    if len({*q_sizes}) > 1 or len({*kv_sizes}) > 1 or 0 in (*q_sizes, *kv_sizes):
        return "uneven shares of the tokens"
    if heads % groups.ulysses.size:
        return f"{heads} heads on {groups.ulysses.size} Ulysses ranks"
    return "staged tensors" if groups.sp.staged else None
