"""Bytes that requests hold on a rank, against the rank's budget. Knows no order and no time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from runtime.models.card import Card
from runtime.request import RequestRecord, Stage
from runtime.sampling import ResolvedParams

GIB = 1 << 30


@dataclass
class MemoryLedger:
    """The sum of `state_bytes` on any rank never exceeds the budget.

    Every active request holds its denoise state on every rank. A request is admitted only if, beside all those, the
    largest decode among them would still fit: so one decode can always go on, and nothing waits for itself.
    """

    card: Card
    budget: int | None = None
    """Bytes per rank; None until the ranks have told."""

    def measure(self, record: RequestRecord) -> None:
        """Fill in what the request holds while it denoises, and what a decode adds on its rank."""
        params = record.request.params
        record.state_bytes = self.card.state_bytes(params, "denoise")
        record.decode_bytes = max(self.card.state_bytes(params, "decode") - record.state_bytes, 0)

    def refusal(self, record: RequestRecord) -> str | None:
        """Why this request could never run, and what would; None if it can."""
        need = record.state_bytes + record.decode_bytes
        if self.budget is None or need <= self.budget:
            return None
        fitting = self._largest(record.request.params)
        advice = (
            f"{fitting.num_frames} frames of {fitting.width}x{fitting.height} would fit"
            if fitting is not None
            else "take a smaller size"
        )
        return f"it needs {need / GIB:.2f} GiB on a rank, {self.budget / GIB:.2f} GiB are free for requests; {advice}"

    def admits(self, record: RequestRecord, active: Iterable[RequestRecord]) -> bool:
        """Whether a queued request may get a state now."""
        if self.budget is None:
            return True
        together = [*active, record]
        held = sum(other.state_bytes for other in together)
        return held + max(other.decode_bytes for other in together) <= self.budget

    def may_open_decode(self, record: RequestRecord, rank: int, active: Iterable[RequestRecord]) -> bool:
        """Whether a decode may be opened on a rank, beside those that are open there; one at a time if in doubt."""
        if self.budget is None:
            return all(other.decode_rank != rank or other.stage is not Stage.DECODE for other in active)
        return self.held(rank, active) + record.decode_bytes <= self.budget

    def held(self, rank: int, active: Iterable[RequestRecord]) -> int:
        """Bytes of states on a rank."""
        return sum(
            other.state_bytes + (other.decode_bytes if other.stage is Stage.DECODE and other.decode_rank == rank else 0)
            for other in active
        )

    def _largest(self, params: ResolvedParams) -> ResolvedParams | None:
        """The same with as many frames as fit."""
        assert self.budget is not None
        frames = params.num_frames
        while frames > 1:
            frames = max(self.card.frames_for((frames - 2) / params.fps, params.fps), 1)
            smaller = msgspec.structs.replace(params, num_frames=frames)
            if self.card.state_bytes(smaller, "decode") <= self.budget:
                return smaller
        return None
