"""Tensor parallelism of a text encoder: every rank computes some heads and some hidden units of every layer.

    x (B, T, D)  --q, k, v: columns-->  (B, T, H/n*d)  attention over n-th of the heads  --o: rows-->  (B, T, D) partial
    x (B, T, D)  --wi: columns-->  (B, T, F/n)  activation  --wo: rows-->  (B, T, D) partial
    partial sums  --all-reduce-->  (B, T, D) on every rank                                       2 per layer

A plan is data: which linear layers are split by columns and which by rows, which embeddings have a column per head,
and what a module calls its number of heads. Embeddings and norms are whole everywhere. Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from workers.parallel.comm import Group
from workers.parallel.groups import new_group


@dataclass(frozen=True)
class TensorPlan:
    """How an encoder is split, by patterns of module names."""

    columns: tuple[str, ...]
    """Linear layers whose outputs are shared out."""
    rows: tuple[str, ...]
    """Linear layers whose inputs are shared out; their outputs are partial sums."""
    per_head: tuple[str, ...] = ()
    """Embeddings with a column per head."""
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules -> attributes that count heads or hidden units."""


T5_PLAN = TensorPlan(
    columns=("*.SelfAttention.[qkv]", "*.DenseReluDense.wi*"),
    rows=("*.SelfAttention.o", "*.DenseReluDense.wo"),
    # T5 has the bias in its first block only and hands it on, UMT5 has one in each.
    per_head=("*.SelfAttention.relative_attention_bias",),
    counts={"*.SelfAttention": ("n_heads", "inner_dim")},
)
QWEN_PLAN = TensorPlan(
    columns=(
        "*language_model.layers.*.self_attn.[qkv]_proj",
        "*language_model.layers.*.mlp.gate_proj",
        "*language_model.layers.*.mlp.up_proj",
    ),
    rows=("*language_model.layers.*.self_attn.o_proj", "*language_model.layers.*.mlp.down_proj"),
    counts={"*language_model.layers.*.self_attn": ("num_heads", "num_key_value_heads")},
)
PLANS: dict[str, TensorPlan] = {
    "T5EncoderModel": T5_PLAN,
    "UMT5EncoderModel": T5_PLAN,
    "Qwen2_5_VLModel": QWEN_PLAN,
    "Qwen2_5_VLForConditionalGeneration": QWEN_PLAN,
}
"""Class of the encoder -> plan; encoders of other classes (CLIP) stay whole."""

Part = tuple[slice, ...]


def tensor_group(num_ranks: int, tp: int, rank: int, *, staged: bool = False) -> Group | None:
    """The `tp` neighbours of this rank that share its encoders; None where nothing is shared.

    Every rank has to call it, in the same order as it makes its other groups.
    """
    if tp == 1:
        return None
    mine: Group | None = None
    for start in range(0, num_ranks, tp):
        process_group = new_group(range(start, start + tp))
        if start <= rank < start + tp:
            mine = Group(tp, rank - start, process_group, staged)
    return mine


def parts(module: nn.Module, plan: TensorPlan, group: Group) -> dict[nn.Parameter, Part]:
    """What this rank holds of every parameter that is split.

    Raises:
        ValueError: a layer does not divide by the ranks, or the plan names none.
    """
    found: dict[nn.Parameter, Part] = {}
    for name, linear in _matching(module, plan.columns):
        found[linear.weight] = (_share(name, linear.weight.shape[0], group), slice(None))
        if linear.bias is not None:
            found[linear.bias] = (_share(name, linear.bias.shape[0], group),)
    for name, linear in _matching(module, plan.rows):
        if linear.bias is not None:
            raise ValueError(f"{name} has a bias, which every rank would add")
        found[linear.weight] = (slice(None), _share(name, linear.weight.shape[1], group))
    for name, embedding in _matching(module, plan.per_head):
        found[embedding.weight] = (slice(None), _share(name, embedding.weight.shape[1], group))
    if not found:
        raise ValueError(f"{type(module).__name__} has none of the layers of its plan")
    return found


def split(module: nn.Module, plan: TensorPlan, group: Group) -> None:
    """Make a module whose parameters are this rank's parts count its own heads, and sum what is partial."""
    for name, owner in _matching(module, tuple(plan.counts)):
        attributes = next(names for pattern, names in plan.counts.items() if fnmatchcase(name, pattern))
        for attribute in attributes:
            setattr(owner, attribute, getattr(owner, attribute) // group.size)
    for _, linear in _matching(module, plan.rows):
        linear.register_forward_hook(lambda layer, args, partial: group.all_reduce(partial))
    for _, linear in (*_matching(module, plan.columns), *_matching(module, plan.rows)):
        linear.out_features, linear.in_features = linear.weight.shape


def _matching(module: nn.Module, patterns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name, child


def _share(name: str, size: int, group: Group) -> slice:
    if size % group.size:
        raise ValueError(f"{name}: {size} does not divide by {group.size} ranks")
    share = size // group.size
    return slice(group.rank * share, (group.rank + 1) * share)


def whole(parameter: torch.Tensor) -> Part:
    return tuple(slice(None) for _ in parameter.shape)
