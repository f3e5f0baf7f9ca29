"""/v1/images: OpenAI's Images API, answered when the pictures are there. A client that leaves cancels its request."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from gateway.auth import account
from gateway.body import read_body
from gateway.catalog import Model
from gateway.jobs.runner import MODEL_PATIENCE_S
from gateway.media.metadata import generation_metadata
from gateway.media.stills import FULL_QUALITY, still
from gateway.mesh import Frames
from gateway.replies import error_body, reply
from gateway.schema import ImageCreate, resolve
from gateway.services import Here, services
from runtime.errors import InvalidInput, RequestFailed
from runtime.protocol import Request as Generation
from runtime.sampling import ResolvedParams, check_terms

CLIENT_LEFT = 499
"""For the access log; nobody reads the answer."""
STATUS = {"out_of_memory": 400, "draining": 503, "gateway_lost": 503}
"""Of a request that failed; everything else is 500."""

router = APIRouter(prefix="/v1/images")


@dataclass(frozen=True)
class Picture:
    """One finished image."""

    id: str
    file: bytes
    seed: int
    timings: dict[str, float]


_BODY = {"schema": ImageCreate.model_json_schema()}
_CREATE = {
    "requestBody": {"required": True, "content": {"application/json": _BODY, "multipart/form-data": _BODY}},
}


@router.post("/generations", openapi_extra=_CREATE)
async def generate(request: Request, here: Here) -> Response:
    if "idempotency-key" in request.headers:
        raise InvalidInput("Idempotency-Key", "is for /v1/videos; an image is answered at once and not remembered")
    body = await read_body(request, ImageCreate)
    model = here.catalog.find(body.model)
    params = resolve(body, model.card, here.config.max_prompt_chars)
    created = int(time.time())
    try:
        pictures = await _unless_client_leaves(request, _make_all(request, model, body, params))
        answer = await _answer(request, model, body, params, created, pictures or [])
    except RequestFailed as error:
        return _failed(error)
    if pictures is None:
        return Response(status_code=CLIENT_LEFT)
    return reply(answer)


@router.get("/{image_id}/content", name="image_content", response_class=FileResponse)
async def content(image_id: str, request: Request, here: Here) -> Response:
    found = await here.runner.outputs.image(image_id)
    if found is None:
        raise InvalidInput("image_id", f"there is no image {image_id!r}", code="image_not_found")
    return await here.delivery.send(found, request)


async def _make_all(request: Request, model: Model, body: ImageCreate, params: ResolvedParams) -> list[Picture]:
    """`body.n` pictures whose seeds count up; if one fails the others are cancelled."""
    if params.seed + body.n > 2**63:
        raise InvalidInput("seed", f"{params.seed} leaves no room for {body.n} images; take a smaller one")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(model.mesh.wait_model(), MODEL_PATIENCE_S)
    terms = check_terms(body.priority, body.timeout, account(request))
    first = await asyncio.to_thread(model.mesh.request, _new_image_id(), params, terms)
    wanted = [
        msgspec.structs.replace(first, id=_new_image_id(), params=msgspec.structs.replace(params, seed=seed))
        for seed in range(params.seed, params.seed + body.n)
    ]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_make(model, body, generation)) for generation in wanted]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _make(model: Model, body: ImageCreate, generation: Generation) -> Picture:
    frame, timings = None, {}
    async with contextlib.aclosing(model.mesh.run(generation)) as events:
        async for event in events:
            if isinstance(event, Frames):
                frame, timings = event.pixels[0], event.timings
    assert frame is not None, "completed without a picture"
    params = generation.params
    metadata = generation_metadata(params, model.name, timings)
    quality = FULL_QUALITY if body.output_compression is None else body.output_compression
    file = await asyncio.to_thread(still, frame, body.output_format, metadata, quality)
    return Picture(generation.id, file, params.seed, timings)


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, list[Picture]]) -> list[Picture] | None:
    """The work's result, or None if the client closed the connection first; the work is cancelled then."""
    made, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else None
    finally:
        for task in (made, gone):
            task.cancel()
        await asyncio.gather(made, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(
    request: Request, model: Model, body: ImageCreate, params: ResolvedParams, created: int, pictures: list[Picture]
) -> dict[str, Any]:
    """OpenAI's ImagesResponse, and what we know beyond it."""
    return {
        "created": created,
        "data": [await _entry(request, body, picture) for picture in pictures],
        "output_format": body.output_format,
        "size": f"{params.width}x{params.height}",
        "warnings": await asyncio.to_thread(model.mesh.warnings, params),
    }


async def _entry(request: Request, body: ImageCreate, picture: Picture) -> dict[str, Any]:
    known = {"id": picture.id, "seed": picture.seed, "timings": picture.timings}
    if body.response_format == "b64_json":
        return {"b64_json": (await asyncio.to_thread(base64.b64encode, picture.file)).decode()} | known
    outputs = services(request).runner.outputs
    await outputs.keep_image(picture.id, f".{body.output_format}", picture.file)
    return {"url": str(request.url_for("image_content", image_id=picture.id))} | known


def _failed(error: RequestFailed) -> Response:
    status = STATUS.get(error.code, 500)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"retry-after": "5"} if status == 503 else {"x-should-retry": "false"}
    return reply(error_body(error.reason, kind, None, error.code), status, headers)


def _new_image_id() -> str:
    """Ordered by time, and not to be guessed from another one."""
    return f"image_{time.time_ns():016x}{secrets.token_hex(8)}"
