"""Nonsense on the wire is dropped and counted, costs no memory and fills no log; what is accepted has bounds."""

from __future__ import annotations

import math
import time

import msgspec
import psutil
import pytest
import structlog
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bench.fuzz import DIRECTIONS, REASONS, Damage, full, messages_of, run
from runtime import wire
from runtime.bounds import MAX_ID_CHARS, MAX_PROMPT_CHARS, MAX_REQUESTS
from runtime.errors import PeerGone
from runtime.layout import Layout
from runtime.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Completed,
    Decode,
    Denoise,
    Done,
    Drain,
    Encode,
    Fence,
    FramesChunk,
    FromScheduler,
    GatewayHello,
    Grant,
    Heartbeat,
    ItemFailed,
    Measurement,
    MeshState,
    ModelInfo,
    Observe,
    Progress,
    Ready,
    Request,
    Status,
    Stored,
    Submit,
    SupervisorHello,
    ToScheduler,
    Welcome,
    WorkerHello,
)
from runtime.wire import Channel, Codec

PATIENCE_S = 10.0
HEAD = msgspec.msgpack.encode((PROTOCOL_VERSION, 0))
FREE = (Status, Progress, Completed)
"""What a scheduler tells: nobody computes with these numbers, they are shown."""


def parse(union, *frames):
    codec = Codec(union)
    received = codec.parse([memoryview(frame) for frame in frames], b"peer")
    assert (received is None) == (codec.dropped.malformed + codec.dropped.wrong_version == 1)
    return received


def numbers(value):
    """Every number of a message, those of a model's configs left out: no code of ours computes with them."""
    match value:
        case bool() | str() | bytes() | None:
            return
        case int() | float():
            yield value
        case msgspec.Struct():
            for name in value.__struct_fields__:
                if name != "configs":
                    yield from numbers(getattr(value, name))
        case dict():
            for item in value.values():
                yield from numbers(item)
        case _:
            for item in value:
                yield from numbers(item)


def check_sane(message):
    if not isinstance(message, FREE):
        assert all(math.isfinite(number) and -1000 <= number < 2**63 for number in numbers(message)), message
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) is not None


def test_twenty_thousand_damaged_messages():
    process = psutil.Process()
    before = process.memory_info().rss
    *_, (accepted, tally) = run(20_000, seed=2, seen=check_sane)
    assert accepted > 1000, "damage that leaves nothing whole tests only the first check"
    assert set(tally.reasons) == set(REASONS), "every kind of fault was met, and each has a name"
    assert process.memory_info().rss - before < 50e6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_same_seed_is_the_same_nonsense(direction):
    first, second = Damage(7), Damage(7)
    assert [first.frames(direction) for _ in range(200)] == [second.frames(direction) for _ in range(200)]


UNIONS = st.sampled_from(list(DIRECTIONS.values()))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
TREES = st.recursive(SCALARS, lambda leaf: st.lists(leaf, max_size=4), max_leaves=6)
TAGS = st.sampled_from([kind.__name__ for union in DIRECTIONS.values() for kind in messages_of(union)])


@settings(max_examples=500, deadline=None, derandomize=True)
@given(union=UNIONS, frames=st.lists(st.binary(max_size=80), min_size=0, max_size=52))
def test_any_bytes(union, frames):
    parse(union, *frames)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(union=UNIONS, tag=TAGS, fields=st.lists(TREES, max_size=9), extra=st.lists(st.binary(max_size=3), max_size=2))
def test_any_values_behind_a_good_tag(union, tag, fields, extra):
    received = parse(union, HEAD, msgspec.msgpack.encode([tag, *fields]), *extra)
    if received is not None:
        check_sane(received.message)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(union=UNIONS, head=TREES)
def test_any_envelope(union, head):
    received = parse(union, msgspec.msgpack.encode(head), msgspec.msgpack.encode(Drain()))
    assert received is None or 0 <= received.epoch < 2**63


