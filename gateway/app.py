"""The ASGI application: what lives as long as it does, and which error becomes which answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from gateway.auth import Authentication, Keyring
from gateway.body import wrong_value
from gateway.catalog import Catalog
from gateway.delivery import Delivery
from gateway.inputs import Inputs
from gateway.jobs.bucket import Bucket, StorageFailed
from gateway.jobs.database import StoreUnavailable
from gateway.jobs.deliveries import Deliveries
from gateway.jobs.outputs import Outputs
from gateway.jobs.runner import JobRunner
from gateway.jobs.store import JobStore
from gateway.jobs.sweeper import Sweeper
from gateway.jobs.webhooks import Webhooks
from gateway.limits import Admission, Refused
from gateway.media.metadata import version
from gateway.mesh import DRAINING
from gateway.metrics import Metrics, Timing
from gateway.middleware import BodyLimit, Envelope
from gateway.openapi import ERRORS, describe
from gateway.replies import CODES, error_reply, retry_after
from gateway.routes import adapters, health, images, models, playground, server, tokens, videos
from gateway.services import Services, services
from gateway.variants import Variants
from runtime.config import Config
from runtime.errors import InvalidInput, NotReady
from runtime.log import get_logger

log = get_logger("app")

ROUTERS = tuple(routes.router for routes in (videos, images, adapters, models, tokens, health, server, playground))
MAX_BODY_BYTES = 80_000_000
STORE_RETRY_S = 5.0
"""A database or object store that was restarted is usually back by then."""
NOT_FOUND = {"model_not_found", "video_not_found", "image_not_found"}
"""What `InvalidInput` calls things that do not exist."""
STATUS = {"unsupported_media_type": 415}
"""Of other refusals that HTTP has a number for."""


def create_app(config: Config, catalog: Catalog, store: JobStore, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The gateway over its models. It owns their meshes and the store: opens them when it starts, closes them at its
    end."""
    keyring, metrics, deliveries = Keyring(config), Metrics(), Deliveries(store)
    outputs = Outputs(Path(config.output_path), _bucket(config), metadata=config.metadata)
    webhooks, keep_s = Webhooks(deliveries, config), 3600 * config.keep_results_hours
    runner = JobRunner(catalog, store, outputs, metrics, webhooks, keep_s)
    inputs = Inputs(Path(config.output_path) / "inputs", allow_private=config.allow_private_urls)
    sweeper = Sweeper(store, outputs, inputs, deliveries, keep_s)
    delivery = Delivery(outputs, config.output_redirect)
    admission = Admission(config, catalog, runner)
    here = Services(config, catalog, runner, admission, webhooks, delivery, inputs, metrics, Variants(outputs))

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await store.open()
            stack.push_async_callback(store.close)
            await outputs.open()
            await catalog.start()
            stack.push_async_callback(catalog.close)
            await stack.enter_async_context(_running(webhooks.run(), sweeper.run()))
            await runner.resume()
            stack.push_async_callback(runner.close)
            stack.push_async_callback(here.probe.close)
            stack.push_async_callback(here.variants.close)
            yield

    app = FastAPI(title="framemesh", version=version(), lifespan=lifespan, responses=ERRORS)
    app.state.sweeper = sweeper
    app.state.services = here
    for router in ROUTERS:
        app.include_router(router)
    describe(app, config, catalog.names, protected=not keyring.is_open)
    app.add_exception_handler(InvalidInput, _invalid_input)
    app.add_exception_handler(NotReady, _not_ready)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(StorageFailed, _storage_failed)
    app.add_exception_handler(StoreUnavailable, _store_unavailable)
    app.add_exception_handler(RequestValidationError, _validation_failed)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_middleware(BodyLimit, max_body_bytes=max_body_bytes)
    app.add_middleware(Authentication, keyring=keyring, protect_metrics=config.protect_metrics)
    app.add_middleware(Envelope)
    app.add_middleware(Timing, metrics=metrics)
    return app


def _bucket(config: Config) -> Bucket | None:
    if config.output_store is not None:
        return Bucket(config.output_store)
    if config.output_redirect:
        raise InvalidInput("output_redirect", "has no effect without output_store; leave it out")
    return None


@contextlib.asynccontextmanager
async def _running(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Side by side, until the end of the block."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(_report_end)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _report_end(task: asyncio.Task[None]) -> None:
    """None of them should end before the application does."""
    if not task.cancelled() and task.exception() is not None:
        log.error("a task in the background failed", exc_info=task.exception())


def _invalid_input(_request: Request, error: Any) -> Response:
    status = 404 if error.code in NOT_FOUND else STATUS.get(error.code, 400)
    return error_reply(status, str(error), error.field, error.code)


def _not_ready(request: Request, error: Any) -> Response:
    code = DRAINING if error.draining else "model_loading"
    later = retry_after(services(request).admission.retry_after_s(error))
    return error_reply(503, f"not ready: {error}", None, code, later)


def _refused(_request: Request, error: Any) -> Response:
    return error_reply(429, str(error), None, error.code, retry_after(error.retry_after_s))


def _storage_failed(_request: Request, error: Any) -> Response:
    message = f"the object store does not answer: {error}"
    return error_reply(503, message, None, "storage_unavailable", retry_after(STORE_RETRY_S))


def _store_unavailable(_request: Request, error: Any) -> Response:
    return error_reply(503, str(error), None, "store_unavailable", retry_after(STORE_RETRY_S))


def _validation_failed(_request: Request, error: Any) -> Response:
    """A path, query or header parameter; bodies are checked in gateway.schema."""
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return error_reply(400, f"{param}: {wrong_value(first['msg'], first['input'])}", param, "invalid_value")


def _http_exception(request: Request, error: Any) -> Response:
    message = f"{error.detail}: {request.method} {request.url.path}"
    headers = {"allow": _allowed(request)} if error.status_code == 405 else error.headers
    return error_reply(error.status_code, message, None, CODES.get(error.status_code), headers)


def _allowed(request: Request) -> str:
    """What a path answers to: routes know their own methods only, and several share a path. The first that fits is the
    one that is meant: `/v1/videos/edits` is no video's id."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    fit = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in fit for method in route.methods or () if route.path == fit[0].path}))
