"""Predicted seconds for a unit of work: FLOPs or pixels over a rate that every finished item refines.

A unit is one request (encode), one step (denoise) or one chunk of frames (decode). Knows no queue and no policy.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from runtime.layout import Layout
from runtime.models.card import Card
from runtime.sampling import ResolvedParams

SMOOTHING = 0.3
"""Weight of the newest measurement."""


@dataclass
class CostModel:
    """First guess: work / rate of the kind; once a shape was measured, its own moving average."""

    card: Card
    rates: dict[str, float] = field(default_factory=lambda: {"encode": 10.0, "denoise": 2e10, "decode": 4e5})
    """Work per second and rank: requests, floating-point operations, pixels."""
    _measured: dict[Hashable, float] = field(default_factory=dict)

    def predict(self, kind: str, params: ResolvedParams, layout: Layout) -> float:
        """Seconds for one unit."""
        known = self._measured.get(self._key(kind, params, layout))
        return known if known is not None else self._work(kind, params, layout) / self.rates[kind]

    def observe(self, kind: str, params: ResolvedParams, layout: Layout, units: int, seconds: float) -> None:
        """Learn from a finished item of `units` units."""
        if seconds <= 0 or units < 1:
            return
        key, per_unit = self._key(kind, params, layout), seconds / units
        self._measured[key] = _blend(self._measured.get(key, per_unit), per_unit)
        self.rates[kind] = _blend(self.rates[kind], self._work(kind, params, layout) / per_unit)

    def _work(self, kind: str, params: ResolvedParams, layout: Layout) -> float:
        if kind == "denoise":
            return self.card.step_flops(params) / layout.num_ranks
        if kind == "decode":
            chunks = self.card.decode_chunks(params)
            return params.height * params.width * sum(chunks) / len(chunks)
        return 1.0

    def _key(self, kind: str, params: ResolvedParams, layout: Layout) -> Hashable:
        if kind == "encode":
            return kind
        return (kind, self.card.batch_key(params, 0), layout if kind == "denoise" else None)


def _blend(old: float, new: float) -> float:
    return old + SMOOTHING * (new - old)
