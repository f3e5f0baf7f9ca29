"""Which layout serves a shape best on a machine: predicted seconds, memory and bytes of every one. No torch, no I/O.

    seconds of a step = compute (the cost model's line) + exposed transfers

Ulysses waits for its all-to-alls. Ring hides a hop behind the kernel on the keys that are there, FSDP the next block's
weights behind this block; of those only what does not fit behind the compute counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from runtime.cost import Constants, CostModel, Line
from runtime.layout import Layout
from runtime.machine import Machine
from runtime.models.card import Card, Configs
from runtime.sampling import ResolvedParams
from runtime.traffic import Traffic, Work, forwards, step_traffic, work_of

GIB, MIB = 1 << 30, 1 << 20
ACTIVATIONS = 16
"""Tensors of one layer's input that a forward holds at its fullest: projections, feed-forward and their inputs."""
MERGES = 4
"""Passes over the fp32 output that one hop of ring costs: read two, write one, and the log-sum-exp."""
RESERVE = 0.08
"""Share of a rank's memory that the runtime and the allocator keep for themselves."""


class Weights(msgspec.Struct, frozen=True):
    """Bytes of a model's weights in the precisions that they are served in."""

    denoiser: float
    gathered: float
    """Most that a rank has whole of them where they are sharded: of the module that runs its root, the block that
    computes, and the next one with the buffer that it comes in."""
    blocks: int
    encoders: float
    vae: float
    row_bytes: dict[int, int] = {}
    """First dimension of the denoiser's tensors -> bytes of one row of all those that have it."""

    def filled_up(self, shards: int) -> float:
        """Bytes of the denoiser over so many ranks: FSDP cuts first dimensions into equal parts, the last padded."""
        return self.denoiser + sum(row * (-rows % shards) for rows, row in self.row_bytes.items())


class Candidate(msgspec.Struct, frozen=True):
    """One way to use the ranks."""

    layout: Layout
    fsdp: bool = False

    @property
    def flags(self) -> dict[str, object]:
        """The settings of `runtime.config.Config` that ask for it."""
        flags: dict[str, object] = {
            "num_gpus": self.layout.num_ranks,
            "ring_degree": self.layout.ring,
            "ulysses_degree": self.layout.ulysses,
        }
        if self.layout.cfg > 1:
            flags |= {"enable_cfg_parallel": True, "cfg_parallel_size": self.layout.cfg}
        return flags | ({"use_fsdp_inference": True} if self.fsdp else {})

    def __str__(self) -> str:
        degrees = {"cfg": self.layout.cfg, "ring": self.layout.ring, "ulysses": self.layout.ulysses}
        named = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1] or ["one rank"]
        return " x ".join(named) + (" + fsdp" if self.fsdp else "")


class Prediction(msgspec.Struct, frozen=True):
    """What a candidate costs; seconds of one step, bytes of one rank."""

    candidate: Candidate
    compute: float
    transfers: dict[str, float]
    """Exposed seconds by kind: ulysses, ring, gather, fsdp."""
    traffic: Traffic
    memory: float
    fits: bool

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.transfers.values())


