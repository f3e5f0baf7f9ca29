"""Splitting a forward's tokens over a group by hooks on an unmodified module. How a model is split is data.

tokens S  --split before the first block-->  S/n  … blocks …  S/n  --gather after the last projection-->  S

A model has one or more streams of tokens (video; picture and text). Each is split by itself, in contiguous shares, so
a rank's part of a joint attention is its share of one stream beside its share of the other. Attention does not depend
on the order of the keys: nothing has to be sorted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from workers.attention.backends import Attend, Bias, Kernel, add_biases
from workers.parallel.groups import SOLO, Groups
from workers.parallel.usp import Engine, spread_bias, usp_attention


@dataclass(frozen=True)
class Split:
    """One tensor's token dimension."""

    stream: str
    """Tensors of one stream have the same number of tokens and are cut at the same places."""
    dim: int


@dataclass(frozen=True)
class SequencePlan:
    """Where a denoiser's token dimensions begin and end. Keys are module names; "" is the denoiser itself and * stands
    for one part of a name. None among the tensors is left alone, and tuples are split member by member."""

    split_inputs: dict[str, dict[str, Split]]
    """Module -> argument of its forward -> how it is split."""
    split_outputs: dict[str, dict[int, Split]]
    """Module -> place in what it returns (rotary tables, for example) -> how it is split."""
    gather_outputs: dict[str, Split]
    """Module -> how its output is made whole again, on every rank."""
    attention: dict[str, tuple[str, ...]]
    """Module whose processor gets our `Attend` -> the streams whose tokens it joins."""


class SequenceParallel:
    """One denoiser's hooks. Outside `over(groups)` they do nothing and attention is local."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        plan: SequencePlan,
        kernel: Kernel,
        processor: Callable[[Attend], Any],
        engine: Engine = usp_attention,
    ) -> None:
        self._kernel = kernel
        self._engine = engine
        self._groups = SOLO
        self._sizes: dict[str, list[int]] = {}
        self._biases: dict[tuple[int, int, tuple[str, ...]], tuple[Bias | None, Bias | None, Bias | None]] = {}
        self._shares: dict[int, tuple[Any, Any]] = {}
        denoiser.register_forward_pre_hook(lambda module, args: self._forget())
        self._install(denoiser, plan, processor)

    @contextmanager
    def over(self, groups: Groups) -> Iterator[None]:
        """Forwards inside share their tokens over `groups.sp`; every member must run the same forwards."""
        self._groups = groups
        try:
            yield
        finally:
            self._groups = SOLO
            self._forget()

    def attend(
        self,
        streams: tuple[str, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        key_bias: Bias | None = None,
        bias: Bias | None = None,
    ) -> torch.Tensor:
        """`Attend` over the tokens of some streams: (B, S/n, H, D) each -> (B, S/n, H, D)."""
        if self._groups.sp.size == 1:
            return self._kernel.attend(q, k, v, add_biases(key_bias, bias))
        sizes = [sum(shares) for shares in zip(*(self._sizes[stream] for stream in streams), strict=True)]
        spread = self._spread(streams, q.shape[2], sizes, key_bias, bias)
        return self._engine(q, k, v, sizes, sizes, self._groups, self._kernel, spread)

    def _spread(
        self, streams: tuple[str, ...], heads: int, sizes: Sequence[int], key_bias: Bias | None, bias: Bias | None
    ) -> Bias | None:
        """The kernel's bias; made once for all blocks of a forward that use the same tensors."""
        if key_bias is None and bias is None:
            return None
        key = id(key_bias), id(bias), streams
        if key not in self._biases:
            # The originals are kept too: a freed tensor's id may come back.
            self._biases[key] = key_bias, bias, spread_bias(key_bias, bias, heads, sizes, sizes, self._groups)
        return self._biases[key][2]

    def _forget(self) -> None:
        self._sizes, self._biases, self._shares = {}, {}, {}

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def _install(self, denoiser: torch.nn.Module, plan: SequencePlan, processor: Callable[[Attend], Any]) -> None:
        for pattern, arguments in plan.split_inputs.items():
            for module in _named(denoiser, pattern):
                hook = self._split_inputs(module, arguments, shared="*" in pattern)
                module.register_forward_pre_hook(hook, with_kwargs=True)
        for pattern, places in plan.split_outputs.items():
            for module in _named(denoiser, pattern):
                module.register_forward_hook(self._split_outputs(places))
        for pattern, split in plan.gather_outputs.items():
            for module in _named(denoiser, pattern):
                module.register_forward_hook(self._gather(split))
        for pattern, streams in plan.attention.items():
            for module in _named(denoiser, pattern):
                module.set_processor(processor(functools.partial(self.attend, streams)))

    def _split(self, x: Any, split: Split) -> Any:
        if isinstance(x, tuple | list):
            return tuple(self._split(part, split) for part in x)
        if x is None:
            return None
        sizes = self._groups.sp.share(x.shape[split.dim])
        if self._sizes.setdefault(split.stream, sizes) != sizes:
            known = sum(self._sizes[split.stream])
            raise ValueError(f"{split.stream} has {x.shape[split.dim]} tokens in one tensor and {known} in another")
        return x.split(sizes, dim=split.dim)[self._groups.sp.rank]

    def _split_shared(self, x: Any, split: Split) -> Any:
        """What many modules take, split once per forward, so that they can tell that it is the same."""
        if id(x) not in self._shares:
            # The original is kept too: a freed tensor's id may come back.
            self._shares[id(x)] = x, self._split(x, split)
        return self._shares[id(x)][1]

    def _split_inputs(
        self, module: torch.nn.Module, arguments: dict[str, Split], *, shared: bool
    ) -> Callable[..., Any]:
        cut = self._split_shared if shared else self._split
        places = {name: place for place, name in enumerate(inspect.signature(module.forward).parameters)}
        assert arguments.keys() <= places.keys(), f"{type(module).__name__} takes {list(places)}"

        def split(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if self._groups.sp.size == 1:
                return args, kwargs
            values, named = list(args), dict(kwargs)
            for name, how in arguments.items():
                if name in named:
                    named[name] = cut(named[name], how)
                elif places[name] < len(values):
                    values[places[name]] = cut(values[places[name]], how)
            return tuple(values), named

        return split

    def _split_outputs(self, places: dict[int, Split]) -> Callable[..., Any]:
        def split(module: Any, args: Any, output: Any) -> Any:
            if self._groups.sp.size == 1:
                return output
            if isinstance(output, torch.Tensor):
                return self._split(output, places[0])
            return tuple(self._split(x, places[i]) if i in places else x for i, x in enumerate(output))

        return split

    def _gather(self, how: Split) -> Callable[..., Any]:
        def gather(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            if self._groups.sp.size == 1:
                return output
            return self._groups.sp.all_gather(output, how.dim, self._sizes[how.stream])

        return gather


def _named(denoiser: torch.nn.Module, pattern: str) -> list[Any]:
    """The modules that a plan's key names; at least one."""
    wanted = pattern.split(".")

    def fits(name: str) -> bool:
        parts = name.split(".")
        return len(parts) == len(wanted) and all(w in ("*", part) for w, part in zip(wanted, parts, strict=True))

    found = [module for name, module in denoiser.named_modules() if fits(name)]
    assert found, f"no module matches {pattern!r}"
    return found
