"""Typed ZMQ channels: the only file that imports zmq. Owns framing, versions, epochs, endpoints and CURVE; no policy.

A message on the wire is ``[envelope][body][payload?]``: the envelope is (protocol version, epoch), the body one tagged
Struct of `runtime.protocol`, the payload raw bytes (pixels) that are never copied above 64 KiB. The sender's identity
is a fresh name per process life (its incarnation), carried by ZMQ itself.

With keys (`set_keys`, once per process and before its first channel) every TCP socket speaks CURVE: a bound one lets
in whom the keys authorize, a connecting one asks for the key that belongs to the address. Without keys TCP stays on
loopback. Sockets of kind ipc are guarded by their file's mode either way. Of TCP sockets a thread counts
(`Dropped.refused`) and tells the handshakes that fail.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio
from zmq.utils import z85

from runtime.bounds import Int63
from runtime.errors import InvalidInput, PeerGone
from runtime.keys import LOOPBACK, Keys
from runtime.log import get_logger
from runtime.protocol import PROTOCOL_VERSION, FramesChunk, Message

Send = TypeVar("Send", bound=Message, contravariant=True)
Recv = TypeVar("Recv", bound=Message, covariant=True)

Payload = bytes | memoryview

MAX_IPC_PATH = 107
"""sun_path of Linux, less the final NUL."""
COPY_BELOW = 64 * 1024
"""Under this many bytes a copy is cheaper than ZMQ's bookkeeping for none."""
MAX_CONTROL_BYTES = 64 * 1024 * 1024
"""The largest control message is a Ready with its tokenizers: 17 MB for UMT5, 34 MB for Gemma."""
MAX_FRAMES_BYTES = 256 * 1024 * 1024
"""Frames that one step of a VAE decodes: eight of 8-bit RGB at 3840x2160 are 199 MB."""
HANDSHAKE_S = 3.0
"""Who has not shown a key after so long is cut off, and knocks again: how soon an added key takes effect."""
RECONNECT_S = 0.5
"""Between two attempts to join across hosts, each of which costs the server some arithmetic."""
COMPLAIN_EVERY_S = 5.0
MAX_COMPLAINED_OF = 16
"""Senders that are told apart; whoever changes its name with each message shares a line with its like."""
MAX_REASON = 300

log = get_logger("wire")


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    version: int
    epoch: Int63


@dataclass(frozen=True)
class Received(Generic[Recv]):
    """One message with who sent it; `payload` is a view that is valid while this object lives."""

    sender: bytes
    epoch: int
    message: Recv
    payload: memoryview | None = None


@dataclass
class Dropped:
    """Counts of what was not delivered to the caller, by reason."""

    malformed: int = 0
    wrong_version: int = 0
    refused: int = 0
    """Handshakes of TCP peers that failed: no key, a wrong one, or one that is not authorized."""


class _Decoder(Protocol[Recv]):
    def decode(self, buf: Payload, /) -> Recv: ...


def incarnation(role: str) -> bytes:
    """A name for one life of one process."""
    return f"{role}-{os.getpid()}-{secrets.token_hex(4)}".encode()


def new_pair() -> tuple[bytes, bytes]:
    """A new CURVE pair (public, secret), each 40 characters of Z85."""
    return zmq.curve_keypair()


def set_keys(keys: Keys | None) -> None:
    """Use these keys for every TCP socket that this process opens from now on.

    Raises:
        InvalidInput: the secret key is not that of the public one.
    """
    if keys is not None:
        check_pair(keys)
    _Process.keys = keys


def check_pair(keys: Keys) -> None:
    """Refuse a secret key that is not that of the public one."""
    if zmq.curve_public(keys.secret) != keys.own.key:
        text = f"the secret key in {keys.folder} does not belong to {keys.own.name}'s public key"
        raise InvalidInput("curve_dir", text)


class _Process:
    """What is set once per process."""

    keys: Keys | None = None
    gates: ClassVar[dict[int, _Gate]] = {}
    """By context."""
    lock = threading.Lock()


