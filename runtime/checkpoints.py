"""The checkpoints that an earlier life left in the spool, by request. Reads headers only; the files are the ranks'."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from runtime.log import get_logger
from runtime.protocol import SavedState

MAX_HEADER_BYTES = 1 << 20

UNCLAIMED_S = 3600.0
"""How long a checkpoint of an earlier life is kept for a gateway that hands its request in again."""

log = get_logger("checkpoints")


@dataclass
class Leftovers:
    """Checkpoints of an earlier life that wait for their requests."""

    saved: dict[str, SavedState] = field(default_factory=dict)
    until: float = math.inf
    """When whoever was to hand the requests in does not come any more."""

    def claim(self, request_id: str) -> SavedState | None:
        """The checkpoint, which is the caller's from now on."""
        return self.saved.pop(request_id, None)

    def expire(self, now: float) -> Iterable[str]:
        """The requests whose time is over; it begins with the first call."""
        if not self.saved:
            self.until = math.inf
        elif math.isinf(self.until):
            self.until = now + UNCLAIMED_S
        elif now >= self.until:
            late, self.saved, self.until = self.saved, {}, math.inf
            return late
        return ()


class _Owner(msgspec.Struct, frozen=True):
    """The part of a checkpoint's header that says whose it is; the ranks check all of it before they use one."""

    request_id: str
    step: int


def find_saved(spool: Path) -> dict[str, SavedState]:
    """The newest checkpoint of every request; a file that cannot be read is said and left alone."""
    found: dict[str, SavedState] = {}
    for path in sorted(spool.glob("*.safetensors")):
        try:
            owner, size = _owner(path), path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            log.warning("a checkpoint cannot be read", file=path.name, error=f"{type(error).__name__}: {error}")
            continue
        if owner.request_id not in found or owner.step > found[owner.request_id].step:
            found[owner.request_id] = SavedState(owner.step, str(path.absolute()), size)
    return found


def _owner(path: Path) -> _Owner:
    """From the file's first bytes: the length of a JSON header, which holds ours as text."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        metadata = json.loads(file.read(length))["__metadata__"]
    return msgspec.json.decode(metadata["framemesh"], type=_Owner)
