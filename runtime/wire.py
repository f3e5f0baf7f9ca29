"""Typed ZMQ channels: the only file that imports zmq. Owns framing, versions, epochs and endpoints; no policy.

A message on the wire is ``[envelope][body][payload?]``: the envelope is (protocol version, epoch), the body one tagged
Struct of `runtime.protocol`, the payload raw bytes (pixels) that are never copied above 64 KiB. The sender's identity
is a fresh name per process life (its incarnation), carried by ZMQ itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from runtime.errors import InvalidInput, PeerGone
from runtime.log import get_logger
from runtime.protocol import PROTOCOL_VERSION, Message

Send = TypeVar("Send", bound=Message, contravariant=True)
Recv = TypeVar("Recv", bound=Message, covariant=True)

Payload = bytes | memoryview

MAX_IPC_PATH = 107
"""sun_path of Linux, less the final NUL."""
COPY_BELOW = 64 * 1024
"""Under this many bytes a copy is cheaper than ZMQ's bookkeeping for none."""
MAX_MESSAGE_BYTES = 256 * 1024 * 1024

log = get_logger("wire")


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    version: int
    epoch: int


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


class _Decoder(Protocol[Recv]):
    def decode(self, buf: Payload, /) -> Recv: ...


def incarnation(role: str) -> bytes:
    """A name for one life of one process."""
    return f"{role}-{os.getpid()}-{secrets.token_hex(4)}".encode()


def check_endpoint(endpoint: str) -> str:
    """Refuse endpoints that ZMQ would cut short or that strangers could reach.

    Raises:
        InvalidInput: an ipc path over the system's limit, or a TCP address that is not loopback.
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
        if url.hostname not in {"127.0.0.1", "::1", "localhost"} or ";" in endpoint:
            raise InvalidInput("endpoint", f"{endpoint} is not loopback; sockets between hosts need keys")
    else:
        raise InvalidInput("endpoint", f"{endpoint} is neither ipc:// nor tcp://")
    return endpoint


class _Codec(Generic[Send, Recv]):
    """Struct <-> frames, shared by the blocking and the asyncio channel."""

    def __init__(self, receives: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._body: _Decoder[Recv] = msgspec.msgpack.Decoder(receives)
        self._envelope = msgspec.msgpack.Decoder(_Envelope)
        self.epoch = 0
        self.dropped = Dropped()

    def frames(self, message: Message, payload: Payload | None) -> list[Any]:
        head = self._encoder.encode(_Envelope(PROTOCOL_VERSION, self.epoch))
        frames: list[Any] = [head, self._encoder.encode(message)]
        if payload is not None:
            view = memoryview(payload)
            frames.append(zmq.Frame(view, copy=view.nbytes < COPY_BELOW))
        return frames

    def parse(self, frames: list[zmq.Frame], *, routed: bool) -> Received[Recv] | None:
        """None for what has to be dropped; it is counted and logged, never raised."""
        sender = bytes(frames.pop(0).buffer) if routed else b""
        try:
            envelope = self._envelope.decode(frames[0].buffer)
            if envelope.version != PROTOCOL_VERSION:
                self.dropped.wrong_version += 1
                log.warning("dropped: wrong protocol version", sender=sender, theirs=envelope.version)
                return None
            message = self._body.decode(frames[1].buffer)
            if len(frames) > 3:
                raise msgspec.DecodeError(f"{len(frames)} frames, at most 3 make a message")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError) as error:
            self.dropped.malformed += 1
            log.warning("dropped: malformed message", sender=sender, error=str(error))
            return None
        payload = frames[2].buffer if len(frames) > 2 else None
        return Received(sender, envelope.epoch, message, payload)


class Channel(Generic[Send, Recv]):
    """A blocking channel. `bind` makes the many-peers end (ROUTER), `connect` the one-peer end (DEALER)."""

    def __init__(self, socket: zmq.Socket[bytes], receives: Any, *, routed: bool, endpoint: str) -> None:
        self._socket = socket
        self._codec: _Codec[Send, Recv] = _Codec(receives)
        self._routed = routed
        self.endpoint = endpoint

    @classmethod
    def bind(cls, endpoint: str, receives: Any) -> Self:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        return cls(socket, receives, routed=True, endpoint=_bind(socket, endpoint))

    @classmethod
    def connect(cls, endpoint: str, receives: Any, identity: bytes) -> Self:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _connect(socket, endpoint, identity)
        return cls(socket, receives, routed=False, endpoint=endpoint)

    @property
    def dropped(self) -> Dropped:
        return self._codec.dropped

    def set_epoch(self, epoch: int) -> None:
        self._codec.epoch = epoch

    def send(self, message: Send, *, to: bytes | None = None, payload: Payload | None = None) -> None:
        """Never waits.

        Raises:
            PeerGone: the peer is unknown, or its queue is full.
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
            received = self._codec.parse(self._socket.recv_multipart(copy=False), routed=self._routed)
            if received is not None:
                return received
        return None

    def close(self, linger_s: float = 0.0) -> None:
        _close(self._socket, self.endpoint if self._routed else None, linger_s)


