"""HTTP to addresses that clients name: whom we talk to, for how long, and how much we take. Knows no jobs, no images.

A name is resolved here, its addresses are checked, and the connection goes to the very address that was checked: what
a name server says a moment later changes nothing. TLS verifies the name. Redirects take the same way. No proxy of the
environment is used, since behind one nobody checks anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2

from runtime.errors import InvalidInput

SCHEMES = ("http", "https")
MAX_URL_CHARS = 8192
"""Signed URLs of object stores are long."""
MAX_REDIRECTS = 3
CONNECT_S = 5.0
"""Patience for one address, and for the name server."""
FETCH_S = 20.0

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
CLOUD_HOSTS = (ipaddress.IPv4Network("168.63.129.16/32"),)
"""Public by number only: Azure's virtual machines reach their own host under it."""

# Threads of their own: names that are answered slowly must not hold up the files and codecs of everybody else.
_RESOLVERS = ThreadPoolExecutor(8, "dns")


class AddressRefused(httpx2.TransportError):
    """The URL leads where a client may not send us."""


class AnswerRefused(httpx2.TransportError):
    """The answer is too large, or compressed although we asked for it as it is."""


def is_public(address: str) -> bool:
    """Whether anybody on the internet could reach this IPv4 or IPv6 address as well as we can."""
    number = ipaddress.ip_address(address)
    if isinstance(number, ipaddress.IPv4Address):
        return number.is_global and not number.is_multicast and not any(number in net for net in CLOUD_HOSTS)
    carried = _carried(number)
    if carried is not None:
        return is_public(str(carried))
    return number in GLOBAL_UNICAST and number.is_global and not number.is_multicast


