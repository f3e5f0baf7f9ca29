"""What a mesh did since its scheduler started, in counters and buckets. Pure arithmetic: knows no clock.

Its size is bounded whatever happens: a handful of kinds, and as many accounts as `MOST_ACCOUNTS`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from runtime.predictions import item_size
from runtime.protocol import Buckets, Decode, Denoise, Encode, Totals

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0)
BATCH_SIZES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0, 5.0)
"""Of a prediction, over the measured time."""
MOST_ACCOUNTS = 200
OTHER_ACCOUNTS = "(others)"


class Histogram:
    """Values by the first bound that they do not exceed."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    @property
    def buckets(self) -> Buckets:
        return Buckets(self._bounds, tuple(self._counts), self._total)


@dataclass
class Tally:
    """The scheduler's own books."""

    rank_seconds: dict[str, float] = field(default_factory=dict)
    """By account."""
    _steps: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    _batches: Histogram = field(default_factory=lambda: Histogram(BATCH_SIZES))
    _errors: dict[str, Histogram] = field(default_factory=dict)

    def item(self, item: Encode | Denoise | Decode, seconds: float, predicted_s: float) -> None:
        """An item is over that took so long."""
        kind, units, batch = item_size(item)
        if isinstance(item, Denoise):
            self._steps.add(seconds / units, units)
            self._batches.add(batch)
        if seconds > 0:
            self._errors.setdefault(kind, Histogram(ERRORS)).add(abs(predicted_s - seconds) / seconds)

    def charge(self, account: str, rank_seconds: float) -> None:
        if account not in self.rank_seconds and len(self.rank_seconds) >= MOST_ACCOUNTS:
            account = OTHER_ACCOUNTS
        self.rank_seconds[account] = self.rank_seconds.get(account, 0.0) + rank_seconds

    @property
    def totals(self) -> Totals:
        errors = {kind: histogram.buckets for kind, histogram in self._errors.items()}
        return Totals(self._steps.buckets, self._batches.buckets, errors, dict(self.rank_seconds))