def check_endpoint(endpoint: str) -> str:
    """Refuse endpoints that ZMQ would cut short or that strangers could reach.

    Raises:
        InvalidInput: an ipc path over the system's limit, or a TCP address that is not loopback while there are no
            keys.
    """
    url = urlsplit(endpoint)
    if url.scheme == "ipc":
        path = endpoint.removeprefix("ipc://")
        if len(path.encode()) > MAX_IPC_PATH:
            raise InvalidInput(
                "endpoint",
                f"the socket path {path} has {len(path.encode())} bytes, the system allows {MAX_IPC_PATH}; "
                "set TMPDIR to a shorter folder",
            )
    elif url.scheme == "tcp":
        # After a semicolon ZMQ takes a second address, which is then the one that it connects to.
        if _Process.keys is None and (url.hostname not in LOOPBACK or ";" in endpoint):
            raise InvalidInput("endpoint", f"{endpoint} is not loopback; sockets between hosts need keys (--curve-dir)")
        if not url.hostname or url.netloc != endpoint.removeprefix("tcp://") or {";", "@"} & set(endpoint):
            raise InvalidInput("endpoint", f"{endpoint} is not of the form tcp://HOST:PORT")
    else:
        raise InvalidInput("endpoint", f"{endpoint} is neither ipc:// nor tcp://")
    return endpoint


class Complaints(Protocol):
    """Where a codec says what it dropped."""

    def tell(self, event: str, sender: bytes, **facts: object) -> None: ...


class _Complaints:
    """Log lines about peers: the first of each at once, then one every few seconds with how many were held back.

    Whoever sends garbage in a loop must not fill the disk.
    """

    def __init__(self) -> None:
        self._told: dict[bytes, tuple[float, int]] = {}

    def tell(self, event: str, sender: bytes, **facts: object) -> None:
        now = time.monotonic()
        if sender not in self._told and len(self._told) >= MAX_COMPLAINED_OF:
            recent = {name: told for name, told in self._told.items() if now - told[0] < COMPLAIN_EVERY_S}
            self._told = recent
            sender = sender if len(recent) < MAX_COMPLAINED_OF else b"(others)"
        last, held_back = self._told.get(sender, (-math.inf, 0))
        if now - last < COMPLAIN_EVERY_S:
            self._told[sender] = (last, held_back + 1)
            return
        self._told[sender] = (now, 0)
        log.warning(event, sender=sender, held_back=held_back, **facts)


