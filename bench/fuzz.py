"""Nonsense for the decoders: damaged messages of every kind, seeded, and what becomes of them.

Predicted: nothing but counted drops and messages within `runtime.bounds`; memory does not grow with the number of
inputs, and no input costs more than a small multiple of its own size.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil

from bench.report import machine, save
from runtime.log import setup_logging
from runtime.protocol import PROTOCOL_VERSION, FramesChunk, FromScheduler, ToScheduler
from runtime.wire import Codec

Frames = list[bytes]

DIRECTIONS: dict[str, Any] = {"ToScheduler": ToScheduler, "FromScheduler": FromScheduler, "FramesChunk": FramesChunk}
PLAIN: dict[Any, Any] = {int: 7, float: 0.25, str: "wört", bool: True, Any: {"patch": [1, 2, None], "eps": 1e-6}}
NASTY: dict[type, tuple[Any, ...]] = {
    int: (-1, 0, 1, 2, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    float: (float("nan"), float("inf"), float("-inf"), -0.0, -1.0, 1e308, 5e-324),
    str: ("", "\x00", "x" * 300, "../../etc/passwd", "\u202e", "x" * 5000),
    bool: (None, True, False),
    bytes: (b"\xff\xfe", b""),
    list: ([], [[]], [0] * 300, [-1]),
    dict: ({}, {"": None}, {str(n): n for n in range(40)}),
}
ANY_NASTY = [value for values in NASTY.values() for value in values]
HUGE_HEADERS = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
"""array32, map32, str32 and bin32 that promise 2^32 - 1 of something."""
NESTS = (b"\x91", b"\x81\xa1a", b"\x81\x90", b"\xdc\x00\x01")
RARELY = 2000
"""One input in so many is a megabyte."""

REASONS = {
    "wrong version": r"wrong protocol version",
    "frames": r"frames, at most|out of range",
    "truncated": r"truncated",
    "trailing bytes": r"trailing",
    "out of bounds": r"Expected `\w+` (of length )?[<>]=|array` of length|object` of length",
    "wrong type": r"Expected `[^`]+`(, got| or)",
    "unknown tag": r"Invalid value",
    "missing fields": r"missing required|at least",
    "too deep": r"recursion",
    "not UTF-8": r"utf-8|UTF-8|decode byte",
    "no MessagePack": r"malformed",
}


def sample(kind: Any) -> Any:
    """A value that is no default, for any type that a message's field may have."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return full(kind)
    arguments = [argument for argument in typing.get_args(kind) if argument not in {type(None), Ellipsis}]
    match typing.get_origin(kind):
        case typing.Literal:
            return arguments[0]
        case origin if origin is tuple:
            return (sample(arguments[0]),) * 2
        case origin if origin is dict:
            return {sample(arguments[0]): sample(arguments[1])}
        case _:
            return sample(arguments[0])


def full(struct: type[msgspec.Struct]) -> Any:
    """A Struct with every field set."""
    hints = typing.get_type_hints(struct)
    return struct(**{each.name: sample(hints[each.name]) for each in msgspec.structs.fields(struct)})


def messages_of(union: Any) -> tuple[type[msgspec.Struct], ...]:
    return typing.get_args(union) or (union,)


