"""One request as the scheduler sees it: its stage, its legal moves, its times. Holds no tensors."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.protocol import Request


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
    Stage.QUEUED: frozenset({Stage.ENCODE, Stage.FAILED, Stage.CANCELLED}),
    Stage.ENCODE: frozenset({Stage.DENOISE, Stage.FAILED, Stage.CANCELLED}),
    Stage.DENOISE: frozenset({Stage.DECODE, Stage.FAILED, Stage.CANCELLED}),
    Stage.DECODE: frozenset({Stage.DELIVER, Stage.FAILED, Stage.CANCELLED}),
    Stage.DELIVER: frozenset({Stage.COMPLETED, Stage.FAILED, Stage.CANCELLED}),
}


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
    stage: Stage = Stage.QUEUED
    step: int = 0
    chunk: int = 0
    decode_rank: int | None = None
    running: bool = False
    """It is in an item now, so no other item may touch it."""
    cancel_reason: str | None = None
    stored: bool = False
    """The gateway has all its frames."""
    entered: dict[Stage, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def key(self) -> str:
        """The API key that it is charged to."""
        return self.request.key

    @property
    def deadline(self) -> float:
        timeout = self.request.timeout_s
        return math.inf if timeout is None else self.arrived + timeout

    @property
    def total_steps(self) -> int:
        return self.request.params.num_inference_steps

    def move(self, to: Stage, now: float) -> None:
        """Enter a stage; an illegal move is our bug."""
        assert to in _MOVES.get(self.stage, frozenset()), f"{self.id}: {self.stage} -> {to}"
        self.stage = to
        self.entered[to] = now

    def timings(self, now: float) -> dict[str, float]:
        """Seconds spent in each stage so far."""
        marks = [(Stage.QUEUED, self.arrived), *self.entered.items()]
        ends = [start for _, start in marks[1:]] + [now]
        spent = {str(stage): end - start for (stage, start), end in zip(marks, ends, strict=True) if stage not in ENDED}
        return spent | {"total": now - self.arrived}
