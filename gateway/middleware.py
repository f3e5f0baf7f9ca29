"""What wraps every request: its id, the access log, the answer to what nobody caught, the limit of bodies.

Pure ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnect from the routes.
"""

from __future__ import annotations

import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.growing import BrokenOff
from gateway.replies import CODES, error_reply
from runtime.log import get_logger

log = get_logger("http")


class Envelope:
    """The outermost layer: request id, access log, and the answer to what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, request_id, status = time.monotonic(), _request_id(Headers(scope=scope)), 0
        more: dict[str, str] = {}
        scope.setdefault("state", {}).update(request_id=request_id, answer_headers=more)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(more | {"x-request-id": request_id})
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.debug("a client left before its request was complete", path=scope["path"], request_id=request_id)
        except BrokenOff as error:
            # Leaving without an end makes the server close the connection.
            log.warning("a stream broke off", path=scope["path"], trace=request_id, reason=str(error))
        except Exception:
            log.exception("a request failed", path=scope["path"], request_id=request_id)
            if status:
                raise  # too late for an answer: the server closes the connection
            headers = {"x-should-retry": "false"}
            answer = error_reply(500, f"internal error in request {request_id}", None, "internal_error", headers)
            await answer(scope, receive, send_with_id)
        finally:
            seconds = round(time.monotonic() - began, 4)
            log.debug("request", method=scope["method"], path=scope["path"], status=status, s=seconds, trace=request_id)


def request_id(request: Request) -> str:
    """Of the call that is being answered; the answer's `x-request-id`."""
    found: str = request.state.request_id
    return found


def answer_headers(request: Request) -> dict[str, str]:
    """Headers that the answer will have, whatever it is; for adding to."""
    found: dict[str, str] = request.state.answer_headers
    return found


def _request_id(headers: Headers) -> str:
    sent = headers.get("x-request-id", "")
    return sent if 0 < len(sent) <= 128 and sent.isascii() and sent.isprintable() else f"req_{secrets.token_hex(12)}"


class BodyLimit:
    """413 for a body that is too large, declared or not. FastAPI's own limit answers in plain text."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._most = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body has more than {self._most} bytes"
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._most:
            await error_reply(413, message, None, CODES[413])(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self._most:
                raise HTTPException(413, message)
            return part

        await self._app(scope, receive_counted, send)
