"""Losses of the worker group: which a request explains, and when there are too many. Knows no ranks and no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SUSPECT_AFTER = 2
"""A request in whose items the group was lost so often runs alone from then on."""
GUILTY_AFTER = 3
"""The next loss is its own: it fails."""
CRASH_WINDOW_S = 300.0


@dataclass
class LossLog:
    """A crash loop is `limit` unexplained losses within the window."""

    limit: int = 3
    total: int = 0
    _unexplained: dict[int, float] = field(default_factory=dict)
    """Loss -> when."""

    def note(self, now: float) -> int:
        """A new loss; returns its number."""
        self.total += 1
        self._unexplained[self.total] = now
        return self.total

    def explain(self, losses: Iterable[int]) -> None:
        """A request was found guilty of all these. The last stays: request after request that dies so is no answer."""
        for loss in sorted(losses)[:-1]:
            self._unexplained.pop(loss, None)

    def crash_loop(self, now: float) -> bool:
        return sum(now - at < CRASH_WINDOW_S for at in self._unexplained.values()) >= self.limit
