"""Where the meshes of a gateway are, in words: NAME=SCHEDULER[,SCHEDULER…]. Opens no socket."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from runtime.errors import InvalidInput
from runtime.keys import LOOPBACK

_PLACE = re.compile(r"(?:(?P<name>.+?)=)?(?P<schedulers>(?:ipc|tcp)://.+)")
FORM = "NAME=SCHEDULER[,SCHEDULER…], such as demo=tcp://10.0.0.1:5555,tcp://10.0.0.2:5555"


@dataclass(frozen=True)
class Place:
    """The meshes of one model."""

    name: str
    """Under which clients know the model."""
    schedulers: tuple[str, ...]
    """Endpoints, one for each replica."""


def read_places(field: str, words: Iterable[str], unnamed: str = "") -> tuple[Place, ...]:
    """The models in the order in which they are named first; `unnamed` is the model of what has no name.

    Raises:
        InvalidInput: names the field; a word is of another form, or a scheduler is named twice.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        match = _PLACE.fullmatch(word)
        if match is None or not (match["name"] or unnamed):
            raise InvalidInput(field, f"{word!r} is not of the form {FORM}")
        found.setdefault(match["name"] or unnamed, []).extend(match["schedulers"].split(","))
    everywhere = [url for schedulers in found.values() for url in schedulers]
    twice = next((url for url in everywhere if everywhere.count(url) > 1), None)
    if twice is not None:
        raise InvalidInput(field, f"{twice} is named twice; a scheduler has one model")
    if not found:
        raise InvalidInput(field, f"names no mesh; take {FORM}")
    return tuple(Place(name, tuple(schedulers)) for name, schedulers in found.items())


def is_remote(endpoint: str) -> bool:
    """Whether it is, or may be, on another host."""
    url = urlsplit(endpoint)
    return url.scheme == "tcp" and url.hostname not in LOOPBACK
