"""The wire: what arrives is what was sent, and whatever else arrives is dropped, counted and harmless."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fuzz import DIRECTIONS, full, messages_of
from runtime import protocol
from runtime.errors import InvalidInput, PeerGone
from runtime.layout import Layout
from runtime.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Drain,
    Encode,
    FramesChunk,
    FromScheduler,
    Grant,
    Message,
    ModelInfo,
    Ready,
    Request,
    Submit,
    TokenizerExport,
    ToScheduler,
    Welcome,
)
from runtime.sampling import ResolvedParams
from runtime.wire import COPY_BELOW, MAX_IPC_PATH, AsyncChannel, Channel, check_endpoint, incarnation

PATIENCE_S = 10.0
QUIET_S = 0.05

PARAMS = ResolvedParams(
    prompt="a cat, “schön” 中文",
    negative_prompt="",
    num_inference_steps=4,
    guidance_scale=3.5,
    seed=2**63 - 1,
    height=64,
    width=96,
    num_frames=17,
    fps=8,
)
MODEL = ModelInfo(
    name="demo",
    model_path="some/where",
    configs={"transformer": {"patch_size": [1, 2, 2], "image_dim": None, "eps": 1e-6, "nested": {"a": True}}},
    tokenizers=(TokenizerExport("text_encoder", '{"model": {}}', 512),),
    dit_precision="bf16",
    vae_precision="fp32",
    device="cuda",
    layout=Layout(2, 1, 4),
)
REQUEST = Request("r1", PARAMS, {"text_encoder": {"prompt": (5, 6, 1), "negative_prompt": (1,)}}, attempt=2)


@pytest.fixture
def endpoint(tmp_path_factory):
    return f"ipc://{tmp_path_factory.mktemp('s')}/socket"


@pytest.fixture
def server(endpoint):
    channel = Channel.bind(endpoint, ToScheduler)
    yield channel
    channel.close()


@pytest.fixture
def client(server):
    channel = Channel.connect(server.endpoint, FromScheduler, b"client")
    yield channel
    channel.close()


@pytest.fixture
def stranger(server):
    """A peer that does not speak our language."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, b"stranger")
    socket.connect(server.endpoint)
    yield socket
    socket.close()


def envelope(version=PROTOCOL_VERSION, epoch=0):
    return msgspec.msgpack.encode((version, epoch))


def body(message=None):
    return msgspec.msgpack.encode(message or Grant(1))


# ---- what is sent arrives ----------------------------------------------------------------------------------------


def test_every_message_has_a_direction():
    ours = {t for t in vars(protocol).values() if isinstance(t, type) and issubclass(t, Message)} - {Message}
    assert ours == {message for union in DIRECTIONS.values() for message in messages_of(union)}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_message_round_trips(direction, tmp_path_factory):
    union = DIRECTIONS[direction]
    receiver = Channel.bind(f"ipc://{tmp_path_factory.mktemp('s')}/socket", union)
    sender = Channel.connect(receiver.endpoint, FromScheduler, b"peer")
    sender.set_epoch(11)
    try:
        for message_type in messages_of(union):
            message = full(message_type)
            sender.send(message)
            received = receiver.receive(PATIENCE_S)
            assert (received.sender, received.epoch, received.payload) == (b"peer", 11, None)
            assert type(received.message) is message_type
            assert received.message == message
        assert (receiver.dropped.malformed, receiver.dropped.wrong_version) == (0, 0)
    finally:
        sender.close()
        receiver.close()


def test_a_message_of_the_other_direction_is_malformed(server, client):
    client.send(Welcome(3))
    client.send(Drain())
    assert server.receive(PATIENCE_S).message == Drain()
    assert server.dropped.malformed == 1


def test_both_ways_and_in_order(server, client):
    for number in range(200):
        client.send(Grant(number))
    assert [server.receive(PATIENCE_S).message.credits for _ in range(200)] == list(range(200))
    for number in range(200):
        server.send(Encode(number, (0, 1), (REQUEST,)), to=b"client")
    assert [client.receive(PATIENCE_S).message.seq for _ in range(200)] == list(range(200))
    assert client.receive(0) is None


@pytest.mark.parametrize("size", [0, 1, COPY_BELOW - 1, COPY_BELOW, COPY_BELOW + 1, 5_000_000])
def test_a_payload_arrives_intact(server, client, size):
    header = Cancel("header", "of a payload")
    payload = os.urandom(size)
    client.send(header, payload=memoryview(payload))
    client.send(Drain())
    received = server.receive(PATIENCE_S)
    assert (received.message, bytes(received.payload)) == (header, payload)
    assert server.receive(PATIENCE_S).payload is None


