"""Requests that wait for a state on the ranks: a line per API key, and the same by the batch that they could join."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from runtime.fairness import WaitingLine
from runtime.request import RequestRecord

_Lines = dict[str, WaitingLine]


@dataclass
class Queue:
    """Knows no ranks and no time."""

    policy: str
    _lines: _Lines = field(default_factory=dict)
    _joinable: dict[Hashable, _Lines] = field(default_factory=dict)
    """By the batch key of their next step."""

    def __contains__(self, record: RequestRecord) -> bool:
        return record.key in self._lines and record in self._lines[record.key]

    def add(self, record: RequestRecord) -> None:
        for lines in self._both(record):
            lines.setdefault(record.key, WaitingLine(self.policy)).add(record)

    def remove(self, record: RequestRecord) -> None:
        for lines in self._both(record):
            lines[record.key].remove(record)
            if not len(lines[record.key]):
                del lines[record.key]
        if not self._joinable[record.batch_key]:
            del self._joinable[record.batch_key]

    def line(self, key: str) -> WaitingLine:
        return self._lines[key]

    @property
    def num_lines(self) -> int:
        return len(self._lines)

    def firsts(self, now: float, shut: Set[bytes] = frozenset()) -> Iterator[RequestRecord]:
        """The first of each key, those left out whose gateway the door is shut for."""
        firsts = (line.first(now, shut) for line in self._lines.values())
        return (record for record in firsts if record is not None)

    def joinable(self, batch_key: Hashable) -> Mapping[str, WaitingLine]:
        """Who could join such a batch, by key."""
        return self._joinable.get(batch_key, {})

    def _both(self, record: RequestRecord) -> tuple[_Lines, _Lines]:
        return self._lines, self._joinable.setdefault(record.batch_key, {})
