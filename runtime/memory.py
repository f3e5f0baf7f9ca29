"""Bytes that requests hold on a rank, against the rank's budget. Knows no order and no time."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from runtime.models.card import Card
from runtime.request import RequestRecord
from runtime.sampling import ResolvedParams

GIB = 1 << 30
GRID = 32
"""Every family takes sides that are multiples of this many pixels."""


@dataclass
class MemoryLedger:
    """The sum of `state_bytes` on any rank never exceeds the budget.

    Every active request holds its denoise state on every rank. A request is admitted only if, beside all those, the
    open decodes and the largest decode among them would still fit: so one decode can always go on, and nothing waits
    for itself. One that ran out of memory all the same, beside the states of others, is admitted when the ranks hold
    nothing, and nobody after it until it has left.

    States that have to wait are not parked in the host's memory. What fills a rank is not the state but the cache of an
    open decode, which is never moved: of Wan 2.1 14B, 81 frames, a state is 52 MiB at 480p and 94 MiB at 720p, and its
    decode adds 4.6 and 10.5 GiB. Parking would free a percent.
    """

    card: Card
    budget: int | None = None
    """Bytes per rank; None until the ranks have told."""
    _states: int = 0
    """Bytes of states on every rank."""
    _decode_sizes: list[int] = field(default_factory=list)
    """What a decode of each holder adds, sorted."""
    _open: dict[int, dict[str, int]] = field(default_factory=dict)
    """Open decodes by rank and request, bytes."""
    _sole: str | None = None
    """The request that has all the memory to itself."""

    def measure(self, record: RequestRecord) -> None:
        """Fill in what the request holds while it denoises, and what a decode adds on its rank."""
        record.state_bytes, record.decode_bytes = self._bytes(record.request.params)

    def refusal(self, record: RequestRecord) -> str | None:
        """Why this request could never run, and what would; None if it can."""
        need = record.state_bytes + record.decode_bytes
        if self.budget is None or need <= self.budget:
            return None
        offers = self._offers(record.request.params)
        advice = f"{offers} would fit" if offers else "no size of this model would fit"
        return f"it needs {need / GIB:.3g} GiB on a rank, {self.budget / GIB:.3g} GiB are free for requests; {advice}"

    def advice(self, record: RequestRecord, kind: str) -> str:
        """What would need less memory than a request that ran out of it though it should have fitted."""
        levers = {
            "encode": "a text encoder in bf16 (--text-encoder-precisions bf16) needs half",
            "denoise": "more ranks share its activations (--ulysses-degree)",
            "first_decode": "--vae-tiling decodes tile by tile",
            "decode": "--vae-tiling decodes tile by tile",
        }
        params = record.request.params
        offers = MemoryLedger(self.card, sum(self._bytes(params)) // 2)._offers(params)
        return f"{offers} need half as much; {levers[kind]}" if offers else levers[kind]

    def admits(self, record: RequestRecord, beside: Sequence[RequestRecord] = ()) -> bool:
        """Whether a queued request may get a state now, after others that are to get theirs with it."""
        newcomers = [record, *beside]
        crowded = self._decode_sizes or beside
        if self._sole is not None or (crowded and any(r.sole for r in newcomers)):
            return False
        if self.budget is None:
            return True
        decodes = [sum(opened.values()) for opened in self._open.values()]
        most = max([*(r.decode_bytes for r in newcomers), *self._decode_sizes[-1:], *decodes])
        return self._states + sum(r.state_bytes for r in newcomers) + most <= self.budget

    def may_open_decode(self, record: RequestRecord, rank: int) -> bool:
        """Whether a decode may be opened on a rank, beside those that are open there; one at a time if in doubt."""
        if self.budget is None:
            return rank not in self._open
        return self.held(rank) + record.decode_bytes <= self.budget

    def held(self, rank: int) -> int:
        """Bytes of states on a rank."""
        return self._states + sum(self._open[rank].values()) if rank in self._open else self._states

    def enter(self, record: RequestRecord) -> None:
        """Every rank holds its state from now on."""
        self._states += record.state_bytes
        self._sole = record.id if record.sole else self._sole
        bisect.insort(self._decode_sizes, record.decode_bytes)

    def open_decode(self, record: RequestRecord, rank: int) -> None:
        self._open.setdefault(rank, {})[record.id] = record.decode_bytes

    def close_decode(self, record: RequestRecord) -> None:
        """Its last chunk left the rank, or it ends; a decode that is not open may be closed."""
        rank = record.decode_rank
        if rank in self._open:
            self._open[rank].pop(record.id, None)
            if not self._open[rank]:
                del self._open[rank]

    def leave(self, record: RequestRecord) -> None:
        """Its state is released."""
        self.close_decode(record)
        self._states -= record.state_bytes
        self._sole = None if self._sole == record.id else self._sole
        del self._decode_sizes[bisect.bisect_left(self._decode_sizes, record.decode_bytes)]

    def _bytes(self, params: ResolvedParams) -> tuple[int, int]:
        """(of the state, what a decode adds)."""
        state = self.card.state_bytes(params, "denoise")
        return state, max(self.card.state_bytes(params, "decode") - state, 0)

    def _fits(self, params: ResolvedParams) -> bool:
        assert self.budget is not None
        return sum(self._bytes(params)) <= self.budget

    def _offers(self, params: ResolvedParams) -> str:
        """What would fit instead, in words: at the same size, and with all its frames; empty if neither would."""
        # Both: where a decode's cache does not depend on the frames, few fit at full size, and all a little below it.
        fitting = filter(None, (self._fewer_frames(params), self._smaller_size(params)))
        return " or ".join(f"{p.num_frames} frames of {p.width}x{p.height}" for p in fitting)

    def _fewer_frames(self, params: ResolvedParams) -> ResolvedParams | None:
        """The same size with as many frames as fit."""
        for wished in range(params.num_frames - 1, 0, -1):
            frames = self.card.frames_for(wished / params.fps, params.fps)
            smaller = msgspec.structs.replace(params, num_frames=frames)
            if frames < params.num_frames and self._fits(smaller):
                return smaller
        return None

    def _smaller_size(self, params: ResolvedParams) -> ResolvedParams | None:
        """All its frames, in about the same shape, as large as fits."""
        for share in range(31, 0, -1):
            height, width = (side * share // 32 // GRID * GRID for side in (params.height, params.width))
            smaller = msgspec.structs.replace(params, height=height, width=width)
            if min(height, width) > 0 and self._fits(smaller):
                return smaller
        return None