def test_a_payload_outlives_the_messages_after_it(server, client):
    first, second = os.urandom(200_000), os.urandom(200_000)
    client.send(Drain(), payload=first)
    held = server.receive(PATIENCE_S)
    client.send(Drain(), payload=second)
    assert bytes(server.receive(PATIENCE_S).payload) == second
    assert bytes(held.payload) == first


def test_the_epoch_is_told_and_not_judged(server, client):
    for epoch in (0, 5, 2**62):
        client.set_epoch(epoch)
        client.send(Drain())
        assert server.receive(PATIENCE_S).epoch == epoch


def test_receive_waits_as_long_as_it_was_told(server):
    started = time.monotonic()
    assert server.receive(0.1) is None
    assert 0.09 <= time.monotonic() - started < 2
    started = time.monotonic()
    assert server.receive(0) is None
    assert time.monotonic() - started < 0.05


# ---- what else arrives is dropped --------------------------------------------------------------------------------

DEEP = b"\x94\xa5Ready\x00\x00" + msgspec.msgpack.encode(MODEL).replace(
    b"\xa6nested\x81\xa1a", b"\xa6nested\x81\xa1a" + b"\x91" * 9000
)

GARBAGE = {
    "no frames but one empty": [b""],
    "an envelope alone": [envelope()],
    "an empty body": [envelope(), b""],
    "text": [b"GET / HTTP/1.1", b"Host: x"],
    "a truncated envelope": [envelope()[:-1], body()],
    "an envelope of another shape": [msgspec.msgpack.encode({"version": PROTOCOL_VERSION}), body()],
    "a truncated body": [envelope(), body(Submit((REQUEST,)))[:-3]],
    "bytes after the body": [envelope(), body() + b"\x00"],
    "an unknown tag": [envelope(), msgspec.msgpack.encode(("Pickle", "x"))],
    "a wrong type": [envelope(), msgspec.msgpack.encode(("Grant", "three"))],
    "a missing field": [envelope(), msgspec.msgpack.encode(("Done", 0, 1))],
    "no UTF-8": [envelope(), b"\x93\xa6Cancel\xa2\xff\xfe\xa0"],
    "a tag that is no UTF-8": [envelope(), b"\x92\xa5\xff\xff\xff\xff\xff\x01"],
    "a nested bomb": [envelope(), DEEP],
    "a length without content": [envelope(), b"\x92\xa6Submit\xdd\xff\xff\xff\xff"],
    "a frame too many": [envelope(), body(), b"payload", b"extra"],
    "many frames": [envelope(), body(), *[b""] * 50],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_dropped_and_counted_and_the_channel_goes_on(server, client, stranger, name):
    stranger.send_multipart(GARBAGE[name])
    stranger.send_multipart([envelope(), body(Grant(5))])
    received = server.receive(PATIENCE_S)
    assert (received.sender, received.message) == (b"stranger", Grant(5))
    assert (server.dropped.malformed, server.dropped.wrong_version) == (1, 0)
    client.send(Drain())
    assert server.receive(PATIENCE_S).message == Drain()


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, 0, -1, 2**40])
def test_another_version_is_dropped_and_counted_whatever_its_body(server, stranger, version):
    stranger.send_multipart([envelope(version), body()])
    stranger.send_multipart([envelope(version), b"from the future"])
    stranger.send_multipart([envelope(), body(Grant(6))])
    assert server.receive(PATIENCE_S).message == Grant(6)
    assert (server.dropped.malformed, server.dropped.wrong_version) == (0, 2)


def test_a_field_that_a_later_release_appended_is_ignored(server, stranger):
    stranger.send_multipart([envelope(), msgspec.msgpack.encode(("Grant", 7, "new"))])
    assert server.receive(PATIENCE_S).message == Grant(7)


def test_waiting_for_ever_outlasts_garbage(server, stranger):
    """Callers that give no time rely on getting a message."""
    received = []
    waiter = threading.Thread(target=lambda: received.append(server.receive()), daemon=True)
    waiter.start()
    stranger.send_multipart([b"garbage"])
    waiter.join(QUIET_S)
    stranger.send_multipart([envelope(), body(Grant(8))])
    waiter.join(PATIENCE_S)
    assert [r.message for r in received if r is not None] == [Grant(8)]


def test_garbage_does_not_end_a_wait_early(server, stranger):
    started = time.monotonic()
    stranger.send_multipart([b"garbage"])
    assert server.receive(0.3) is None
    assert time.monotonic() - started > 0.28
    assert server.dropped.malformed == 1


