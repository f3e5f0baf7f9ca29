"""The trace of work items: a JSON line per item and rank, appended, so that a scheduler's death loses none."""

from __future__ import annotations

from pathlib import Path

import msgspec

from runtime.protocol import Decode, Denoise, Done, Encode


class TraceLine(msgspec.Struct, frozen=True):
    """One item on one rank."""

    epoch: int
    """Of the scheduler: `seq` begins anew with each."""
    rank: int
    seq: int
    started: float
    """Of the rank's monotonic clock, seconds."""
    finished: float
    kind: str
    """The class of the item."""
    units: int
    """Steps of a denoise, chunks of a decode."""
    requests: dict[str, int]
    """Id -> the step, or the chunk, that the item began with."""


class Trace:
    """Owns the file."""

    def __init__(self, path: Path, epoch: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._epoch = epoch

    def close(self) -> None:
        self._file.close()

    def note(self, done: Done, item: Encode | Denoise | Decode, steps: dict[str, int]) -> None:
        """`steps`: where each request of the item was when it began."""
        match item:
            case Encode():
                units, requests = 0, {request.id: steps.get(request.id, 0) for request in item.requests}
            case Denoise():
                units, requests = item.steps, {name: steps.get(name, 0) for name in item.request_ids}
            case Decode():
                units, requests = item.chunks, {item.request_id: item.first_chunk}
        kind = type(item).__name__
        line = TraceLine(self._epoch, done.rank, done.seq, done.started, done.finished, kind, units, requests)
        self._file.write(msgspec.json.encode(line) + b"\n")


def read_trace(path: Path) -> list[TraceLine]:
    """In the order of their ends; a torn last line is left out."""
    decoder = msgspec.json.Decoder(TraceLine)
    return [decoder.decode(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
