"""An item that ranks work on, from its start to the last rank's report. Knows no policy and no time."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.protocol import Decode, Denoise, Encode


@dataclass
class Running:
    """An item that ranks work on."""

    item: Encode | Denoise | Decode
    started: float
    predicted_s: float
    waiting: set[int]
    seconds: float = 0.0
    failure: tuple[str, str] | None = None
    alone: bool = False
    """No other item runs beside it."""
    measured: bool = False
    """The prediction comes from items of this very kind, shape and batch."""
    peak_bytes: int = 0
    """Of the fullest rank that has reported."""
    payer: bytes = b""
    """The gateway whose credits a decode spent; its request may be another's since."""


def request_ids(item: Encode | Denoise | Decode) -> tuple[str, ...]:
    """Whose work it is."""
    match item:
        case Encode():
            return tuple(request.id for request in item.requests)
        case Denoise():
            return item.request_ids
        case Decode():
            return (item.request_id,)
