"""API keys as an operator writes them down, never the key itself, and their shares. Knows no HTTP and keeps nothing.

A line is ``NAME:SHA256`` with options behind it, e.g. ``alice:9f86…0a08:rate=60/minute:concurrent=4``. In a file, empty
lines and lines that begin with ``#`` say nothing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.errors import InvalidInput

NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
DIGEST = re.compile(r"[0-9a-f]{64}")
RATE = re.compile(r"([1-9]\d{0,6}) ?/ ?(second|minute|hour|day)")
WEIGHT = re.compile(r"\d{1,4}(\.\d{1,4})?")
SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
PREFIX = "fm-"
"""Of the keys that we make, so that a leaked one is recognized."""


@dataclass(frozen=True)
class Rate:
    """At most `amount` in any `seconds`."""

    amount: int
    seconds: int


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key: its owner's name, its SHA-256, and limits that differ from everybody's."""

    name: str
    digest: bytes
    rate: Rate | None = None
    concurrent: int | None = None
    """Most requests that it may have unfinished."""


def new_key() -> str:
    """A key that nobody guesses."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """What is kept of a key. It is random and long: a plain hash tells nothing of it."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def line_for(name: str, secret: str) -> str:
    """The line that lets a key in.

    Raises:
        InvalidInput: the name cannot stand in one.
    """
    _check_name(name)
    return f"{name}:{digest_of(secret).hex()}"


def parse_rate(field: str, word: str) -> Rate:
    """``60/minute``, also per second, hour or day.

    Raises:
        InvalidInput: it is none.
    """
    match = RATE.fullmatch(word)
    if match is None:
        raise InvalidInput(field, f'{word!r} is no rate; write it as "60/minute" (or second, hour, day)')
    return Rate(int(match[1]), SECONDS[match[2]])


def parse_weights(field: str, words: Iterable[str]) -> dict[str, float]:
    """Shares of keys by name, of words ``alice=2``.

    Raises:
        InvalidInput: names the word; a key has two shares.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not NAME.fullmatch(name) or not WEIGHT.fullmatch(value) or not float(value):
            raise InvalidInput(field, f"{word!r} is not NAME=WEIGHT with a weight above 0 and below 10000, as alice=2")
        if name in weights:
            raise InvalidInput(field, f"gives {name} two weights")
        weights[name] = float(value)
    return weights


def parse_keys(field: str, lines: Iterable[str]) -> tuple[ApiKey, ...]:
    """The keys of a file or a setting.

    Raises:
        InvalidInput: names the line; never shows what is in it, which may be a key that was put there by mistake.
    """
    said = ((number, line.strip()) for number, line in enumerate(lines, 1))
    keys = [_parse_line(f"{field} (line {number})", line) for number, line in said if line and line[0] != "#"]
    for values, what in (([key.name for key in keys], "name"), ([key.digest for key in keys], "key")):
        if len(set(values)) < len(values):
            raise InvalidInput(field, f"holds the same {what} twice")
    return tuple(keys)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file; blocks.

    Raises:
        InvalidInput: it cannot be read, others than its owner can read it, or a line is wrong.
    """
    try:
        mode, text = stat.S_IMODE(path.stat().st_mode), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("api_keys_file", f"{path} cannot be read: {error}") from error
    if mode & 0o077:
        raise InvalidInput("api_keys_file", f"{path} has mode {mode:o}, so that others can read it; chmod 600 it")
    return parse_keys("api_keys_file", text.splitlines())


def _parse_line(field: str, line: str) -> ApiKey:
    name, _, rest = line.partition(":")
    digest, *options = rest.split(":")
    if not DIGEST.fullmatch(digest) or not NAME.fullmatch(name):
        raise InvalidInput(field, "is not NAME:SHA256; `framemesh apikey NAME` makes such a line")
    key = ApiKey(name, bytes.fromhex(digest))
    for option in options:
        key = _with_option(field, key, option)
    return key


def _with_option(field: str, key: ApiKey, option: str) -> ApiKey:
    name, _, value = option.partition("=")
    readers: dict[str, Callable[[], ApiKey]] = {
        "rate": lambda: replace(key, rate=parse_rate(field, value)),
        "concurrent": lambda: replace(key, concurrent=_parse_count(field, value)),
    }
    if name not in readers:
        raise InvalidInput(field, f"has an unknown option; there are {' and '.join(readers)}")
    return readers[name]()


def _parse_count(field: str, word: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", word):
        raise InvalidInput(field, f"{word!r} is no number of requests; take 1 or more")
    return int(word)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidInput("name", f"{name!r} cannot name a key; take 1 to 64 letters, digits or . _ @ -")
