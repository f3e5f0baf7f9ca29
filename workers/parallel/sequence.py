"""Splitting a forward's tokens over a group by hooks on an unmodified module. How a model is split is data.

tokens S  --split before the first block-->  S/n  … blocks …  S/n  --gather after the last projection-->  S
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from workers.attention.backends import Attend
from workers.parallel.comm import Group, share_sizes
from workers.parallel.ulysses import ulysses_attention

SOLO = Group(size=1, rank=0)


@dataclass(frozen=True)
class SequencePlan:
    """Where a denoiser's token dimension begins and ends, by module name."""

    split_outputs: dict[str, int]
    """Module -> dimension: every tensor that it returns is split (e.g. rotary tables)."""
    split_inputs: dict[str, tuple[int, int]]
    """Module -> (positional argument, dimension)."""
    gather_outputs: dict[str, int]
    """Module -> dimension: its output is made whole again on every rank."""
    self_attention: tuple[str, ...]
    """Modules (patterns) whose attention spans all tokens."""


class SequenceParallel:
    """One denoiser's hooks. Outside `over(group)` they do nothing and attention is local."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        plan: SequencePlan,
        attend: Attend,
        processor: Callable[[Attend], Any],
    ) -> None:
        self._attend_local = attend
        self._group = SOLO
        self._sizes: list[int] = []
        self._install(denoiser, plan, processor)

    @contextmanager
    def over(self, group: Group) -> Iterator[None]:
        """Forwards inside share their tokens over `group`; every member must run the same forwards."""
        self._group = group
        try:
            yield
        finally:
            self._group, self._sizes = SOLO, []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, S/n, H, D) each -> (B, S/n, H, D), attending to all S tokens."""
        if self._group.size == 1:
            return self._attend_local(q, k, v, key_bias)
        return ulysses_attention(q, k, v, self._sizes, self._group, self._attend_local)

    def _install(self, denoiser: torch.nn.Module, plan: SequencePlan, processor: Callable[[Attend], Any]) -> None:
        modules = dict(denoiser.named_modules())
        for name, dim in plan.split_outputs.items():
            modules[name].register_forward_hook(self._split_output_hook(dim))
        for name, (argument, dim) in plan.split_inputs.items():
            modules[name].register_forward_pre_hook(self._split_input_hook(argument, dim))
        for name, dim in plan.gather_outputs.items():
            modules[name].register_forward_hook(self._gather_hook(dim))
        attentions = [m for name, m in modules.items() if any(fnmatchcase(name, p) for p in plan.self_attention)]
        assert attentions, f"no module matches {plan.self_attention}"
        for module in attentions:
            module.set_processor(processor(self.attend))

    def _split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self._sizes = share_sizes(x.shape[dim], self._group.size)
        return x.split(self._sizes, dim=dim)[self._group.rank]

    def _split_output_hook(self, dim: int) -> Callable[..., Any]:
        def split(module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return output if self._group.size == 1 else tuple(self._split(x, dim) for x in output)

        return split

    def _split_input_hook(self, argument: int, dim: int) -> Callable[..., Any]:
        def split(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if self._group.size == 1:
                return args
            return (*args[:argument], self._split(args[argument], dim), *args[argument + 1 :])

        return split

    def _gather_hook(self, dim: int) -> Callable[..., Any]:
        def gather(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output if self._group.size == 1 else self._group.all_gather(output, dim, self._sizes)

        return gather
