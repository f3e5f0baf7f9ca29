"""One request as the scheduler sees it: its stage, its legal moves, its times. Holds no tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.protocol import CANCELLED, Request, SavedState, Usage
from runtime.sampling import preview_steps


class Stage(StrEnum):
    QUEUED = "queued"
    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    DELIVER = "deliver"
    """Every frame left the rank; the gateway has not yet said that it stored them."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({Stage.COMPLETED, Stage.FAILED, Stage.CANCELLED})
ACTIVE = frozenset({Stage.ENCODE, Stage.DENOISE, Stage.DECODE, Stage.DELIVER})
"""Stages in which the ranks hold state for the request."""

_MOVES: dict[Stage, frozenset[Stage]] = {
    Stage.QUEUED: frozenset({Stage.ENCODE}),
    Stage.ENCODE: frozenset({Stage.DENOISE, Stage.DECODE, Stage.QUEUED}),
    Stage.DENOISE: frozenset({Stage.DECODE, Stage.QUEUED}),
    Stage.DECODE: frozenset({Stage.DELIVER, Stage.QUEUED}),
    Stage.DELIVER: frozenset({Stage.DECODE, Stage.QUEUED}),
}
"""Beside these, whatever has not ended may end. Back to QUEUED is a restart, DELIVER to DECODE a repeated decode."""


@dataclass
class RequestRecord:
    """Mutable bookkeeping of one request; only the scheduler touches it."""

    request: Request
    gateway: bytes
    arrived: float
    group: int = 0
    """Requests of one Submit share it."""
    total_chunks: int = 0
    batch_key: Hashable = None
    """Of its first step."""
    remaining_s: float = 0.0
    """Predicted seconds of work that are left, alone on the mesh."""
    state_bytes: int = 0
    """Held on every rank from encode on."""
    decode_bytes: int = 0
    """Held on the decoding rank beside that."""
    attempt: int = 0
    """How often its frames were begun anew; those of an older attempt are dropped."""
    losses: list[int] = field(default_factory=list)
    """Losses of the worker group during its items."""
    alone: bool = False
    """It is under suspicion: nothing else runs beside its items."""
    sole: bool = False
    """It ran out of memory beside the states of others: the ranks hold none but its own while it is active."""
    saved: SavedState | None = None
    """Its newest checkpoint."""
    saved_upto: int = 0
    """The step up to which it has been written, or is being written."""
    orphaned_until: float = math.inf
    """Its gateway is gone; if no other takes it until then, it ends."""
    stage: Stage = Stage.QUEUED
    step: int = 0
    chunk: int = 0
    decode_rank: int | None = None
    running: bool = False
    """It is in an item now, so no other item may touch it."""
    cancel_reason: str | None = None
    cancel_code: str = CANCELLED
    stored: bool = False
    """The gateway has all its frames."""
    rank_seconds: float = 0.0
    """Measured seconds of its items so far times their ranks; its even share of those that it was not alone in."""
    peak_bytes: int = 0
    """Most memory that a rank held during one of its items."""
    entered: list[tuple[Stage, float]] = field(default_factory=list)
    """Every stage in turn, with the time when it began."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def key(self) -> str:
        """The API key that it is charged to."""
        return self.request.key

    @property
    def deadline(self) -> float:
        """When it is no longer wanted."""
        timeout = self.request.timeout_s
        return math.inf if timeout is None else self.arrived + timeout

    @property
    def total_steps(self) -> int:
        return self.request.params.num_inference_steps

    @property
    def preview_steps(self) -> tuple[int, ...]:
        """After which steps its gateway wants to see something."""
        return preview_steps(self.total_steps, self.request.previews)

    @property
    def next_stop(self) -> int:
        """The step at which an item of it has to end: a preview is due, or it was the last."""
        return next((step for step in self.preview_steps if step > self.step), self.total_steps)

    @property
    def resume_step(self) -> int:
        """The step at which it starts when it has no state on the ranks."""
        return self.saved.step if self.saved is not None else 0

    @property
    def restarted(self) -> bool:
        """Whether an earlier attempt may have come as far as its frames."""
        return self.attempt > self.request.attempt

    @property
    def where(self) -> str:
        """How far it has come, in words."""
        if self.stage is Stage.DENOISE:
            return f"denoising, after step {self.step} of {self.total_steps}"
        if self.stage is Stage.DECODE:
            return f"decoding, after chunk {self.chunk} of {self.total_chunks}"
        return f"the {self.stage} stage"

    def move(self, to: Stage, now: float) -> None:
        """Enter a stage; an illegal move is our bug."""
        legal = self.stage not in ENDED if to in ENDED else to in _MOVES.get(self.stage, frozenset())
        assert legal, f"{self.id}: {self.stage} -> {to}"
        self.stage = to
        self.entered.append((to, now))

    def restart(self, now: float) -> None:
        """Its state is gone: back into the line, to go on from its checkpoint."""
        self.move(Stage.QUEUED, now)
        self.attempt += 1
        self.running = False
        self.step, self.chunk, self.decode_rank = self.resume_step, 0, None
        self.saved_upto = self.resume_step

    def timings(self, now: float) -> dict[str, float]:
        """Seconds spent in each stage so far, all attempts together."""
        marks = [(Stage.QUEUED, self.arrived), *self.entered, (self.stage, now)]
        spent: dict[str, float] = {}
        for (stage, start), (_, end) in itertools.pairwise(marks):
            if stage not in ENDED:
                spent[str(stage)] = spent.get(str(stage), 0.0) + end - start
        return spent | {"total": now - self.arrived}

    def usage(self, now: float) -> Usage:
        """What it took of the mesh so far."""
        starts = sum(stage is Stage.ENCODE for stage, _ in self.entered)
        return Usage(self.timings(now)[str(Stage.QUEUED)], self.rank_seconds, starts, self.peak_bytes)
