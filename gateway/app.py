"""The ASGI application: what lives as long as it does, what wraps every request, how every error looks."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.jobs.outputs import Outputs
from gateway.jobs.runner import JobRunner
from gateway.jobs.store import JobStore
from gateway.mesh import DRAINING, Mesh
from gateway.routes import health, images, models, videos
from gateway.schema import error_body, reply
from runtime.config import Config
from runtime.errors import InvalidInput, NotReady
from runtime.log import get_logger
from runtime.models.card import Card

MAX_BODY_BYTES = 80_000_000
RETRY_AFTER_S = 5
"""Weights take minutes to load; the SDK gives up after two retries whatever we say."""
CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
NOT_FOUND = {"model_not_found", "video_not_found", "image_not_found"}
"""What `InvalidInput` calls things that do not exist."""

log = get_logger("http")


def create_app(
    config: Config, mesh: Mesh, store: JobStore, card: Card, *, max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """The gateway over one mesh. It owns `mesh` and `store`: opens them when it starts, closes them when it ends."""
    runner = JobRunner(mesh, store, Outputs(Path(config.output_path)), config.model_name)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await store.open()
            stack.push_async_callback(store.close)
            await mesh.start()
            stack.push_async_callback(mesh.close)
            await runner.resume()
            stack.push_async_callback(runner.close)
            yield

    app = FastAPI(title="framemesh", lifespan=lifespan)
    app.state.config, app.state.mesh, app.state.card, app.state.runner = config, mesh, card, runner
    for routes in (videos, images, models, health):
        app.include_router(routes.router)
    app.add_exception_handler(InvalidInput, _invalid_input)
    app.add_exception_handler(NotReady, _not_ready)
    app.add_exception_handler(RequestValidationError, _validation_failed)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_middleware(BodyLimit, max_body_bytes=max_body_bytes)
    app.add_middleware(Envelope)
    return app


def error_reply(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return reply(error_body(message, kind, param, code), status, headers)


def _invalid_input(_request: Request, error: Any) -> Response:
    return error_reply(404 if error.code in NOT_FOUND else 400, str(error), error.field, error.code)


def _not_ready(request: Request, error: Exception) -> Response:
    mesh: Mesh = request.app.state.mesh
    code = DRAINING if mesh.state.draining else "model_loading"
    return error_reply(503, f"not ready: {error}", None, code, {"retry-after": str(RETRY_AFTER_S)})


def _validation_failed(_request: Request, error: Any) -> Response:
    """A path, query or header parameter; bodies are checked in gateway.schema."""
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return error_reply(400, f"{param}: {first['msg']}", param, "invalid_value")


def _http_exception(request: Request, error: Any) -> Response:
    message = f"{error.detail}: {request.method} {request.url.path}"
    return error_reply(error.status_code, message, None, CODES.get(error.status_code), error.headers)


class Envelope:
    """The outermost layer: request id, access log, and the answer to what nobody caught.

    Pure ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnect from the routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, request_id, status = time.monotonic(), _request_id(Headers(scope=scope)), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("a request failed", path=scope["path"], request_id=request_id)
            if status:
                raise  # too late for an answer: the server closes the connection
            headers = {"x-should-retry": "false"}
            answer = error_reply(500, f"internal error in request {request_id}", None, "internal_error", headers)
            await answer(scope, receive, send_with_id)
        finally:
            seconds = round(time.monotonic() - began, 4)
            log.debug("request", method=scope["method"], path=scope["path"], status=status, s=seconds, id=request_id)


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
