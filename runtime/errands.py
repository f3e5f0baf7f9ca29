"""What ranks do in passing, without a report: forget states, write checkpoints. Knows no order and no time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
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
    _unsure: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Releases by seq that the first rank, the writer, has not yet shown to have done."""

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is due or being written."""
        return bool(self._due or self._being_written)

    def ended(self, request_id: str) -> None:
        """Its state and its checkpoints can go."""
        if request_id in self._starting_again:
            self._starting_again.remove(request_id)
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

    def reported(self, seq: int) -> None:
        """The first rank has done this item. Its stream is ordered: what was released before is gone."""
        self._unsure = {release: ids for release, ids in self._unsure.items() if release > seq}

    def group_lost(self, requests: Container[str]) -> None:
        """The states are gone, and what was being written; files of requests that ended may still be there."""
        self._ended += [name for ids in self._unsure.values() for name in ids if name not in requests]
        self._unsure.clear()
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
            release = Release(next_seq(), ranks, tuple(self._ended))
            self._unsure[release.seq] = release.request_ids
            self._ended.clear()
            yield release
        due = tuple(request_id for request_id in dict.fromkeys(self._due) if request_id in active)
        self._due.clear()
        if due:
            for request_id in due:
                active[request_id].saved_upto = active[request_id].step
            self._being_written.update(due)
            # Every rank has the same state; the first one writes it.
            yield Checkpoint(next_seq(), ranks[:1], due)
