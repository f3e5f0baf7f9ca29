"""/v1/images: OpenAI's Images API, answered when the pictures are there. A client that leaves cancels its request."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from gateway.auth import account, caller, is_owned, owned_id, token_for
from gateway.body import read_body
from gateway.catalog import Model
from gateway.jobs.runner import MODEL_PATIENCE_S
from gateway.media.metadata import generation_metadata
from gateway.media.stills import FULL_QUALITY, still
from gateway.mesh import Frames
from gateway.openapi import Images, answers, answers_bytes, body_of
from gateway.replies import error_body, reply
from gateway.schema import ImageCreate, resolve
from gateway.services import Here, services
from runtime.errors import InvalidInput, RequestFailed
from runtime.protocol import Request as Generation
from runtime.sampling import ResolvedParams, check_terms

IMAGE_ID = re.compile(r"image_[0-9a-f]+")
CLIENT_LEFT = 499
"""For the access log; nobody reads the answer."""
STATUS = {"out_of_memory": 400, "draining": 503, "gateway_lost": 503}
"""Of a request that failed; everything else is 500."""

_FILES = answers_bytes("image/png", "image/webp", "image/jpeg", ranges=True)

router = APIRouter(prefix="/v1/images")


@dataclass(frozen=True)
class Picture:
    """One finished image."""

    id: str
    file: bytes
    seed: int
    timings: dict[str, float]


@router.post("/generations", openapi_extra=body_of(ImageCreate), responses=answers(Images))
async def generate(request: Request, here: Here) -> Response:
    if "idempotency-key" in request.headers:
        raise InvalidInput("Idempotency-Key", "is for /v1/videos; an image is answered at once and not remembered")
    body = await read_body(request, ImageCreate)
    model = here.catalog.find(body.model)
    params = resolve(body, model.card, here.config.max_prompt_chars)
    created = int(time.time())
    try:
        async with here.admission.entered(request, model, params, body.n):
            pictures = await _unless_client_leaves(request, _make_all(request, model, body, params))
    except RequestFailed as error:
        return _failed(error)
    if pictures is None:
        return Response(status_code=CLIENT_LEFT)
    return reply(await _answer(request, model, body, params, created, pictures))


@router.get("/{image_id}/content", name="image_content", response_class=FileResponse, responses=_FILES)
async def content(image_id: str, request: Request) -> Response:
    folder = _folder(request)
    found = sorted(folder.glob(f"{image_id}.*")) if IMAGE_ID.fullmatch(image_id) else []
    asking = caller(request)
    if not found or not (asking.key is None or is_owned(image_id, asking.name)):
        raise InvalidInput("image_id", f"there is no image {image_id!r}", code="image_not_found")
    media_type = f"image/{found[0].suffix.removeprefix('.')}"
    return FileResponse(found[0], media_type=media_type, filename=found[0].name, content_disposition_type="inline")


async def _make_all(request: Request, model: Model, body: ImageCreate, params: ResolvedParams) -> list[Picture]:
    """`body.n` pictures whose seeds count up; if one fails the others are cancelled."""
    if params.seed + body.n > 2**63:
        raise InvalidInput("seed", f"{params.seed} leaves no room for {body.n} images; take a smaller one")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(model.mesh.wait_model(), MODEL_PATIENCE_S)
    terms = check_terms(body.priority, body.timeout, account(request))
    first = await asyncio.to_thread(model.mesh.request, owned_id("image", terms.key), params, terms)
    wanted = [
        msgspec.structs.replace(
            first, id=owned_id("image", terms.key), params=msgspec.structs.replace(params, seed=seed)
        )
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
        "warnings": [*body.warnings, *await asyncio.to_thread(model.mesh.warnings, params)],
    }


async def _entry(request: Request, body: ImageCreate, picture: Picture) -> dict[str, Any]:
    known = {"id": picture.id, "seed": picture.seed, "timings": picture.timings}
    if body.response_format == "b64_json":
        return {"b64_json": (await asyncio.to_thread(base64.b64encode, picture.file)).decode()} | known
    path = _folder(request) / f"{picture.id}.{body.output_format}"
    await asyncio.to_thread(_write, path, picture.file)
    url = request.url_for("image_content", image_id=picture.id)
    token, _ = token_for(caller(request), picture.id)
    return {"url": str(url.include_query_params(token=token) if token else url)} | known


def _write(path: Path, file: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file)


def _failed(error: RequestFailed) -> Response:
    status = STATUS.get(error.code, 500)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"retry-after": "5"} if status == 503 else {"x-should-retry": "false"}
    return reply(error_body(error.reason, kind, None, error.code), status, headers)


def _folder(request: Request) -> Path:
    return Path(services(request).config.output_path) / "images"
