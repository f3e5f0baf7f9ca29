"""Bytes that one rank sends in one denoising step, by layout: the one place for these formulas. Knows no seconds.

S tokens of D = heads * head_dim values, e bytes each; n = ring * ulysses ranks share them; L attentions per forward.

    Ulysses u   q, k, v there, the output back     L * 4 * (S/n) * D * e * (u-1)/u     all_to_all   2 L collectives
    ring r      keys and values, r-1 hops          L * 2 * (S/n) * D * e * (r-1)       exchange     L (r-1)
    both        the output of the last projection  (S/n) * C * e * (n-1)               all_gather   1
    cfg c       the prediction of every branch     latents * e * (c-1)                 all_gather   1 per step
    FSDP N      every block's weights              W * (N-1)/N                         weights      blocks + 1

All but the last two count per branch: each branch is a row of its own in the forward. FSDP counts per forward; W has
every tensor's first dimension filled up to a multiple of N, for the parts that are gathered are equal. What a library
keeps in fp32 beside a half-precision model is counted and not sent: 0.2 % of a Wan.
"""

from __future__ import annotations

from math import prod

import msgspec

from runtime.layout import Layout
from runtime.models.card import Card, Configs
from runtime.sampling import ResolvedParams

JOINT_TOKENS = 32_768
"""Guidance branches share one forward up to this many tokens in all: beyond it batching wins no speed, only memory."""


class Work(msgspec.Struct, frozen=True):
    """What a step of one request consists of, on whatever layout."""

    tokens: int
    width: int
    """heads * head_dim."""
    heads: int
    attentions: int
    """Self-attentions in one forward."""
    branches: int
    latents: int
    """Values of the request's latents."""

    @property
    def attention_flops(self) -> float:
        """Of the scores and their product with v, all branches: what ring can hide its transfers behind."""
        return 4.0 * self.tokens**2 * self.width * self.attentions * self.branches


class Traffic(msgspec.Struct, frozen=True):
    """Bytes sent by one rank in one step, and in how many collectives."""

    all_to_all: float = 0.0
    exchange: float = 0.0
    all_gather: float = 0.0
    weights: float = 0.0
    calls: dict[str, int] = {}

    @property
    def total(self) -> float:
        return self.all_to_all + self.exchange + self.all_gather + self.weights


def work_of(card: Card, configs: Configs, params: ResolvedParams) -> Work:
    """The sizes that traffic depends on; every diffusers transformer names them alike in its config."""
    dit = configs["transformer"]
    heads = dit["num_attention_heads"]
    return Work(
        tokens=card.tokens(params),
        width=heads * dit["attention_head_dim"],
        heads=heads,
        attentions=dit["num_layers"] + dit.get("num_single_layers", 0),
        branches=len(card.branches(params, 0)),
        latents=prod(card.latent_shape(params)),
    )


def forwards(work: Work, layout: Layout) -> int:
    """Of one group in one step: without guidance groups branches share a forward while it is small."""
    if layout.cfg == 1 and work.tokens * work.branches <= JOINT_TOKENS:
        return 1
    return -(-work.branches // layout.cfg)


def step_traffic(
    work: Work, layout: Layout, element: int, *, weight_bytes: float = 0.0, blocks: int = 0, shards: int = 0
) -> Traffic:
    """What the busiest rank sends in a step.

    Args:
        work: of the request.
        layout: cfg * ring * ulysses.
        element: bytes of a value in the denoiser's precision.
        weight_bytes: of the denoiser if it is sharded, filled up to equal parts (`Weights.filled_up`), else 0.
        blocks: into which these weights are gathered one by one.
        shards: ranks that it is sharded over; unset: those of the layout.
    """
    share = -(-work.tokens // layout.sp)
    branches = -(-work.branches // layout.cfg)
    passes = forwards(work, layout)
    rows = work.attentions * branches * share * work.width * element
    shards, output = shards or layout.num_ranks, work.latents / work.tokens * share * branches * element
    return Traffic(
        all_to_all=4 * rows * (layout.ulysses - 1) / layout.ulysses,
        exchange=2.0 * rows * (layout.ring - 1),
        all_gather=output * (layout.sp - 1) + work.latents * element * branches * (layout.cfg - 1),
        weights=passes * weight_bytes * (shards - 1) / shards,
        calls={
            "all_to_all": 2 * work.attentions * passes * (layout.ulysses > 1),
            "exchange": work.attentions * passes * (layout.ring - 1),
            "all_gather": passes * (layout.sp > 1) + (layout.cfg > 1),
            "weights": passes * (blocks + 1) * (weight_bytes > 0),
        },
    )