@dataclass(frozen=True)
class Tuner:
    """One model on one machine."""

    card: Card
    configs: Configs
    weights: Weights
    machine: Machine

    def rank(self, params: ResolvedParams, num_ranks: int) -> list[Prediction]:
        """Every candidate, those that fit first, the fastest first; among equals the one that moves least."""
        predictions = [self.predict(candidate, params) for candidate in self.candidates(params, num_ranks)]
        return sorted(predictions, key=lambda p: (not p.fits, p.seconds, p.traffic.total, p.memory))

    def unshared(self, params: ResolvedParams, num_ranks: int) -> str:
        """Why there is no candidate."""
        work = work_of(self.card, self.configs, params)
        return f"{num_ranks} ranks cannot share {work.tokens} tokens and {work.heads} heads without one that idles"

    def candidates(self, params: ResolvedParams, num_ranks: int) -> Iterator[Candidate]:
        work = work_of(self.card, self.configs, params)
        for layout in layouts(num_ranks, work):
            yield Candidate(layout)
            # Every forward gathers weights from all ranks, so all have to run equally many.
            if num_ranks > 1 and work.branches % layout.cfg == 0:
                yield Candidate(layout, fsdp=True)

    def predict(self, candidate: Candidate, params: ResolvedParams) -> Prediction:
        work, layout = work_of(self.card, self.configs, params), candidate.layout
        sharded = self.weights.filled_up(layout.num_ranks) if candidate.fsdp else 0.0
        traffic = step_traffic(
            work, layout, self.machine.element, weight_bytes=sharded, blocks=self.weights.blocks if sharded else 0
        )
        compute = self._compute(work, layout, params)
        memory = self.memory(candidate, params)
        return Prediction(
            candidate=candidate,
            compute=compute,
            transfers=self._transfers(work, layout, traffic, compute),
            traffic=traffic,
            memory=memory,
            fits=memory <= self.machine.memory * (1 - RESERVE),
        )

    def memory(self, candidate: Candidate, params: ResolvedParams) -> float:
        """Bytes on the fullest rank: weights, one request's state with its decode open, a forward's activations."""
        weights, layout = self.weights, candidate.layout
        held = weights.denoiser + weights.encoders
        if candidate.fsdp:
            held = held / layout.num_ranks + weights.gathered
        work = work_of(self.card, self.configs, params)
        rows = -(-work.branches // layout.cfg) // forwards(work, layout)
        tokens = -(-work.tokens // layout.sp)
        activations = ACTIVATIONS * rows * tokens * work.width * self.machine.element
        return held + weights.vae + self.card.state_bytes(params, "decode") + activations

    def _compute(self, work: Work, layout: Layout, params: ResolvedParams) -> float:
        """The cost model's line with this machine's constants, and what uneven shares of it cost on top."""
        passes = forwards(work, layout)
        fixed = passes * max(
            self.machine.launch * work.attentions, self.weights.denoiser / self.machine.memory_bandwidth
        )
        line = Line(fixed=0.0, slope=1.0 / self.machine.flops)
        even = CostModel(self.card, Constants({"denoise": line})).fitted("denoise", params, layout, 1)
        longest = -(-work.tokens // layout.sp) * layout.sp / work.tokens
        branches = -(-work.branches // layout.cfg) * layout.cfg / work.branches
        attention = work.attention_flops / layout.num_ranks / self.machine.flops
        heads = -(-work.heads // layout.ulysses) * layout.ulysses / work.heads
        # Weights are read at least once per forward, whatever the tokens.
        return max(even * longest * branches + attention * (heads - 1), fixed)

    def _transfers(self, work: Work, layout: Layout, traffic: Traffic, compute: float) -> dict[str, float]:
        """Exposed seconds by kind."""
        bandwidth, latency = self.machine.link_bandwidth, self.machine.link_latency

        def takes(kind: str) -> float:
            return float(getattr(traffic, kind)) / bandwidth + traffic.calls[kind] * latency

        found = {"ulysses": takes("all_to_all"), "gather": takes("all_gather")}
        if layout.ring > 1:
            # Of r kernels per attention, r - 1 run while the next keys travel.
            kernels = work.attention_flops / layout.num_ranks / self.machine.flops
            hidden = kernels * (layout.ring - 1) / layout.ring
            merged = work.attentions * work.branches / layout.cfg * work.tokens / layout.sp * work.width * 4
            merges = MERGES * merged * layout.ring / self.machine.memory_bandwidth
            found["ring"] = max(takes("exchange") - hidden, traffic.calls["exchange"] * latency) + merges
        if traffic.weights:
            # The first block and the root have nothing to hide behind.
            first = takes("weights") / (self.weights.blocks + 1)
            found["fsdp"] = max(takes("weights") - compute, first)
        return {kind: seconds for kind, seconds in found.items() if seconds > 0}


def layouts(num_ranks: int, work: Work) -> list[Layout]:
    """Every cfg * ring * ulysses = ranks that leaves no rank without a branch, a head or a token."""
    found = []
    for cfg in range(1, min(work.branches, num_ranks) + 1):
        for ulysses in range(1, min(num_ranks // cfg, work.heads) + 1):
            if num_ranks % (cfg * ulysses) == 0:
                layout = Layout(cfg, num_ranks // cfg // ulysses, ulysses)
                if layout.sp <= work.tokens:
                    found.append(layout)
    return found


# ---- in words ----------------------------------------------------------------------------------------------------


def why(ranked: Sequence[Prediction]) -> str:
    """One sentence on the winner, against the next one that fits or against what does not."""
    best = ranked[0]
    if not best.fits:
        least = min(ranked, key=lambda p: p.memory)
        return (
            f"nothing fits: the smallest, {least.candidate}, needs {gib(least.memory)} on a rank; "
            "take more ranks, fewer frames or a smaller size"
        )
    waits = max(best.transfers, key=lambda kind: best.transfers[kind], default=None)
    reason = f"{best.candidate} wins with {best.seconds:.3g} s per step"
    if waits is not None:
        share = sum(best.transfers.values()) / best.seconds
        reason += f", {share:.0%} of it waiting for other ranks (most for {waits})"
    others = [p for p in ranked[1:] if p.fits and p.candidate.layout != best.candidate.layout]
    if others:
        other = others[0]
        extra = {k: s - best.transfers.get(k, 0.0) for k, s in other.transfers.items()}
        extra["compute"] = other.compute - best.compute
        most = max(extra, key=lambda kind: extra[kind])
        reason += f"; {other.candidate} takes {other.seconds / best.seconds - 1:.1%} longer, mostly for {most}"
    refused = [p for p in ranked if not p.fits and p.seconds < best.seconds]
    if refused:
        reason += f"; {refused[0].candidate} would be faster but needs {gib(refused[0].memory)} on a rank"
    return reason


def crossover(
    tuner: Tuner,
    shapes: Sequence[ResolvedParams],
    num_ranks: int,
    a: Callable[[Layout], bool],
    b: Callable[[Layout], bool],
) -> tuple[int, ResolvedParams] | None:
    """The tokens, and the shape, from which the best layout of kind `a` beats the best of kind `b` for good."""
    found: tuple[int, ResolvedParams] | None = None
    for params in shapes:
        times = []
        for kind in (a, b):
            fitting = [
                tuner.predict(candidate, params).seconds
                for candidate in tuner.candidates(params, num_ranks)
                if kind(candidate.layout) and not candidate.fsdp
            ]
            times.append(min(fitting, default=float("inf")))
        wins = times[0] < times[1]
        found = (found or (tuner.card.tokens(params), params)) if wins else None
    return found


def crossovers(tuner: Tuner, shapes: Sequence[ResolvedParams], params: ResolvedParams, num_ranks: int) -> list[str]:
    """Where another choice would win: ring against Ulysses by tokens, FSDP by a rank's memory."""
    lines = []
    if num_ranks > 1:
        lines.append(f"layouts with ring {_against_the_others(tuner, shapes, num_ranks)}")
        whole, shared = (
            min(tuner.memory(c, params) for c in tuner.candidates(params, num_ranks) if c.fsdp == fsdp) / (1 - RESERVE)
            for fsdp in (False, True)
        )
        lines.append(
            f"FSDP becomes necessary on ranks of less than {gib(whole)}, and fits down to {gib(shared)}; "
            f"here a rank has {gib(tuner.machine.memory)}"
            if shared < whole and gib(shared) != gib(whole)
            else f"FSDP saves no memory here: {gib(shared)} instead of {gib(whole)} on a rank, for blocks on their way"
        )
    return lines


def _against_the_others(tuner: Tuner, shapes: Sequence[ResolvedParams], num_ranks: int) -> str:
    """From which tokens on ring wins, if it is a matter of tokens at all."""
    rings = {c.layout.ring > 1 for shape in shapes for c in tuner.candidates(shape, num_ranks)}
    if rings == {True}:
        return f"are the only ones for {num_ranks} ranks and these heads"
    at = crossover(tuner, shapes, num_ranks, lambda x: x.ring > 1, lambda x: x.ring == 1)
    if at is None:
        return f"beat those without nowhere up to {tuner.card.tokens(shapes[-1])} tokens"
    tokens, params = at
    return (
        f"beat those without from about {tokens} tokens on ({params.width}x{params.height}, {params.num_frames} frames)"
    )


def gib(num_bytes: float) -> str:
    """Three digits that tell: in GiB, and in MiB below one."""
    value, unit = (num_bytes / GIB, "GiB") if num_bytes >= GIB else (num_bytes / MIB, "MiB")
    decimals = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(decimals, 0)}f} {unit}"
