"""What ranks do in passing, without a report: forget states, write checkpoints. Knows no order and no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from runtime.protocol import Checkpoint, Release
from runtime.request import RequestRecord


@dataclass
class Errands:
    """Collected while events come in, sent before the next item."""

    _ended: list[str] = field(default_factory=list)
    _starting_again: list[str] = field(default_factory=list)
    _due: list[str] = field(default_factory=list)
    _being_written: set[str] = field(default_factory=set)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is due or being written."""
        return bool(self._due or self._being_written)

    def ended(self, request_id: str) -> None:
        """Its state and its checkpoints can go."""
        self._ended.append(request_id)

    def starts_again(self, request_id: str) -> None:
        """Its state can go, its checkpoints are what it starts from."""
        self._starting_again.append(request_id)

    def save(self, request_id: str) -> None:
        """It is due for a checkpoint."""
        self._due.append(request_id)

    def saved(self, request_id: str) -> None:
        """Its checkpoint is written, or could not be."""
        self._being_written.discard(request_id)

    def group_lost(self) -> None:
        """The states are gone, and what was being written; the files of those that ended are still there."""
        self._starting_again.clear()
        self._due.clear()
        self._being_written.clear()

    def items(
        self, active: Mapping[str, RequestRecord], ranks: tuple[int, ...], next_seq: Callable[[], int]
    ) -> Iterator[Release | Checkpoint]:
        """All of it, in an order that forgets nothing which is still to be written."""
        if self._starting_again:
            yield Release(next_seq(), ranks, tuple(self._starting_again), keep_saved=True)
            self._starting_again.clear()
        if self._ended:
            yield Release(next_seq(), ranks, tuple(self._ended))
            self._ended.clear()
        due = tuple(request_id for request_id in self._due if request_id in active)
        self._due.clear()
        if due:
            for request_id in due:
                active[request_id].saved_upto = active[request_id].step
            self._being_written.update(due)
            # Every rank has the same state; the first one writes it.
            yield Checkpoint(next_seq(), ranks[:1], due)
