"""/v1/videos: OpenAI's Videos API over the job runner, with events and cancel."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.responses import FileResponse, Response, StreamingResponse

from gateway.auth import account, caller
from gateway.body import discard_body, read_body
from gateway.connection import CLIENT_LEFT, unless_client_leaves
from gateway.growing import open_when_begun, stream_growing
from gateway.jobs.bucket import Stored
from gateway.jobs.outputs import MEDIA_TYPES, VIDEO_ID, Outputs
from gateway.jobs.store import Asked, Job, Order
from gateway.middleware import request_id
from gateway.openapi import Video, VideoDeleted, VideoList, answers, answers_bytes, body_of
from gateway.replies import error_reply, failure_reply, reply, video_object
from gateway.schema import VideoCreate, VideoRemix, resolve
from gateway.services import Here, Services
from gateway.stream import tell_ended, tell_live
from gateway.tracing import traceparent
from gateway.variants import Variant
from runtime.errors import InvalidInput
from runtime.sampling import check_terms

POLL_MS = (250, 5000)

router = APIRouter(prefix="/v1/videos")


async def existing(video_id: str, request: Request, here: Services) -> Job:
    """A job that the caller may see, or 404."""
    job = await here.runner.find(video_id, caller(request).scope)
    if job is None:
        raise InvalidInput("video_id", f"there is no video {video_id!r}", code="video_not_found")
    return job


async def _existing(video_id: str, request: Request, here: Here) -> Job:
    """The job of the path, before a response (an event stream, say) has begun."""
    return await existing(video_id, request, here)


Existing = Annotated[Job, Depends(_existing)]

IdempotencyKey = Annotated[str | None, Header(max_length=255)]


_FILE = answers_bytes(*sorted(set(MEDIA_TYPES.values())), ranges=True)


@router.post("", openapi_extra=body_of(VideoCreate), responses=answers(Video, "Accepted."))
async def create(request: Request, here: Here, idempotency_key: IdempotencyKey = None) -> Response:
    body = await read_body(request, VideoCreate)
    return reply(video_object(await _submit(request, here, body, idempotency_key)))


@router.post("/sync", openapi_extra=body_of(VideoCreate), response_class=FileResponse, responses=_FILE)
async def sync(request: Request, here: Here) -> Response:
    """The body of POST /v1/videos, answered with the video itself.

    The job is listed like any other, and cancelled if the client closes the connection before it has ended.
    """
    if "idempotency-key" in request.headers:
        raise InvalidInput("Idempotency-Key", "is for /v1/videos; this job ends with the connection that asked for it")
    job = await _submit(request, here, await read_body(request, VideoCreate), None, attached=True)
    try:
        ended = await unless_client_leaves(request, here.runner.wait(job.id))
    finally:
        # Unless it has ended, nobody waits for it any more.
        await here.runner.cancel(job.id, "the client left")
    return Response(status_code=CLIENT_LEFT) if ended is None else await _made(ended, request, here)


@router.post("/edits")
@router.post("/extensions")
@router.post("/characters")
async def refuse_videos(request: Request) -> Response:
    """What starts from a video: 400 `video_input_not_supported`, whatever was asked."""
    await discard_body(request)
    return _no_video_input()


@router.get("/characters/{character_id}")
async def refuse_character(character_id: str) -> Response:
    """Likewise: there are none."""
    return _no_video_input()


@router.get("", responses=answers(VideoList))
async def list_videos(
    request: Request,
    here: Here,
    after: Annotated[str | None, Query(pattern=f"^{VIDEO_ID.pattern}$", max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Order = "desc",
) -> Response:
    page = await here.runner.list(after, limit, order, caller(request).scope)
    data = [video_object(job) for job in page.jobs]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return reply({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": page.has_more})


@router.get("/{video_id}", responses=answers(Video))
async def retrieve(job: Existing) -> Response:
    headers = {} if job.finished else {"openai-poll-after-ms": str(_poll_after_ms(job.eta_s))}
    return reply(video_object(job), headers=headers)


@router.get("/{video_id}/content", response_class=FileResponse, responses=_FILE)
async def content(
    job: Existing, request: Request, here: Here, variant: Literal["video", Variant] = "video"
) -> Response:
    """The video, or what is made from it: a thumbnail (WebP) or a sprite sheet of up to 16 of its frames (JPEG)."""
    if variant == "video":
        return await here.delivery.send(await _finished_file(job, here.runner.outputs), request)
    try:
        found = await here.variants.get(job, _name_of_finished(job, here.runner.outputs), variant)
    except FileNotFoundError:
        raise _removed(job) from None
    return await here.delivery.send(found, request)


@router.get("/{video_id}/stream.mp4", response_class=StreamingResponse, responses=_FILE)
async def stream(job: Existing, request: Request, here: Here) -> Response:
    """The video while it is made: a fragmented MP4 from its first decoded frames on, all of it for who comes late.

    The answer begins with the first frames. A job that fails before them is an error, one that fails later closes the
    connection. Of a job that has ended it is the finished file, if that is an MP4. Leaving cancels nothing.
    """
    log = here.runner.follow(job)
    if log is None:
        return await here.delivery.send(await _finished_mp4(job, here.runner.outputs), request)
    begun = open_when_begun(log, here.runner.outputs.fragments(job.id))
    file = await unless_client_leaves(request, begun)
    if file is not None:
        return stream_growing(file, log)
    ended = await unless_client_leaves(request, here.runner.wait(job.id))
    if ended is None:
        return Response(status_code=CLIENT_LEFT)
    return await here.delivery.send(await _finished_mp4(ended, here.runner.outputs), request)


@router.get("/{video_id}/events", response_class=EventSourceResponse)
async def events(
    job: Existing,
    here: Here,
    frames: Literal["jpeg"] | None = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[ServerSentEvent]:
    log, read = here.runner.follow(job), functools.partial(here.runner.outputs.read, job)
    with_stills = frames == "jpeg"
    told = tell_live(log, last_event_id, read, with_stills) if log else tell_ended(job, read, with_stills)
    with here.metrics.reading_events():
        async with contextlib.aclosing(told):
            async for event in told:
                yield event


@router.post("/{video_id}/remix", openapi_extra=body_of(VideoRemix), responses=answers(Video, "Accepted."))
async def remix(source: Existing, request: Request, here: Here, idempotency_key: IdempotencyKey = None) -> Response:
    """The same video with another prompt, whether the source is done, still waits, or has lost its file.

    Its parameters and its seed are taken over; any of them may be given to differ, and `prompt` has to be.
    """
    body = (await read_body(request, VideoRemix)).over(source)
    if here.catalog.get(source.model) is None:
        message = f"{source.id} was made by {source.model}, which this server does not have (any more)"
        raise InvalidInput("video_id", message, code="model_not_served")
    taken = {"images": source.asked.images} if body.input_reference is None else {}
    return reply(video_object(await _submit(request, here, body, idempotency_key, remixed_from=source.id, **taken)))


@router.post("/{video_id}/cancel", responses=answers(Video))
async def cancel(job: Existing, here: Here) -> Response:
    await here.runner.cancel(job.id, "cancelled by the client")
    return reply(video_object(await here.runner.find(job.id) or job))


@router.delete("/{video_id}", responses=answers(VideoDeleted))
async def delete(job: Existing, here: Here) -> Response:
    await here.runner.delete(job.id)
    return reply({"id": job.id, "object": "video.deleted", "deleted": True})


async def _submit(request: Request, here: Services, body: VideoCreate, idempotency_key: str | None, **more: Any) -> Job:
    """Accept a job; `more` goes into its `Asked`."""
    model = here.catalog.find(body.model)
    params = resolve(body, model.card, here.config.max_prompt_chars)
    given = await asyncio.to_thread(body.given)
    terms = check_terms(body.priority, body.timeout, account(request))
    asked = Asked(
        request_id=request_id(request),
        traceparent=traceparent(request),
        previews=body.previews,
        output_format=body.output_format,
        user=body.user,
        safety_identifier=body.safety_identifier,
        warnings=body.warnings,
        webhook_url=await here.webhooks.accept(body.webhook_url),
    )
    again = await here.runner.was_asked(terms.key, idempotency_key)
    with contextlib.nullcontext() if again else await here.admission.enter(request, model, params):
        kept = await here.inputs.take(given, model.card.max_input_images)
        asked = msgspec.structs.replace(asked, **({"images": kept.images} | more))
        drawn_seed = body.seed is None
        return await here.runner.submit(model, params, terms, asked, idempotency_key, drawn_seed=drawn_seed)


def _no_video_input() -> Response:
    message = "videos are made of text here; no model of this server starts from a video"
    return error_reply(400, message, None, "video_input_not_supported")


async def _made(job: Job, request: Request, here: Services) -> Response:
    """To a call that waited for a job: its video, or why there is none."""
    headers = {"x-video-id": job.id, "x-seed": str(job.params.seed)}
    if job.status == "completed":
        headers["x-timings"] = msgspec.json.encode(job.timings).decode()
        found = await _finished_file(job, here.runner.outputs)
        answer = await here.delivery.send(found, request, may_redirect=False)
    else:
        answer = failure_reply(job.error_code or job.status, job.error_message or "it ended without a video")
    answer.headers.update(headers)
    return answer


async def _finished_mp4(job: Job, outputs: Outputs) -> Path | Stored:
    found, kind = await _finished_file(job, outputs), job.asked.output_format
    if kind != "mp4":
        message = f"{job.id} was streamed while it was made; it is kept as {kind}: GET /v1/videos/{job.id}/content"
        raise InvalidInput("video_id", message, code="video_not_mp4")
    return found


async def _finished_file(job: Job, outputs: Outputs) -> Path | Stored:
    found = await outputs.video(_name_of_finished(job, outputs))
    if found is None:
        raise _removed(job)
    return found


def _name_of_finished(job: Job, outputs: Outputs) -> str:
    if job.status != "completed":
        reason = job.error_message or f"it is {job.status.replace('_', ' ')}"
        code = f"video_{job.status}" if job.finished else "video_not_ready"
        raise InvalidInput("video_id", f"{job.id} has no content: {reason}", code=code)
    return job.output_file or outputs.final(job.id, job.asked.output_format).name


def _removed(job: Job) -> InvalidInput:
    return InvalidInput("video_id", f"the file of {job.id} was removed", code="video_not_found")


def _poll_after_ms(eta_s: float | None) -> int:
    """A quarter of what is left: the SDK keeps the first value, so it is also how late it may hear of the end."""
    least, most = POLL_MS
    return 1000 if eta_s is None else max(least, min(int(eta_s * 250), most))