def _carried(number: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a mapped, NAT64 or 6to4 address stands for."""
    if number in NAT64:
        return ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    return number.ipv4_mapped or number.sixtofour


async def check_url(field: str, url: str, *, allow_private: bool = False) -> None:
    """See that we would talk to this URL now; every request checks again.

    Raises:
        InvalidInput: names the field: no http(s) URL, a name that does not resolve, or an address inside the network.
    """
    try:
        async with asyncio.timeout(CONNECT_S):
            await _addresses(_parse(url), allow_private)
    except (AddressRefused, TimeoutError) as error:
        raise InvalidInput(field, str(error) or "its name server does not answer", code="invalid_url") from error


async def fetch(
    field: str, url: str, *, allow_private: bool = False, timeout_s: float = FETCH_S, max_bytes: int
) -> bytes:
    """What lies at a URL.

    Args:
        timeout_s: for all of it, redirects included.
        max_bytes: more than that is refused, before it was read.

    Raises:
        InvalidInput: names the field and says why there is nothing.
    """
    try:
        async with asyncio.timeout(timeout_s):
            parsed = _parse(url)
            async with await open_client(
                allow_private=allow_private, timeout_s=timeout_s, max_bytes=max_bytes, max_redirects=MAX_REDIRECTS
            ) as http:
                answer = await http.get(parsed)
    except AddressRefused as error:
        raise InvalidInput(field, str(error), code="invalid_url") from error
    except TimeoutError as error:
        raise InvalidInput(field, f"took longer than {timeout_s:g} s to fetch", code="invalid_url") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:  # the second is where a redirect leads
        reason = str(error) or type(error).__name__
        raise InvalidInput(field, f"cannot be fetched: {reason}", code="invalid_url") from error
    if answer.status_code != 200:
        raise InvalidInput(field, f"cannot be fetched: it answers {answer.status_code}", code="invalid_url")
    return answer.content


async def open_client(
    *, allow_private: bool, timeout_s: float, max_bytes: int, max_redirects: int = 0
) -> httpx2.AsyncClient:
    """`client` without the trusted certificates being read in the event loop."""
    tls = await asyncio.to_thread(_default_tls)
    return client(
        allow_private=allow_private, timeout_s=timeout_s, max_bytes=max_bytes, max_redirects=max_redirects, tls=tls
    )


def client(
    *,
    allow_private: bool,
    timeout_s: float,
    max_bytes: int,
    max_redirects: int = 0,
    tls: ssl.SSLContext | None = None,
) -> httpx2.AsyncClient:
    """A client that keeps the rules of this file, whatever URL it is given.

    Args:
        allow_private: loopback and private addresses too, for tests and closed networks.
        timeout_s: for one request from the name's resolution to the last byte.
        max_bytes: of an answer's body; a larger one raises `AnswerRefused`.
        max_redirects: 0 returns a redirect as the answer that it is.
        tls: whom to trust; unset: the usual authorities.
    """
    return httpx2.AsyncClient(
        transport=_Guarded(allow_private, timeout_s, max_bytes, tls or _default_tls()),
        trust_env=False,
        timeout=httpx2.Timeout(timeout_s, connect=CONNECT_S),
        headers={"accept-encoding": "identity", "user-agent": "framemesh"},
        follow_redirects=max_redirects > 0,
        max_redirects=max_redirects,
    )


class _Guarded(httpx2.AsyncBaseTransport):
    """Resolves, checks, connects to what was checked, and counts what comes back."""

    def __init__(self, allow_private: bool, timeout_s: float, max_bytes: int, tls: ssl.SSLContext) -> None:
        self._allow_private = allow_private
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        # The pool goes by address: a connection that was opened for one name must not serve another.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._inner = httpx2.AsyncHTTPTransport(verify=tls, trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        with _as_timeout(self._timeout_s):
            async with asyncio.timeout_at(deadline):
                addresses = await _addresses(request.url, self._allow_private)
                answer = await self._try_each(request, addresses)
        if answer.headers.get("content-encoding", "identity") != "identity":
            await answer.aclose()
            raise AnswerRefused("it answers with a compressed body")
        assert isinstance(answer.stream, httpx2.AsyncByteStream)
        answer.stream = _Bounded(answer.stream, deadline, self._timeout_s, self._max_bytes)
        return answer

    async def _try_each(self, request: httpx2.Request, addresses: list[str]) -> httpx2.Response:
        for address in addresses[:-1]:
            with contextlib.suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
                return await self._inner.handle_async_request(_pinned(request, address))
        return await self._inner.handle_async_request(_pinned(request, addresses[-1]))

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Bounded(httpx2.AsyncByteStream):
    """An answer's body, as long as it keeps to its size and time."""

    def __init__(self, stream: httpx2.AsyncByteStream, deadline: float, timeout_s: float, max_bytes: int) -> None:
        self._stream = stream
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._left = max_bytes
        self._most = max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = aiter(self._stream)
        while (part := await self._next(parts)) is not None:
            self._left -= len(part)
            if self._left < 0:
                raise AnswerRefused(f"it has more than {self._most} bytes")
            yield part

    async def _next(self, parts: AsyncIterator[bytes]) -> bytes | None:
        with _as_timeout(self._timeout_s):
            async with asyncio.timeout_at(self._deadline):
                return await anext(parts, None)

    async def aclose(self) -> None:
        await self._stream.aclose()


def _parse(url: str) -> httpx2.URL:
    if len(url) > MAX_URL_CHARS:
        raise AddressRefused(f"has {len(url)} characters, at most {MAX_URL_CHARS} are taken")
    try:
        return httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise AddressRefused(f"is no URL: {error}") from error


async def _addresses(url: httpx2.URL, allow_private: bool) -> list[str]:
    """Every address of the URL's host, all of them fit to connect to."""
    if url.scheme not in SCHEMES or not url.host:
        raise AddressRefused("is not of the form http://host/path or https://host/path")
    if url.userinfo:
        raise AddressRefused("holds a user name or password; leave them out")
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, _resolve, _host(url))
    if not allow_private and not all(map(is_public, found)):
        raise AddressRefused(f"{url.host} is not an address of the public internet")
    return found


def _resolve(host: str) -> list[str]:
    """Blocks. Numbers in any notation (octal, hexadecimal, one integer) come out as plain addresses."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AddressRefused(f"{host} does not resolve") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _pinned(request: httpx2.Request, address: str) -> httpx2.Request:
    """The same request to an address; the Host header and TLS keep the name."""
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": _host(request.url)},
    )


def _host(url: httpx2.URL) -> str:
    """As name servers and certificates spell it."""
    return url.raw_host.decode("ascii")


@contextlib.contextmanager
def _as_timeout(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpx2.ReadTimeout(f"it took longer than {timeout_s:g} s") from error


@functools.cache
def _default_tls() -> ssl.SSLContext:
    return httpx2.create_ssl_context()
