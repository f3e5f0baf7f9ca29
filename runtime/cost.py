"""Predicted seconds for a unit of work: FLOPs or pixels over a rate, and a fixed part per launch, both fitted.

A unit is one request (encode), one step (denoise) or one chunk of frames (decode; the first chunk has other sizes
than the rest, and is a kind of its own: first_decode). ETA, item length, batch budget and
the order of requests all read this one model. Knows no queue and no policy.

    seconds(kind, shape, batch) = fixed[kind] + batch * work(shape) / rate[kind]

until that very (kind, shape, batch) was measured; from then on its own moving average. `layout` is always the one
that the unit really runs on: a step on other ranks, or a decode shared by several, has lines and figures of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median

import msgspec

from runtime.layout import Layout
from runtime.models.card import Card
from runtime.sampling import ResolvedParams

SMOOTHING = 0.2
"""Weight of the newest measurement."""
FORGETTING = 0.98
"""Weight of the fit's past after each new measurement."""
KEPT_ERRORS = 256


class Line(msgspec.Struct):
    """A weighted least-squares line y = fixed + slope * x, refined point by point; never negative."""

    fixed: float
    slope: float
    weight: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x

    def add(self, x: float, y: float) -> None:
        self.weight = FORGETTING * self.weight + 1.0
        share = 1.0 / self.weight
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += share * dx
        self.mean_y += share * dy
        self.xx = FORGETTING * self.xx + dx * (x - self.mean_x)
        self.xy = FORGETTING * self.xy + dx * (y - self.mean_y)
        spread = self.xx > 1e-6 * self.weight * self.mean_x**2
        # One shape alone tells no slope; keep the fixed part's share of the first guess and scale the line.
        slope = self.xy / self.xx if spread else self.slope * self.mean_y / self.at(self.mean_x)
        self.slope = min(max(slope, 0.0), self.mean_y / self.mean_x)
        self.fixed = max(self.mean_y - self.slope * self.mean_x, 0.0)


class Constants(msgspec.Struct):
    """What was learnt; saved per model, machine and layout."""

    lines: dict[str, Line]
    """Per kind, and per kind and layout: seconds over work per rank (requests, floating-point operations, pixels)."""
    measured: dict[str, float] = {}
    """Seconds per unit of each (kind, shape, batch) that was seen."""

    @staticmethod
    def first_guess() -> Constants:
        lines = {"encode": Line(0.01, 0.05), "denoise": Line(0.002, 5e-11), "decode": Line(0.002, 2.5e-6)}
        lines["first_decode"] = Line(0.002, 2.5e-6)
        return Constants(lines)


@dataclass
class CostModel:
    """Analytic form by the family's card, constants fitted by every finished item."""

    card: Card
    constants: Constants = field(default_factory=Constants.first_guess)
    _errors: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_ERRORS))
    _work_cache: dict[Hashable, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Constants of a file that is older than a kind.
        self.constants.lines = Constants.first_guess().lines | self.constants.lines

    def predict(self, kind: str, params: ResolvedParams, layout: Layout, batch: int = 1) -> float:
        """Seconds for one unit of `batch` requests together."""
        known = self.constants.measured.get(self._key(kind, params, layout, batch))
        if known is not None:
            return known
        seconds = self.fitted(kind, params, layout, batch)
        alone = self.constants.measured.get(self._key(kind, params, layout, 1)) if batch > 1 else None
        # A shape whose single step is known: only how it grows with the batch has to be guessed.
        return seconds if alone is None else alone * seconds / self.fitted(kind, params, layout, 1)

    def measured(self, kind: str, params: ResolvedParams, layout: Layout, batch: int = 1) -> bool:
        """Whether this very unit was seen before."""
        return self._key(kind, params, layout, batch) in self.constants.measured

    def fitted(self, kind: str, params: ResolvedParams, layout: Layout, batch: int) -> float:
        """The same by the line alone, whatever was measured for this very shape."""
        return self._line(kind, layout).at(batch * self._work(kind, params, layout))

    def observe(
        self, kind: str, params: ResolvedParams, layout: Layout, units: int, seconds: float, batch: int = 1
    ) -> None:
        """Learn from a finished item of `units` units."""
        if seconds <= 0 or units < 1:
            return
        key, per_unit = self._key(kind, params, layout, batch), seconds / units
        known = self.constants.measured.get(key)
        self.constants.measured[key] = per_unit if known is None else known + SMOOTHING * (per_unit - known)
        lines, name = self.constants.lines, kind + _place(kind, layout)
        if name not in lines or not lines[name].weight:
            guess = self._line(kind, layout)
            lines[name] = Line(guess.fixed, guess.slope)
        lines[name].add(batch * self._work(kind, params, layout), per_unit)

    def compare(
        self, kind: str, params: ResolvedParams, layout: Layout, units: int, seconds: float, batch: int = 1
    ) -> None:
        """What a finished item took, before it is learnt from: was it predicted?"""
        if seconds > 0:
            predicted = units * self.predict(kind, params, layout, batch)
            self._errors.append(abs(predicted - seconds) / seconds)

    @property
    def error(self) -> float | None:
        """Median absolute error of the latest predictions over the measured time; None before the first."""
        return median(self._errors) if self._errors else None

    def _line(self, kind: str, layout: Layout) -> Line:
        """That of the layout, or before it has seen anything the one of this kind that has seen most."""
        lines = self.constants.lines
        own = lines.get(kind + _place(kind, layout))
        if own is not None and own.weight:
            return own
        return max((line for name, line in lines.items() if name.partition(" ")[0] == kind), key=lambda x: x.weight)

    def _work(self, kind: str, params: ResolvedParams, layout: Layout) -> float:
        branches = len(self.card.branches(params, 0))
        shape = (kind, params.height, params.width, params.num_frames, branches, layout.num_ranks)
        work = self._work_cache.get(shape)
        if work is None:
            work = self._work_cache[shape] = self._count_work(kind, params, layout)
        return work

    def _count_work(self, kind: str, params: ResolvedParams, layout: Layout) -> float:
        if kind == "denoise":
            return self.card.step_flops(params) / layout.num_ranks
        if kind == "encode":
            return 1.0
        first, *others = self.card.decode_chunks(params)
        frames = sum(others) / len(others) if kind == "decode" and others else first
        return params.height * params.width * frames / layout.num_ranks

    def _key(self, kind: str, params: ResolvedParams, layout: Layout, batch: int) -> str:
        if kind == "encode":
            return kind
        shape, place = f"{kind} {params.height}x{params.width}x{params.num_frames}", _place(kind, layout)
        if kind != "denoise":
            return shape + place
        return f"{shape} branches={len(self.card.branches(params, 0))}{place} batch={batch}"


def _place(kind: str, layout: Layout) -> str:
    """What of a layout tells units of this kind apart: an encode runs on all ranks, a decode on one or on all."""
    if kind == "denoise":
        return f" layout={layout.cfg},{layout.ring},{layout.ulysses}"
    return f" ranks={layout.num_ranks}" if kind != "encode" and layout.num_ranks > 1 else ""
