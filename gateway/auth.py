"""Who asks: API keys, the accounts behind them, and tokens for what cannot send a key. Knows no limits and no jobs.

A key itself goes no further than this file; what comes out is a name. Without configured keys everybody may ask, and
an account is a hash of whatever was sent.

`<video>`, `<img>` and `EventSource` send no headers: for them there are tokens, in the query, signed with the digest of
the caller's key. So they hold on every gateway that knows the key, after a restart too, and end with the key. A token
lets its holder read one video or one image for a while and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.replies import error_reply
from runtime.apikeys import ApiKey, digest_of, parse_keys, read_keys
from runtime.config import Config
from runtime.errors import InvalidInput
from runtime.log import get_logger

LOOK_EVERY_S = 1.0
"""How often the file of keys is looked at while requests come in."""
TOKEN_S = 3600.0
"""How long an address that we hand out stays readable."""
MAX_TOKEN_CHARS = 1024
OPEN = re.compile(r"/(health(/.*)?|health_generate|playground(/.*)?|docs(/.*)?|redoc|openapi\.json)?")
"""Paths that need no key: probes, the static page, the description of the API."""
METRICS = "/metrics"
READABLE = re.compile(r"/v1/(?:videos|images)/((?:video|image)_[0-9a-f]+)(?:/.*)?")
"""What a token can open, and whose id has to be in it."""
SCHEME = "bearer "
NO_KEY = (
    "no API key was sent: this server wants one in the header Authorization, as in 'Authorization: Bearer YOUR_KEY'"
)
WRONG_KEY = "Incorrect API key provided."

log = get_logger("auth")


@dataclass(frozen=True)
class Caller:
    """Who a request is charged to."""

    name: str
    """The account: the name of the key."""
    key: ApiKey | None = None
    """None where no keys are configured."""

    @property
    def scope(self) -> str | None:
        """The account whose belongings alone are shown; None, and all are, where no keys tell people apart."""
        return None if self.key is None else self.name


class Keyring:
    """The keys that are let in; those of a file are read again when it changes."""

    def __init__(self, config: Config) -> None:
        """Reads the file: raises `InvalidInput` for one that is wrong."""
        self._path = None if config.api_keys_file is None else Path(config.api_keys_file).expanduser()
        self._fixed = parse_keys("api_keys", config.api_keys)
        self._from_file: tuple[ApiKey, ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._looked = -LOOK_EVERY_S
        if self._path is not None:
            self._seen = _signature(self._path)
            self._from_file = read_keys(self._path)

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask."""
        return self._path is None and not self._fixed

    async def find(self, secret: str) -> ApiKey | None:
        """The key that this secret belongs to. Every key is compared, whichever it is."""
        await self._refresh()
        digest, found = digest_of(secret), None
        for key in (*self._fixed, *self._from_file):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    async def named(self, name: str) -> ApiKey | None:
        await self._refresh()
        return next((key for key in (*self._fixed, *self._from_file) if key.name == name), None)

    async def _refresh(self) -> None:
        if self._path is None or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        await asyncio.to_thread(self._read_again, self._path)

    def _read_again(self, path: Path) -> None:
        """A file that cannot be read changes nothing: who was let in a moment ago still is."""
        signature = _signature(path)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._from_file = read_keys(path)
        except InvalidInput as error:
            log.error("the file of API keys is not usable; the keys of before stay", reason=str(error))
        else:
            log.info("API keys were read", keys=len(self._from_file))


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def needs_no_key(path: str, *, protect_metrics: bool) -> bool:
    """Whether everybody may ask for it."""
    return OPEN.fullmatch(path) is not None or (path == METRICS and not protect_metrics)


class Authentication:
    """401 for whoever has no key, before anything of the body is read; for all others `caller()` is known."""

    def __init__(self, app: ASGIApp, keyring: Keyring, *, protect_metrics: bool = False) -> None:
        self._app = app
        self._keyring = keyring
        self._protect_metrics = protect_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        secret = _secret(Headers(scope=scope))
        found = await self._identify(scope, secret)
        if found is None:
            kind = 'Bearer realm="framemesh"' + (', error="invalid_token"' if secret else "")
            message = WRONG_KEY if secret else NO_KEY
            refusal = error_reply(401, message, None, "invalid_api_key", {"www-authenticate": kind})
            await refusal(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = found
        await self._app(scope, receive, send)

    async def _identify(self, scope: Scope, secret: str) -> Caller | None:
        if self._keyring.is_open:
            return Caller(hashlib.sha256(secret.encode()).hexdigest()[:12] if secret else "")
        key = await self._keyring.find(secret) if secret else await self._by_token(scope)
        if key is not None:
            return Caller(key.name, key)
        free = needs_no_key(scope["path"], protect_metrics=self._protect_metrics)
        return Caller("") if free else None

    async def _by_token(self, scope: Scope) -> ApiKey | None:
        place = READABLE.fullmatch(scope["path"])
        tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if place is None or scope["method"] not in {"GET", "HEAD"} or len(tokens) != 1:
            return None
        claim = _read_claim(tokens[0])
        key = None if claim is None else await self._keyring.named(claim.name)
        if key is None or claim is None or claim.id != place[1] or claim.until < time.time():
            return None
        return key if hmac.compare_digest(_sign(key, claim.id, claim.until), tokens[0]) else None


def caller(request: Request) -> Caller:
    """Who asks, as `Authentication` found out."""
    found: Caller = request.state.caller
    return found


def account(request: Request) -> str:
    """A name for the caller, by which fair shares are kept and belongings told apart."""
    return caller(request).name


class _Claim(msgspec.Struct, array_like=True, frozen=True):
    name: str
    id: str
    until: int
    signature: str = ""


def token_for(caller: Caller, readable_id: str, lasts_s: float = TOKEN_S) -> tuple[str, int]:
    """(token that lets its holder GET one video or image, when it ends in seconds since the epoch).

    Where no keys are configured everything can be read without one, and the token is empty.
    """
    until = int(time.time() + lasts_s)
    return ("" if caller.key is None else _sign(caller.key, readable_id, until)), until


def _sign(key: ApiKey, readable_id: str, until: int) -> str:
    said = msgspec.json.encode((key.name, readable_id, until))
    signature = hmac.new(key.digest, b"framemesh read token\n" + said, hashlib.sha256).hexdigest()
    claim = _Claim(key.name, readable_id, until, signature)
    return base64.urlsafe_b64encode(msgspec.json.encode(claim)).decode().rstrip("=")


def _read_claim(token: str) -> _Claim | None:
    if len(token) > MAX_TOKEN_CHARS:
        return None
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)), type=_Claim)
    except (ValueError, msgspec.DecodeError):
        return None


def _secret(headers: Headers) -> str:
    sent = headers.get("authorization", "")
    return sent[len(SCHEME) :].strip() if sent.lower().startswith(SCHEME) else sent.strip()
