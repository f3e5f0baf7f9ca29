"""/v1/images: OpenAI's Images API, answered when the pictures are there, or as a stream of events while they are made.

A client that leaves cancels its request.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from gateway.auth import account, caller, token_for
from gateway.body import read_body
from gateway.connection import CLIENT_LEFT, Told, event_stream, unless_client_leaves
from gateway.jobs.store import Asked
from gateway.limits import Place
from gateway.media.stills import FULL_QUALITY
from gateway.middleware import request_id
from gateway.openapi import Images, answers, answers_bytes, body_of
from gateway.owners import is_owned
from gateway.pictures import Commission, Partial, Picture, make_all, order, paint
from gateway.replies import failure, failure_reply, reply, total_usage, usage_object
from gateway.schema import LISTS, ImageCreate, ImageEdit, resolve
from gateway.services import Here, Services, services
from gateway.tracing import traceparent
from runtime.errors import InvalidInput, RequestFailed
from runtime.log import get_logger
from runtime.protocol import Progress
from runtime.protocol import Request as Generation
from runtime.sampling import check_terms

_ANSWERS = answers(Images, stream=True)
_FILES = answers_bytes("image/png", "image/webp", "image/jpeg", ranges=True)

router = APIRouter(prefix="/v1/images")
log = get_logger("images")


@dataclass(frozen=True)
class Call:
    """One call of this API, checked."""

    request: Request
    body: ImageCreate
    commission: Commission
    event: str
    """What the names of its events begin with."""
    created: int
    place: Place


@router.post("/generations", openapi_extra=body_of(ImageCreate), responses=_ANSWERS)
async def generate(request: Request, here: Here) -> Response:
    """Make images of a prompt."""
    _refuse_idempotency(request)
    body = await read_body(request, ImageCreate)
    return await _answer(await _check(request, here, body, "image_generation"))


@router.post("/edits", openapi_extra=body_of(ImageEdit), responses=_ANSWERS)
async def edit(request: Request, here: Here) -> Response:
    """Make images that start from given ones.

    Everything that the body holds is checked first; then a model without image input refuses it with the code
    `image_input_not_supported`; then pictures that were given by their URLs are fetched and checked. What was checked
    is kept below the output folder.
    """
    _refuse_idempotency(request)
    body = await read_body(request, ImageEdit, LISTS)
    return await _answer(await _check(request, here, body, "image_edit"))


@router.get("/{image_id}/content", name="image_content", response_class=FileResponse, responses=_FILES)
async def content(image_id: str, request: Request, here: Here) -> Response:
    scope = caller(request).scope
    found = await here.runner.outputs.image(image_id) if scope is None or is_owned(image_id, scope) else None
    if found is None:
        raise InvalidInput("image_id", f"there is no image {image_id!r}", code="image_not_found")
    return await here.delivery.send(found, request)


def _refuse_idempotency(request: Request) -> None:
    if "idempotency-key" in request.headers:
        raise InvalidInput("Idempotency-Key", "is for /v1/videos; an image is answered at once and not remembered")


async def _check(request: Request, here: Services, body: ImageCreate, event: str) -> Call:
    """Everything that can be refused before the mesh hears of it."""
    model = here.catalog.find(body.model)
    params = resolve(body, model.card, here.config.max_prompt_chars)
    given = await asyncio.to_thread(body.given)
    place = await here.admission.enter(request, model, params, body.n)
    commission = Commission(
        model=model,
        params=params,
        terms=check_terms(body.priority, body.timeout, account(request)),
        asked=Asked(
            request_id=request_id(request),
            traceparent=traceparent(request),
            user=body.user,
            safety_identifier=body.safety_identifier,
        ),
        metrics=here.metrics,
        n=body.n,
        previews=body.partial_images,
        inputs=await here.inputs.take(given, model.card.max_input_images),
        kind=body.output_format,
        quality=FULL_QUALITY if body.output_compression is None else body.output_compression,
        metadata=here.config.metadata,
    )
    return Call(request, body, commission, event, int(time.time()), place)


async def _answer(call: Call) -> Response:
    if call.body.stream:
        (generation,) = await order(call.commission)
        return event_stream(_tell(call, generation))
    try:
        with call.place:
            pictures = await unless_client_leaves(call.request, make_all(call.commission))
        entries = [await _entry(call, picture) for picture in pictures or ()]
    except RequestFailed as error:
        return failure_reply(error.code, error.reason)
    if pictures is None:
        return Response(status_code=CLIENT_LEFT)
    answer = {"created": call.created, "data": entries} | _described(call) | await _summed(call, pictures)
    return reply(answer)


async def _tell(call: Call, generation: Generation) -> AsyncGenerator[Told, None]:
    """OpenAI's events of an image, and ours if they were asked for; a failure is the last one."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(call.place)
            events = await stack.enter_async_context(contextlib.aclosing(paint(call.commission, generation)))
            async for event in events:
                match event:
                    case Partial(index=index, file=file):
                        yield await _event(call, "partial_image", file, {"partial_image_index": index})
                    case Picture():
                        known = {"id": event.id, "seed": event.seed, "timings": event.timings}
                        yield await _event(call, "completed", event.file, known | await _summed(call, [event]))
                    case Progress() if call.body.wants_progress:
                        yield _named(call, "progress", _progress(event))
    except RequestFailed as error:
        yield "error", {"type": "error"} | failure(error.code, error.reason)[1]
    except Exception:
        # The answer has begun: nobody above can still make an error of it that a client reads.
        log.exception("an image failed in the gateway", request=generation.id, trace=generation.trace)
        yield "error", {"type": "error"} | failure("internal_error", "the gateway failed; its log says more")[1]


