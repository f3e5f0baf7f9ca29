"""Who is to blame for a failed item or a lost worker group, and what is done about it. Knows no ranks and no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from runtime.protocol import Decode, Denoise, Encode
from runtime.running import request_ids

OUT_OF_MEMORY = "out_of_memory"
CHECKPOINT_UNUSABLE = "checkpoint_unusable"

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


class Verdict(Enum):
    """What becomes of the requests of a failed item; all but the first start again."""

    FAILS = auto()
    WITHOUT_CHECKPOINT = auto()
    """From the first step on."""
    IN_SMALLER_BATCHES = auto()
    ALONE = auto()
    """In items of their own: the next failure is their own."""
    SOLE = auto()
    """While nothing else holds memory on the ranks."""


def judge(item: Encode | Denoise | Decode, code: str, num_active: int) -> Verdict:
    """Of an item that failed while the ranks held the states of so many requests, its own among them."""
    batch = len(request_ids(item))
    if code == CHECKPOINT_UNUSABLE:
        return Verdict.WITHOUT_CHECKPOINT
    if batch > 1:
        return Verdict.IN_SMALLER_BATCHES if code == OUT_OF_MEMORY and isinstance(item, Denoise) else Verdict.ALONE
    # Beside the states of others it may have been the last straw; a sole one has nobody beside it.
    return Verdict.SOLE if code == OUT_OF_MEMORY and num_active > 1 else Verdict.FAILS