class Codec(Generic[Send, Recv]):
    """Struct <-> frames, shared by the blocking and the asyncio channel."""

    def __init__(self, receives: Any) -> None:
        self.max_bytes = MAX_FRAMES_BYTES if receives is FramesChunk else MAX_CONTROL_BYTES
        self._encoder = msgspec.msgpack.Encoder()
        self._body: _Decoder[Recv] = msgspec.msgpack.Decoder(receives)
        self._envelope = msgspec.msgpack.Decoder(_Envelope)
        self.epoch = 0
        self.dropped = Dropped()
        self.complaints: Complaints = _Complaints()

    def frames(self, message: Message, payload: Payload | None) -> list[Any]:
        head = self._encoder.encode(_Envelope(PROTOCOL_VERSION, self.epoch))
        view = memoryview(payload if payload is not None else b"")
        frames: list[Any] = [head, self._encoder.encode(message)]
        if len(frames[1]) > MAX_CONTROL_BYTES or view.nbytes > MAX_FRAMES_BYTES:
            # The peer would cut the connection, and again with every repetition.
            size = f"{len(frames[1])} bytes with a payload of {view.nbytes}"
            raise PeerGone(f"a {type(message).__name__} of {size} is more than any peer takes")
        if payload is not None:
            frames.append(zmq.Frame(view, copy=view.nbytes < COPY_BELOW))
        return frames

    def parse(self, frames: Sequence[memoryview], sender: bytes) -> Received[Recv] | None:
        """None for what has to be dropped; it is counted and logged, never raised."""
        try:
            envelope = self._envelope.decode(frames[0])
            if envelope.version != PROTOCOL_VERSION:
                self.dropped.wrong_version += 1
                self.complaints.tell("dropped: wrong protocol version", sender, theirs=envelope.version)
                return None
            if len(frames) > 3:
                raise msgspec.DecodeError(f"{len(frames)} frames, at most 3 make a message")
            message = self._body.decode(frames[1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError) as error:
            self.dropped.malformed += 1
            self.complaints.tell("dropped: malformed message", sender, error=str(error)[:MAX_REASON])
            return None
        return Received(sender, envelope.epoch, message, frames[2] if len(frames) > 2 else None)


class Channel(Generic[Send, Recv]):
    """A blocking channel. `bind` makes the many-peers end (ROUTER), `connect` the one-peer end (DEALER)."""

    def __init__(self, socket: zmq.Socket[bytes], codec: Codec[Send, Recv], *, routed: bool, endpoint: str) -> None:
        self._socket = socket
        self._codec = codec
        self._routed = routed
        self.endpoint = endpoint

    @classmethod
    def bind(cls, endpoint: str, receives: Any) -> Self:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        codec: Codec[Send, Recv] = Codec(receives)
        return cls(socket, codec, routed=True, endpoint=_bind(socket, endpoint, codec))

    @classmethod
    def connect(cls, endpoint: str, receives: Any, identity: bytes) -> Self:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        codec: Codec[Send, Recv] = Codec(receives)
        _connect(socket, endpoint, identity, codec)
        return cls(socket, codec, routed=False, endpoint=endpoint)

    @property
    def dropped(self) -> Dropped:
        return self._codec.dropped

    def set_epoch(self, epoch: int) -> None:
        self._codec.epoch = epoch

    def send(self, message: Send, *, to: bytes | None = None, payload: Payload | None = None) -> None:
        """Never waits.

        Raises:
            PeerGone: the peer is unknown, its queue is full, or the message is larger than any peer takes.
        """
        frames = self._codec.frames(message, payload)
        try:
            self._socket.send_multipart([to, *frames] if to is not None else frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            raise PeerGone(f"{to!r}: {error}") from error

    def receive(self, timeout_s: float | None = None) -> Received[Recv] | None:
        """The next good message, or None when `timeout_s` passed (None waits for ever)."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while self._socket.poll(None if until is None else max(int((until - time.monotonic()) * 1000), 0)):
            received = self._codec.parse(*_opened(self._socket.recv_multipart(copy=False), routed=self._routed))
            if received is not None:
                return received
        return None

    def close(self, linger_s: float = 0.0) -> None:
        _close(self._socket, self.endpoint if self._routed else None, linger_s)


class AsyncChannel(Generic[Send, Recv]):
    """The same on an asyncio loop."""

    def __init__(self, socket: zmq.asyncio.Socket, codec: Codec[Send, Recv], *, routed: bool, endpoint: str) -> None:
        self._socket = socket
        self._codec = codec
        self._routed = routed
        self.endpoint = endpoint

    @classmethod
    def bind(cls, endpoint: str, receives: Any) -> Self:
        socket: Any = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        codec: Codec[Send, Recv] = Codec(receives)
        return cls(socket, codec, routed=True, endpoint=_bind(socket, endpoint, codec))

    @classmethod
    def connect(cls, endpoint: str, receives: Any, identity: bytes) -> Self:
        socket: Any = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        codec: Codec[Send, Recv] = Codec(receives)
        _connect(socket, endpoint, identity, codec)
        return cls(socket, codec, routed=False, endpoint=endpoint)

    @property
    def dropped(self) -> Dropped:
        return self._codec.dropped

    def set_epoch(self, epoch: int) -> None:
        self._codec.epoch = epoch

    async def send(self, message: Send, *, to: bytes | None = None) -> None:
        """Never waits for a peer.

        Raises:
            PeerGone: the peer is unknown, its queue is full, or the message is larger than any peer takes.
        """
        frames = self._codec.frames(message, None)
        try:
            await self._socket.send_multipart([to, *frames] if to is not None else frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerGone(f"{to!r}: {error}") from error

    async def receive(self) -> Received[Recv]:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            received = self._codec.parse(*_opened(frames, routed=self._routed))
            if received is not None:
                return received

    def close(self) -> None:
        _close(self._socket, self.endpoint if self._routed else None, 0.0)


def _opened(frames: Sequence[zmq.Frame], *, routed: bool) -> tuple[list[memoryview], bytes]:
    """The frames of a message, and who sent it."""
    buffers = [frame.buffer for frame in frames]
    return (buffers[1:], bytes(buffers[0])) if routed else (buffers, b"")


def _bind(socket: Any, endpoint: str, codec: Codec[Any, Any]) -> str:
    """Bind, and the address that peers connect to (TCP port 0 becomes the real one)."""
    with _closed_on_error(socket):
        check_endpoint(endpoint)
        _set_common(socket, endpoint, codec.max_bytes)
        # A silent drop of a message to a peer that is gone or slow would lose a request; make it an error.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if endpoint.startswith("tcp://"):
            if _Process.keys is not None:
                _serve_curve(socket, _Process.keys)
            _Watch(socket, endpoint, codec, _BOUND).start()
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise InvalidInput("endpoint", f"cannot listen on {endpoint}: {error}") from error
    if endpoint.startswith("ipc://"):
        os.chmod(endpoint.removeprefix("ipc://"), 0o600)
    address: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)
    return address.rstrip(b"\0").decode()


def _connect(socket: Any, endpoint: str, identity: bytes, codec: Codec[Any, Any]) -> None:
    with _closed_on_error(socket):
        check_endpoint(endpoint)
        _set_common(socket, endpoint, codec.max_bytes)
        socket.setsockopt(zmq.IDENTITY, identity)
        if endpoint.startswith("tcp://"):
            if _Process.keys is not None:
                _join_curve(socket, _Process.keys, endpoint)
            _Watch(socket, endpoint, codec, _CONNECTED).start()
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise InvalidInput("endpoint", f"cannot connect to {endpoint}: {error}") from error


@contextlib.contextmanager
def _closed_on_error(socket: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        socket.close()
        raise


def _set_common(socket: Any, endpoint: str, max_bytes: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.SNDHWM, 10_000)
    socket.setsockopt(zmq.RCVHWM, 10_000)
    if endpoint.startswith("tcp://["):
        socket.setsockopt(zmq.IPV6, 1)


def _close(socket: Any, bound: str | None, linger_s: float) -> None:
    socket.close(linger=int(linger_s * 1000))
    if bound is not None and bound.startswith("ipc://"):
        # ZMQ's io thread unlinks late or, after a crash of ours, never.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(bound.removeprefix("ipc://"))


# ---- keys between hosts ------------------------------------------------------------------------------------------

_BOUND: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "its key is not authorized here",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it has no key, or takes this host for another",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it left before it had shown a key, or nobody was there to judge the key",
}
_CONNECTED: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "this host's key is not authorized there",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one side uses keys and the other does not; start both with --curve-dir",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: (
        "the other side hung up; either this host's .pub file is not in its folder authorized, "
        "or it has another key than the one here for its address"
    ),
}


def _serve_curve(socket: Any, keys: Keys) -> None:
    _open_gate(socket.context, keys)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.key)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    # With a domain that is enforced nobody comes in while the gate is not there to ask.
    socket.setsockopt(zmq.ZAP_DOMAIN, keys.own.key)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))


def _join_curve(socket: Any, keys: Keys, endpoint: str) -> None:
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server_key(urlsplit(endpoint).hostname or ""))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.key)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.RECONNECT_IVL, int(RECONNECT_S * 1000))


def _open_gate(context: Any, keys: Keys) -> None:
    """One gate per context, as ZMQ wants it."""
    with _Process.lock:
        gate = _Process.gates.get(context.underlying)
        if gate is None or not gate.is_alive():
            _Process.gates[context.underlying] = gate = _Gate(context)
            gate.start()
        gate.keys[keys.own.key] = keys


class _Gate(threading.Thread):
    """Answers for every bound socket of a context whether a key may come in (ZAP, RFC 27)."""

    def __init__(self, context: Any) -> None:
        super().__init__(name="curve gate", daemon=True)
        self.keys: dict[bytes, Keys] = {}
        """By the domain of the socket that asks, which is its public key."""
        self._complaints = _Complaints()
        self._socket = context.socket(zmq.REP, socket_class=zmq.Socket)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")

    def run(self) -> None:
        try:
            while True:
                self._answer(*self._socket.recv_multipart())
        except zmq.ContextTerminated:
            pass
        except Exception:
            log.exception("the gate for keys broke; nobody comes in any more over TCP")
        finally:
            self._socket.close()

    def _answer(self, version: bytes, request: bytes, *rest: bytes) -> None:
        # 300 (later, perhaps) keeps the peer knocking, so that an added key takes effect; after 400 it would give up.
        code, text = (b"200", b"OK") if self._may_enter(rest) else (b"300", b"not authorized")
        self._socket.send_multipart([version, request, code, text, b"", b""])

    def _may_enter(self, rest: tuple[bytes, ...]) -> bool:
        domain, address, _, mechanism, *credentials = rest
        keys = self.keys.get(domain)
        if keys is None or mechanism != b"CURVE" or len(credentials) != 1:
            return False
        key = z85.encode(credentials[0])
        if keys.is_authorized(key):
            return True
        self._complaints.tell("refused: a key that is not authorized", address, public_key=key.decode())
        return False


class _Watch(threading.Thread):
    """Counts and tells the handshakes of one socket that fail. Ends with the socket."""

    def __init__(self, socket: Any, endpoint: str, codec: Codec[Any, Any], reasons: dict[int, str]) -> None:
        super().__init__(name=f"handshakes of {endpoint}", daemon=True)
        self._codec, self._reasons = codec, reasons
        address = f"inproc://handshakes-{secrets.token_hex(8)}"
        socket.monitor(address, sum(reasons) | zmq.EVENT_MONITOR_STOPPED)
        self._events = socket.context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._events.connect(address)

    def run(self) -> None:
        with contextlib.suppress(zmq.ContextTerminated):
            while (event := struct.unpack_from("=H", self._events.recv())[0]) != zmq.EVENT_MONITOR_STOPPED:
                endpoint = self._events.recv()
                self._codec.dropped.refused += 1
                self._codec.complaints.tell("refused: handshake failed", endpoint, reason=self._reasons[event])
        self._events.close(linger=0)