async def _event(call: Call, name: str, file: bytes, known: dict[str, Any]) -> Told:
    encoded = (await asyncio.to_thread(base64.b64encode, file)).decode()
    return _named(call, name, {"b64_json": encoded, "created_at": call.created} | _described(call) | known)


def _named(call: Call, name: str, data: dict[str, Any]) -> Told:
    return f"{call.event}.{name}", {"type": f"{call.event}.{name}"} | data


def _progress(event: Progress) -> dict[str, Any]:
    told = {"stage": event.stage, "step": event.step, "total_steps": event.total_steps, "eta_s": round(event.eta_s, 3)}
    return told | {"queue_position": event.queue_position if event.stage == "queued" else None}


def _described(call: Call) -> dict[str, Any]:
    """How the images of a call look, in OpenAI's words."""
    params, body = call.commission.params, call.body
    described = {
        "size": f"{params.width}x{params.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": body.output_format,
    }
    identifier = body.safety_identifier or body.user
    return described | ({"safety_identifier": identifier} if identifier else {})


async def _summed(call: Call, pictures: Sequence[Picture]) -> dict[str, Any]:
    """What a call took, and what there is to say about it."""
    commission = call.commission
    usage = total_usage(pictures[0].text_tokens, [picture.usage for picture in pictures])
    warnings = await asyncio.to_thread(commission.model.mesh.warnings, commission.params)
    return {"usage": usage, "warnings": [*call.body.warnings, *warnings]}


async def _entry(call: Call, picture: Picture) -> dict[str, Any]:
    known = {"id": picture.id, "seed": picture.seed, "timings": picture.timings, "usage": usage_object(picture.usage)}
    if call.body.response_format == "b64_json":
        return {"b64_json": (await asyncio.to_thread(base64.b64encode, picture.file)).decode()} | known
    outputs, call_url = services(call.request).runner.outputs, call.request.app.url_path_for
    await outputs.keep_image(picture.id, f".{call.body.output_format}", picture.file)
    base = (services(call.request).config.public_url or "").rstrip("/")
    url = base + call_url("image_content", image_id=picture.id)
    token, _ = token_for(caller(call.request), picture.id)
    return {"url": f"{url}?token={token}" if token else url} | known