class AsyncChannel(Generic[Send, Recv]):
    """The same on an asyncio loop."""

    def __init__(self, socket: zmq.asyncio.Socket, receives: Any, *, routed: bool, endpoint: str) -> None:
        self._socket = socket
        self._codec: _Codec[Send, Recv] = _Codec(receives)
        self._routed = routed
        self.endpoint = endpoint

    @classmethod
    def bind(cls, endpoint: str, receives: Any) -> Self:
        socket: Any = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        return cls(socket, receives, routed=True, endpoint=_bind(socket, endpoint))

    @classmethod
    def connect(cls, endpoint: str, receives: Any, identity: bytes) -> Self:
        socket: Any = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        _connect(socket, endpoint, identity)
        return cls(socket, receives, routed=False, endpoint=endpoint)

    @property
    def dropped(self) -> Dropped:
        return self._codec.dropped

    def set_epoch(self, epoch: int) -> None:
        self._codec.epoch = epoch

    async def send(self, message: Send, *, to: bytes | None = None) -> None:
        """Never waits for a peer.

        Raises:
            PeerGone: the peer is unknown, or its queue is full.
        """
        frames = self._codec.frames(message, None)
        try:
            await self._socket.send_multipart([to, *frames] if to is not None else frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerGone(f"{to!r}: {error}") from error

    async def receive(self) -> Received[Recv]:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            received = self._codec.parse(list(frames), routed=self._routed)
            if received is not None:
                return received

    def close(self) -> None:
        _close(self._socket, self.endpoint if self._routed else None, 0.0)


def _bind(socket: Any, endpoint: str) -> str:
    """Bind, and the address that peers connect to (TCP port 0 becomes the real one)."""
    with _closed_on_error(socket):
        check_endpoint(endpoint)
        _set_common(socket)
        # A silent drop of a message to a peer that is gone or slow would lose a request; make it an error.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise InvalidInput("endpoint", f"cannot listen on {endpoint}: {error}") from error
    if endpoint.startswith("ipc://"):
        os.chmod(endpoint.removeprefix("ipc://"), 0o600)
    address: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)
    return address.rstrip(b"\0").decode()


def _connect(socket: Any, endpoint: str, identity: bytes) -> None:
    with _closed_on_error(socket):
        check_endpoint(endpoint)
        _set_common(socket)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.connect(endpoint)


@contextlib.contextmanager
def _closed_on_error(socket: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        socket.close()
        raise


def _set_common(socket: Any) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 10_000)
    socket.setsockopt(zmq.RCVHWM, 10_000)


def _close(socket: Any, bound: str | None, linger_s: float) -> None:
    socket.close(linger=int(linger_s * 1000))
    if bound is not None and bound.startswith("ipc://"):
        # ZMQ's io thread unlinks late or, after a crash of ours, never.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(bound.removeprefix("ipc://"))