def test_a_client_survives_garbage_too(endpoint):
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.bind(endpoint)
    client = Channel.connect(endpoint, FromScheduler, b"client")
    try:
        client.send(Drain())
        assert router.recv_multipart()[0] == b"client"
        for frames in ([b""], [b"garbage"], [envelope(9), b""], [envelope(), body(Drain())]):
            router.send_multipart([b"client", *frames])
        router.send_multipart([b"client", envelope(epoch=4), body(Welcome(4))])
        assert client.receive(PATIENCE_S).message == Welcome(4)
        assert (client.dropped.malformed, client.dropped.wrong_version) == (3, 1)
    finally:
        client.close()
        router.close()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A server and a stranger that live through all examples."""
    server = Channel.bind(f"ipc://{tmp_path_factory.mktemp('s')}/socket", ToScheduler)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(server.endpoint)
    yield server, stranger
    stranger.close()
    server.close()


VALID = [body(full(message)) for message in messages_of(ToScheduler)]


@st.composite
def damaged(draw):
    """A valid body with a byte changed, cut off or put in."""
    whole = bytearray(draw(st.sampled_from(VALID)))
    at = draw(st.integers(0, len(whole) - 1))
    match draw(st.sampled_from(["change", "cut", "insert"])):
        case "change":
            whole[at] = draw(st.integers(0, 255))
        case "cut":
            del whole[at:]
        case "insert":
            whole[at:at] = draw(st.binary(max_size=4))
    return bytes(whole)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    frames=st.one_of(
        st.lists(st.binary(max_size=40), min_size=1, max_size=5),
        st.tuples(st.just(envelope()), st.one_of(damaged(), st.binary(max_size=60))),
        st.tuples(st.binary(max_size=6), st.just(body())),
    )
)
def test_no_bytes_make_receive_raise(fuzzed, frames):
    server, stranger = fuzzed
    before = server.dropped.malformed + server.dropped.wrong_version
    stranger.send_multipart(list(frames))
    stranger.send_multipart([envelope(), body(Grant(424242))])
    received = [server.receive(PATIENCE_S)]
    while received[-1].message != Grant(424242):
        received.append(server.receive(PATIENCE_S))
    dropped = server.dropped.malformed + server.dropped.wrong_version - before
    assert len(received) + dropped == 2
    assert all(isinstance(r.message, Message) for r in received)


# ---- peers and endpoints -----------------------------------------------------------------------------------------


def test_an_unknown_peer_is_gone(server, client):
    with pytest.raises(PeerGone, match="nobody"):
        server.send(Welcome(1), to=b"nobody")
    client.send(Drain())
    assert server.receive(PATIENCE_S) is not None
    server.send(Welcome(1), to=b"client")
    assert client.receive(PATIENCE_S).message == Welcome(1)


def test_a_peer_that_left_is_gone(server):
    client = Channel.connect(server.endpoint, FromScheduler, b"leaver")
    client.send(Drain())
    server.receive(PATIENCE_S)
    client.close()
    assert raises_soon(PeerGone, lambda: server.send(Welcome(1), to=b"leaver"))


def raises_soon(error, action):
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            action()
        except error:
            return True
        time.sleep(0.005)
    return False


def test_send_never_waits_for_a_server_that_is_not_there(endpoint):
    client = Channel.connect(endpoint, FromScheduler, b"early")
    client.send(Grant(1))
    server = Channel.bind(endpoint, ToScheduler)
    assert server.receive(PATIENCE_S).message == Grant(1)
    client.close()
    server.close()


def test_a_socket_is_private_and_gone_after_close(endpoint):
    path = endpoint.removeprefix("ipc://")
    server = Channel.bind(endpoint, ToScheduler)
    mode = os.stat(path).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    server.close()
    assert not os.path.exists(path)
    server = Channel.bind(endpoint, ToScheduler)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    server.close()


def test_a_client_does_not_remove_the_socket(server):
    Channel.connect(server.endpoint, FromScheduler, b"client").close()
    time.sleep(QUIET_S)
    assert os.path.exists(server.endpoint.removeprefix("ipc://"))


LONGEST = "ipc:///" + "x" * (MAX_IPC_PATH - 1)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        (LONGEST + "x", "has 108 bytes, the system allows 107"),
        (LONGEST[:-1] + "ö", "has 108 bytes"),
        ("tcp://0.0.0.0:5555", "not loopback"),
        ("tcp://*:5555", "not loopback"),
        ("tcp://10.1.2.3:5555", "not loopback"),
        ("tcp://localhost.example.com:5555", "not loopback"),
        ("tcp://127.0.0.1@example.com:5555", "not loopback"),
        ("tcp://127.0.0.1:0;example.com:5555", "not loopback"),
        ("tcp://[::]:5555", "not loopback"),
        ("inproc://here", "neither ipc"),
        ("/just/a/path", "neither ipc"),
        ("", "neither ipc"),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda e: Channel.bind(e, ToScheduler), lambda e: Channel.connect(e, ToScheduler, b"a")]
)
def test_endpoints_that_are_refused(make, endpoint, words):
    with pytest.raises(InvalidInput, match=words) as refusal:
        make(endpoint)
    assert refusal.value.field == "endpoint"


@pytest.mark.parametrize("endpoint", [LONGEST, "tcp://127.0.0.1:5555", "tcp://localhost:1", "tcp://[::1]:5555"])
def test_endpoints_that_are_taken(endpoint):
    assert check_endpoint(endpoint) == endpoint


def test_the_limit_of_ipc_paths_is_the_systems(tmp_path_factory, monkeypatch):
    """107 bytes work, and it is ZMQ that cannot do 108."""
    monkeypatch.chdir(tmp_path_factory.mktemp("s"))
    server = Channel.bind("ipc://" + "y" * MAX_IPC_PATH, ToScheduler)
    server.close()
    with zmq.Context.instance().socket(zmq.DEALER) as socket, pytest.raises(zmq.ZMQError):
        socket.bind("ipc://" + "y" * (MAX_IPC_PATH + 1))


def test_a_free_tcp_port_is_told():
    server = Channel.bind("tcp://127.0.0.1:0", ToScheduler)
    client = Channel.connect(server.endpoint, FromScheduler, b"client")
    client.send(Drain())
    assert server.receive(PATIENCE_S).message == Drain()
    with pytest.raises(InvalidInput, match="cannot listen on"):
        Channel.bind(server.endpoint, ToScheduler)
    client.close()
    server.close()


def test_every_life_of_a_process_has_a_name_of_its_own():
    names = {incarnation("worker0") for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(b"worker0-%d-" % os.getpid()) for name in names)


# ---- the asyncio channel -----------------------------------------------------------------------------------------


def test_the_async_channel_keeps_the_same_promises(endpoint, tmp_path_factory):
    pixels = os.urandom(COPY_BELOW * 3)

    async def talk():
        server = AsyncChannel.bind(endpoint, ToScheduler)
        client = AsyncChannel.connect(endpoint, FromScheduler, b"client")
        frames = AsyncChannel.bind(f"ipc://{tmp_path_factory.mktemp('s')}/frames", FramesChunk)
        worker = Channel.connect(frames.endpoint, ToScheduler, b"worker")
        stranger = zmq.Context.instance().socket(zmq.DEALER)
        stranger.connect(endpoint)
        try:
            assert stat.S_IMODE(os.stat(endpoint.removeprefix("ipc://")).st_mode) == 0o600
            client.set_epoch(5)
            await client.send(Submit((REQUEST,)))
            received = await server.receive()
            assert (received.sender, received.epoch, received.message) == (b"client", 5, Submit((REQUEST,)))
            await server.send(Welcome(9), to=b"client")
            assert (await client.receive()).message == Welcome(9)
            with pytest.raises(PeerGone):
                await server.send(Welcome(9), to=b"nobody")
            for garbage in GARBAGE.values():
                stranger.send_multipart(garbage)
            stranger.send_multipart([envelope(PROTOCOL_VERSION + 1), body()])
            stranger.send_multipart([envelope(), body(Grant(3))])
            assert (await server.receive()).message == Grant(3)
            assert (server._codec.dropped.malformed, server._codec.dropped.wrong_version) == (len(GARBAGE), 1)
            worker.send(full(FramesChunk), payload=pixels)
            chunk = await frames.receive()
            assert (chunk.message, bytes(chunk.payload)) == (full(FramesChunk), pixels)
        finally:
            stranger.close(linger=0)
            for channel in (worker, frames, client, server):
                channel.close()

    asyncio.run(asyncio.wait_for(talk(), PATIENCE_S))
    assert not os.path.exists(endpoint.removeprefix("ipc://"))


def test_a_refused_async_endpoint_leaves_nothing_open():
    async def refuse():
        for make in (AsyncChannel.bind, lambda e, r: AsyncChannel.connect(e, r, b"x")):
            with pytest.raises(InvalidInput):
                make("tcp://10.0.0.1:1", Ready)

    asyncio.run(refuse())
