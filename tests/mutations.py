"""Faults put in on purpose: the bound of a parity test must notice each of them a hundredfold.

Each takes the denoiser that is about to run and is a context manager; its first line goes to docs/parity.md.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from runtime.layout import Layout
from workers import executor
from workers.models import qwen_image, wan
from workers.parallel import ring, ulysses
from workers.parallel.fsdp import repeated_blocks
from workers.state import RequestState


def mutations_of(layout: Layout, *, sharded: bool = False, masked: bool = False) -> list[str]:
    """The faults that a layout can show; what runs on one rank has at least its timestep."""
    found = ["heads", "tokens"] if layout.ulysses > 1 else []
    found += ["merge", "rotation"] if layout.ring > 1 else []
    found += ["branches"] if layout.cfg > 1 else []
    found += ["share", "stale"] if sharded else []
    found += ["padding"] if masked else []
    return found or ["timestep"]


def broken(name: str, denoiser: nn.Module | None = None) -> AbstractContextManager[Any]:
    """ "none" breaks nothing."""
    return nullcontext() if name == "none" else FAULTS[name](denoiser)


def heads(_):
    """Heads come back from the all-to-all in the wrong order."""
    right = ulysses.gather_heads
    return mock.patch.object(ulysses, "gather_heads", lambda *args: right(*args).roll(1, dims=2))


def tokens(_):
    """Another rank's tokens come first, and keys and values change places, or attention would not care."""
    right = ulysses.gather_tokens

    def wrong(tensors, sizes, group):
        return tuple(x.roll(max(sizes), dims=1) for x in reversed(right(tensors, sizes, group)))

    return mock.patch.object(ulysses, "gather_tokens", wrong)


def merge(_):
    """Parts are averaged, as if every share of the keys had the same log-sum-exp."""

    def wrong(merged, part):
        return part if merged is None else ((merged[0] + part[0]) / 2, part[1])

    return mock.patch.object(ring, "merge", wrong)


class _Stale:
    """A transfer whose result is overlooked."""

    def __init__(self, coming, old):
        self.coming, self.old = coming, old

    def wait(self):
        fresh = self.coming.wait()
        return self.old if self.old.shape == fresh.shape else fresh.flip(0)


def rotation(_):
    """Keys and values of the turn before; those of another size change places instead."""
    right = ring.ring_attention

    class Stuck:
        def __init__(self, group):
            self.group, self.size, self.rank = group, group.size, group.rank

        def start_exchange(self, kv, shape):
            return _Stale(self.group.start_exchange(kv, shape), kv)

    def wrong(q, k, v, sizes, group, *rest):
        return right(q, k, v, sizes, Stuck(group), *rest)

    return mock.patch.object(ring, "ring_attention", wrong)


def branches(_):
    """The guidance branches change places."""
    right = executor.gather_branches

    def swapped(mine, branches, group):
        found = right(mine, branches, group)
        return dict(zip(found, reversed(found.values()), strict=True))

    return mock.patch.object(executor, "gather_branches", swapped)


def _shares(block: nn.Module) -> list[torch.Tensor]:
    return [weight.to_local() for weight in block.parameters() if isinstance(weight, DTensor)]


@contextmanager
def _overwritten(mine: list[torch.Tensor], wrong: list[torch.Tensor]) -> Iterator[None]:
    """This rank's shares of some weights hold other values, until they are put back."""
    right = [share.clone() for share in mine]
    _copy(wrong, mine)
    yield
    _copy(right, mine)


@torch.inference_mode()
def _copy(values: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    for value, share in zip(values, into, strict=True):
        share.copy_(value)


def share(denoiser):
    """The last rank gives zeros for its share of a block's weights."""
    mine = _shares(repeated_blocks(denoiser)[0])
    last = dist.get_rank() == dist.get_world_size() - 1
    return _overwritten(mine, [torch.zeros_like(share) if last else share.clone() for share in mine])


def stale(denoiser):
    """A block computes with the weights of the one before it, as if its own had not been gathered."""
    first, second = (_shares(block) for block in repeated_blocks(denoiser)[:2])
    return _overwritten(second, [share.clone() for share in first])


@contextmanager
def padding(_):
    """Padding of the text is attended to (Qwen-Image), or weighs as much as one token (Wan)."""
    fold, pad_text = wan.FoldedText.fold, qwen_image.pad_text

    def unweighed(text, prompts):
        folded = fold(text, prompts)
        text.bias = None
        return folded

    def unmasked(prompts):
        return pad_text(prompts)[0], None

    patch = mock.patch.object
    with patch(wan.FoldedText, "fold", unweighed), patch(qwen_image, "pad_text", unmasked):
        yield


def timestep(_):
    """Every request is told the timestep of the step before."""
    late = property(lambda state: state.solver.timesteps[max(state.step - 1, 0)])
    return mock.patch.object(RequestState, "timestep", late)


FAULTS = {
    fault.__name__: fault for fault in (heads, tokens, merge, rotation, branches, share, stale, padding, timestep)
}