# ---- bounds ------------------------------------------------------------------------------------------------------


def leaves(tree, path=()):
    """(path, value) of every scalar."""
    items = enumerate(tree) if isinstance(tree, list) else tree.items() if isinstance(tree, dict) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        if key != "configs":
            yield from leaves(value, (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


def fields_of(kind):
    """(message as a tree, path, value) of every scalar in a message with every field set."""
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(full(kind)))
    return [(tree, path, value) for path, value in leaves(tree) if path != (0,)]


CHECKED = [(u, k) for u in DIRECTIONS.values() for k in messages_of(u) if k not in FREE]


@pytest.mark.parametrize(("union", "kind"), CHECKED, ids=lambda v: getattr(v, "__name__", ""))
def test_no_number_of_any_message_is_without_bounds(union, kind):
    for tree, path, value in fields_of(kind):
        assert parse(union, HEAD, msgspec.msgpack.encode(tree)) is not None
        nasty = {int: (2**63, -(2**63), -1001, 0.5), float: (math.nan, math.inf, -math.inf, -1e20, 1e20)}
        for bad in nasty.get(type(value), ()):
            body = msgspec.msgpack.encode(replaced(tree, path, bad))
            assert parse(union, HEAD, body) is None, (path, bad)


REQUEST, MODEL, MEASUREMENT = full(Request), full(ModelInfo), full(Measurement)


def changed(kind, **fields):
    return replace(full(kind), **fields)


def submit(**fields):
    return Submit((replace(REQUEST, **fields),))


def submit_params(**fields):
    return submit(params=replace(REQUEST.params, **fields))


NONSENSE = {
    "negative credits": Grant(-1),
    "credits of a flood": Grant(10**7),
    "a gateway with negative credits": GatewayHello("ipc:///x", -1),
    "an endpoint of a megabyte": GatewayHello("x" * 10**6, 1),
    "rank -1": changed(Heartbeat, rank=-1),
    "a hello of rank -1": changed(WorkerHello, rank=-1),
    "a mesh of no ranks": changed(WorkerHello, num_ranks=0),
    "generation -1": changed(WorkerHello, generation=-1),
    "a negative pid": changed(Heartbeat, pid=-1),
    "item -2": changed(ItemFailed, seq=-2),
    "done with item -1": changed(Done, seq=-1),
    "an end that is NaN": changed(Done, finished=math.nan),
    "a start at infinity": changed(Done, started=math.inf),
    "a negative budget": changed(Ready, memory_budget=-1),
    "a cost of NaN": changed(Ready, measurements=(replace(MEASUREMENT, seconds=math.nan),)),
    "a cost of a kind that there is not": changed(Ready, measurements=(replace(MEASUREMENT, kind="tea"),)),
    "a layout of zero ranks": changed(Ready, model=replace(MODEL, layout=Layout(0, 1, 1))),
    "a timeout of NaN": submit(timeout_s=math.nan),
    "a negative timeout": submit(timeout_s=-1.0),
    "a drain for ever and a day": Drain(math.inf),
    "a priority above all": submit(priority=2**40),
    "attempt -1": submit(attempt=-1),
    "an id of a megabyte": submit(id="x" * 10**6),
    "a key of a megabyte": submit(key="x" * 10**6),
    "a negative token": submit(token_ids={"text_encoder": {"prompt": (1, -5)}}),
    "a million encoders": submit(token_ids={str(n): {} for n in range(1000)}),
    "no steps": submit_params(num_inference_steps=0),
    "a billion steps": submit_params(num_inference_steps=10**9),
    "a seed below 0": submit_params(seed=-1),
    "guidance that is NaN": submit_params(guidance_scale=math.nan),
    "no height": submit_params(height=0),
    "a width of a million": submit_params(width=10**6),
    "frames without end": submit_params(num_frames=10**9),
    "0 frames a second": submit_params(fps=0),
    "a book as a prompt": submit_params(prompt="x" * (MAX_PROMPT_CHARS + 1)),
    "a million requests": Submit((REQUEST,) * (MAX_REQUESTS + 1)),
    "a cancel of a megabyte": Cancel("x" * 10**6),
    "a reason of a megabyte": Cancel("id", "x" * 10**6),
    "an id above the limit": Stored("x" * (MAX_ID_CHARS + 1)),
    "a prefix of a megabyte": Observe("x" * 10**6),
    "a host of a megabyte": SupervisorHello("x" * 10**6),
    "a chunk of no frames": changed(FramesChunk, count=0),
    "a chunk of -1 frames": changed(FramesChunk, count=-1, height=-1),
    "a chunk before the first": changed(FramesChunk, first_frame=-1),
    "a frame of no width": changed(FramesChunk, width=0),
    "a chunk whose size overflows": changed(FramesChunk, count=2**62),
    "timings that are NaN": changed(FramesChunk, timings={"decode": math.nan}),
    "a fence of everybody": changed(Fence, pid=0),
    "a fence of init": changed(Fence, pid=1),
    "a fence of a group": changed(Fence, pid=-7),
    "a denoise of no steps": changed(Denoise, steps=0),
    "a denoise for ever": changed(Denoise, steps=2**40),
    "a decode of no chunks": changed(Decode, chunks=0),
    "an encode for rank -1": changed(Encode, ranks=(-1,)),
    "an epoch before time": Welcome(-1),
    "a mesh of -1 ranks": changed(MeshState, num_ranks=-1),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_that_is_well_formed(name):
    message = NONSENSE[name]
    union = next(u for u in DIRECTIONS.values() if type(message) in messages_of(u))
    assert parse(union, HEAD, msgspec.msgpack.encode(full(type(message)))) is not None
    assert parse(union, HEAD, msgspec.msgpack.encode(message)) is None


def test_the_limits_themselves_are_taken():
    longest = submit(id="x" * MAX_ID_CHARS, timeout_s=0.0, priority=-1000)
    for message in (longest, submit_params(seed=2**63 - 1, prompt="ü" * MAX_PROMPT_CHARS), Grant(0), Drain(1e18)):
        assert parse(ToScheduler, HEAD, msgspec.msgpack.encode(message)).message == message


@pytest.mark.parametrize("header", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"])
def test_a_promise_of_four_billion_elements_allocates_nothing(header):
    before = psutil.Process().memory_info().rss
    for union in DIRECTIONS.values():
        for kind in messages_of(union):
            for at in range(1, 8):
                head = msgspec.msgpack.encode(list(range(15)))[:1] + msgspec.msgpack.encode(kind.__name__)
                assert parse(union, HEAD, head + b"\x00" * at + header) is None
    assert psutil.Process().memory_info().rss - before < 20e6


# ---- logs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def flooded(tmp_path_factory):
    """A server and a peer that sends nothing good."""
    server = Channel.bind(f"ipc://{tmp_path_factory.mktemp('s')}/socket", ToScheduler)
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.setsockopt(zmq.IDENTITY, b"vandal")
    peer.connect(server.endpoint)
    yield server, peer
    peer.close()
    server.close()


def drain(server, marker):
    until = time.monotonic() + PATIENCE_S
    while server.receive(max(until - time.monotonic(), 0)).message != marker:
        pass


def send_garbage(peer, count, marker):
    for _ in range(count):
        peer.send_multipart([HEAD, b"garbage"])
    peer.send_multipart([HEAD, msgspec.msgpack.encode(marker)])


def test_a_flood_of_garbage_is_one_line(flooded):
    server, peer = flooded
    with structlog.testing.capture_logs() as lines:
        send_garbage(peer, 5000, Grant(1))
        drain(server, Grant(1))
    assert server.dropped.malformed == 5000
    assert [(line["sender"], line["held_back"]) for line in lines] == [(b"vandal", 0)]


def test_a_flood_that_lasts_is_summed_up(flooded, monkeypatch):
    monkeypatch.setattr(wire, "COMPLAIN_EVERY_S", 0.2)
    server, peer = flooded
    started = time.monotonic()
    with structlog.testing.capture_logs() as lines:
        while len(lines) < 3:
            assert time.monotonic() - started < PATIENCE_S
            send_garbage(peer, 100, Grant(2))
            drain(server, Grant(2))
    assert len(lines) <= 1 + (time.monotonic() - started) / 0.2
    told = len(lines) + sum(line["held_back"] for line in lines)
    assert 200 < told <= server.dropped.malformed
    assert all(line["held_back"] > 0 for line in lines[1:])


def test_a_new_name_with_every_message_does_not_help():
    codec = Codec(ToScheduler)
    with structlog.testing.capture_logs() as lines:
        for number in range(10_000):
            assert codec.parse([memoryview(b"garbage")], b"vandal-%d" % number) is None
    assert codec.dropped.malformed == 10_000
    assert len(lines) <= wire.MAX_COMPLAINED_OF + 1


def test_a_line_is_short_whatever_was_sent():
    codec = Codec(ToScheduler)
    with structlog.testing.capture_logs() as lines:
        for body in (msgspec.msgpack.encode(["T" * 10**6]), msgspec.msgpack.encode({"k" * 10**6: 1})):
            codec.parse([memoryview(HEAD), memoryview(body)], body[:1])
    assert len(lines) == 2
    assert all(len(repr(line)) < 1000 for line in lines)


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The limits in kilobytes instead of megabytes."""
    monkeypatch.setattr(wire, "MAX_CONTROL_BYTES", 64_000)
    monkeypatch.setattr(wire, "MAX_FRAMES_BYTES", 256_000)


def test_the_control_socket_takes_less_than_the_frames_socket(small, tmp_path_factory):
    for union, message, fits, too_much in (
        (ToScheduler, Grant(1), 60_000, 70_000),
        (FramesChunk, full(FramesChunk), 250_000, 260_000),
    ):
        server = Channel.bind(f"ipc://{tmp_path_factory.mktemp('s')}/socket", union)
        body = msgspec.msgpack.encode(message)
        with zmq.Context.instance().socket(zmq.DEALER) as peer, zmq.Context.instance().socket(zmq.DEALER) as other:
            for socket in (peer, other):
                socket.linger = 0
                socket.connect(server.endpoint)
            peer.send_multipart([HEAD, body, bytes(fits)])
            assert server.receive(PATIENCE_S).payload.nbytes == fits
            peer.send_multipart([HEAD, body, bytes(too_much)])
            assert server.receive(0.3) is None
            other.send_multipart([HEAD, body])
            assert server.receive(PATIENCE_S).payload is None, "everybody else goes on"
        server.close()


def test_what_no_peer_would_take_is_not_sent(small, tmp_path_factory):
    server = Channel.bind(f"ipc://{tmp_path_factory.mktemp('s')}/socket", ToScheduler)
    client = Channel.connect(server.endpoint, FromScheduler, b"client")
    with pytest.raises(PeerGone, match=r"a Cancel of 70\d\d\d bytes .* is more than any peer takes"):
        client.send(Cancel("x" * 70_000))
    with pytest.raises(PeerGone, match="payload of 256001"):
        client.send(Grant(1), payload=bytes(256_001))
    client.send(Grant(2))
    assert server.receive(PATIENCE_S).message == Grant(2)
    client.close()
    server.close()


def test_a_ready_with_the_largest_tokenizers_fits():
    """Gemma's tokenizer is the largest of the families to come: 34 MB of JSON."""
    big = replace(MODEL.tokenizers[0], json="x" * 40_000_000)
    frames = Codec(FromScheduler).frames(Ready(0, 0, replace(MODEL, tokenizers=(big,))), None)
    assert len(frames[1]) < wire.MAX_CONTROL_BYTES < wire.MAX_FRAMES_BYTES
    assert parse(ToScheduler, *frames).message.model.tokenizers == (big,)