class Damage:
    """Valid messages and everything that can be done to them; one seed, one sequence."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._bodies = {
            name: [msgspec.msgpack.encode(full(kind)) for kind in messages_of(union)]
            for name, union in DIRECTIONS.items()
        }
        self._direction = ""
        self._head = msgspec.msgpack.encode((PROTOCOL_VERSION, 3))
        self._ways: list[Callable[[], Frames]] = [
            *(self._valid, self._noise, self._many_frames, self._other_envelope),
            *[lambda: [self._head, self._bytes_changed()]] * 3,
            *[lambda: [self._head, self._value_changed()]] * 5,
        ]

    def frames(self, direction: str) -> Frames:
        """The frames of one message, the sender's identity left out; now and then of another direction."""
        self._direction = direction if self.random.randrange(20) else self.random.choice(list(DIRECTIONS))
        if self.random.randrange(RARELY) == 0:
            return [self._head, self._megabyte()]
        return self.random.choice(self._ways)()

    def _body(self) -> bytes:
        return self.random.choice(self._bodies[self._direction])

    def _valid(self) -> Frames:
        payload = [self.random.randbytes(self.random.randrange(200))] * self.random.randrange(2)
        return [self._head, self._body(), *payload]

    def _noise(self) -> Frames:
        return [self.random.randbytes(self.random.randrange(60)) for _ in range(self.random.randrange(1, 5))]

    def _many_frames(self) -> Frames:
        return [self._head, self._body(), *([self.random.randbytes(3)] * self.random.randrange(51))]

    def _other_envelope(self) -> Frames:
        values = (*NASTY[int], *NASTY[float], PROTOCOL_VERSION)
        head = msgspec.msgpack.encode([self.random.choice(values) for _ in range(self.random.randrange(4))])
        return [head, self._body()]

    def _bytes_changed(self) -> bytes:
        body, draw = bytearray(self._body()), self.random
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(body) + 1)
            match draw.randrange(7):
                case 0 if at < len(body):
                    body[at] ^= 1 << draw.randrange(8)
                case 1:
                    del body[at:]
                case 2:
                    body[at:at] = draw.randbytes(draw.randrange(1, 5))
                case 3:
                    other = self._body()
                    body[at:] = other[draw.randrange(len(other)) :]
                case 4:
                    body[at : at + 1] = draw.choice(HUGE_HEADERS)
                case 5:
                    body[at : at + 1] = draw.choice(NESTS) * draw.choice((1, 5, 2000))
                case _:
                    body[at : at + draw.randrange(4)] = b"\xa4\xff\xfe\xc3\x28"
        return bytes(body)

    def _value_changed(self) -> bytes:
        """Well-formed, with one or two values that nobody expects there; now and then a field more or less."""
        tree = msgspec.msgpack.decode(self._body())
        for _ in range(self.random.randrange(1, 3)):
            tree = self._with_nasty(tree)
        return msgspec.msgpack.encode(tree)

    def _with_nasty(self, tree: Any) -> Any:
        draw = self.random
        if isinstance(tree, list) and tree and draw.randrange(12):
            tree = list(tree)
            # The tag in front is left alone mostly: behind it the fields are looked at.
            at = draw.randrange(1 if len(tree) > 1 and draw.randrange(12) else 0, len(tree))
            tree[at] = self._with_nasty(tree[at])
            return tree if draw.randrange(12) else tree[: draw.randrange(len(tree) + 1)]
        if isinstance(tree, dict) and tree and draw.randrange(4):
            key = draw.choice(list(tree))
            return {**tree, key: self._with_nasty(tree[key])}
        return draw.choice(NASTY.get(type(tree), ANY_NASTY) if draw.randrange(4) else ANY_NASTY)

    def _megabyte(self) -> bytes:
        tree = msgspec.msgpack.decode(self._body())
        big: Any = self.random.choice(("x" * 1_000_000, [None] * 1_000_000, b"\x00" * 1_000_000))
        tree[self.random.randrange(1, len(tree)) if len(tree) > 1 else 0] = big
        return msgspec.msgpack.encode(tree)


@dataclass
class Tally:
    """Takes the place of a codec's complaints: counts reasons instead of writing lines."""

    reasons: Counter[str] = field(default_factory=Counter)

    def tell(self, event: str, sender: bytes, **facts: object) -> None:
        text = f"{event} {facts.get('error', '')}"
        self.reasons[next((name for name, words in REASONS.items() if re.search(words, text)), text[:80])] += 1


def run(inputs: int, seed: int, seen: Callable[[Any], None] = lambda message: None) -> Iterator[tuple[int, Tally]]:
    """Give each decoder its share of the inputs; yields (accepted, tally) of the three together, now and then.

    Raises:
        AssertionError: an input was neither accepted nor counted as dropped.
    """
    tally, accepted, damage = Tally(), 0, Damage(seed)
    codecs = [Codec[Any, Any](union) for union in DIRECTIONS.values()]
    names = list(DIRECTIONS)
    for codec in codecs:
        codec.complaints = tally
    for number in range(1, inputs + 1):
        which = number % len(codecs)
        frames = damage.frames(names[which])
        received = codecs[which].parse([memoryview(frame) for frame in frames], b"peer")
        if received is not None:
            accepted += 1
            seen(received.message)
        if number % 10_000 == 0 or number == inputs:
            dropped = sum(each.dropped.malformed + each.dropped.wrong_version for each in codecs)
            assert accepted + dropped == number == accepted + sum(tally.reasons.values())
            yield accepted, tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    setup_logging("fuzz", "error")
    where = machine()
    for _ in run(20_000, args.seed + 1):
        pass
    before = psutil.Process().memory_info().rss
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    for result in run(args.inputs, args.seed):
        accepted, tally = result
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "inputs": args.inputs,
        "seed": args.seed,
        "exceptions": 0,
        "accepted": accepted,
        "rejected": args.inputs - accepted,
        "rejected_by_reason": dict(tally.reasons.most_common()),
        "inputs_per_second": round(args.inputs / seconds),
        "rss_before_mb": round(before / 1e6, 1),
        "rss_growth_mb": round((psutil.Process().memory_info().rss - before) / 1e6, 1),
        "peak_rss_growth_mb": round((max(peak, peak_before) - before) / 1e6, 1),
    }
    save("fuzz", where, figures)


if __name__ == "__main__":
    main()
