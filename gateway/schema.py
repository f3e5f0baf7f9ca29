"""Bodies in and out: the one place where HTTP words become protocol words. Asks the card, never the mesh."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from gateway.jobs.store import Job
from gateway.media.stills import StillFormat
from runtime.errors import InvalidInput
from runtime.models.card import Card
from runtime.sampling import ResolvedParams, SamplingParams

MAX_FORM_FIELDS = 200
MAX_FORM_FILES = 4
MAX_PART_BYTES = 70_000_000
"""Starlette's own 1 MB would refuse an image given as a data URL before anybody could say what is wrong with it."""

SIZE = re.compile(r"(\d{1,5})[xX×](\d{1,5})")
NESTED = ("extra_body", "extra_params")
"""Fields that hold further fields: what SGLang and vLLM-Omni clients send."""

Fields = dict[str, Any]


def _no_bool(value: Any) -> Any:
    """Python's True is 1, and pydantic's lax mode agrees."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Generation(BaseModel):
    """What a body for a video and one for images have in common: OpenAI's words and our sampling parameters."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    size: str | None = Field(None, description='"WIDTHxHEIGHT" or "auto"; unset: the model\'s default')
    width: Whole | None = None
    height: Whole | None = None
    seed: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = Field(None, description="image models: guidance against the negative prompt")
    negative_prompt: str | None = None
    priority: Whole | None = Field(None, description="-100 to 100; higher goes first among your own requests")
    timeout: Number | None = Field(None, description="seconds after which the result is no longer wanted")

    def to_params(self, card: Card) -> SamplingParams:
        """The same in the runtime's words; raises `InvalidInput` where two of them contradict each other."""
        width, height = self._sides()
        return SamplingParams(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            true_cfg_scale=self.true_cfg_scale,
            seed=self.seed,
            height=height,
            width=width,
        )

    def _sides(self) -> tuple[int | None, int | None]:
        if self.size is None or self.size == "auto":
            return self.width, self.height
        match = SIZE.fullmatch(self.size)
        if match is None:
            raise InvalidInput("size", f'{self.size!r} is not of the form "WIDTHxHEIGHT", e.g. "832x480"')
        width, height = int(match[1]), int(match[2])
        if self.width not in {None, width} or self.height not in {None, height}:
            given = f"width={self.width}, height={self.height}"
            raise InvalidInput("size", f"{self.size} contradicts {given}; give one of the two")
        return width, height


class VideoCreate(Generation):
    """The body of POST /v1/videos."""

    seconds: Number | None = Field(
        None, gt=0, le=86_400, description="length; the nearest frame count that the model can make"
    )
    num_frames: Whole | None = None
    fps: Whole | None = None

    def to_params(self, card: Card) -> SamplingParams:
        if card.task_type == "T2I":
            raise InvalidInput("model", "makes images, not videos; use POST /v1/images/generations")
        return replace(super().to_params(card), num_frames=self._frames(card), fps=self.fps)

    def _frames(self, card: Card) -> int | None:
        if self.seconds is None:
            return self.num_frames
        fps = self.fps or card.check(SamplingParams(prompt="any")).fps
        frames = card.frames_for(self.seconds, fps)
        if self.num_frames not in {None, frames}:
            message = f"{self.seconds:g} s at {fps} fps are {frames} frames, not num_frames={self.num_frames}"
            raise InvalidInput("seconds", f"{message}; give one of the two")
        return frames


NOTHING: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "stream": (False,),
    "partial_images": (0,),
}
"""Fields of OpenAI's that we have nothing for, and their values that ask for nothing."""


class ImageCreate(Generation):
    """The body of POST /v1/images/generations. A video model makes a still."""

    n: Whole = Field(1, ge=1, le=10, description="how many; the seeds count up from `seed`")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: StillFormat = "png"
    output_compression: Whole | None = Field(None, ge=0, le=100, description="quality of webp and jpeg")
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    user: str | None = None
    safety_identifier: str | None = None

    def to_params(self, card: Card) -> SamplingParams:
        for name, taken in NOTHING.items():
            value = getattr(self, name)
            if value is not None and value not in taken:
                choice = " or ".join(map(str, taken)).lower()
                message = f"{value!r} is not available here; take {choice}, or leave it out"
                raise InvalidInput(name, message, code="unsupported_value")
        if self.output_format == "png" and self.output_compression not in {None, 100}:
            raise InvalidInput("output_compression", "has no effect on png; it is for webp and jpeg")
        return replace(super().to_params(card), num_frames=1)


Body = TypeVar("Body", bound=Generation)


def account(request: Request) -> str:
    """A name for the caller's API key: fair shares are per key, and the key itself goes no further than this."""
    secret = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    return hashlib.sha256(secret.encode()).hexdigest()[:12] if secret else ""


def resolve(body: Generation, card: Card, model_name: str, max_prompt_chars: int) -> ResolvedParams:
    """Everything that can be checked without the mesh.

    Raises:
        InvalidInput: names the field that the client sent.
    """
    if body.model not in {None, model_name}:
        message = f"{body.model!r} does not exist here; this server has {model_name!r}"
        raise InvalidInput("model", message, code="model_not_found")
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(body, name) or "")
        if length > max_prompt_chars:
            message = f"has {length} characters, at most {max_prompt_chars} are taken"
            raise InvalidInput(name, message, code="string_above_max_length")
    try:
        return card.check(body.to_params(card))
    except InvalidInput as error:
        raise InvalidInput(_sent_as(error.field, body), error.message, code=error.code) from error


def _sent_as(field: str, body: Generation) -> str:
    if field == "num_frames" and isinstance(body, VideoCreate) and body.seconds is not None:
        return "seconds"
    return "size" if field in {"width", "height"} and body.size is not None else field


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body, whichever of the three content types it came in.

    Raises:
        InvalidInput: names the first field that is wrong.
    """
    fields = {name: value for name, value in _merge_nested(await _read_fields(request)).items() if value is not None}
    if fields.get("input_reference") is not None:
        raise InvalidInput("input_reference", "text-to-video models take no image", code="unsupported_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid_input(error, kind) from error


async def _read_fields(request: Request) -> Fields:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        limits = {"max_files": MAX_FORM_FILES, "max_fields": MAX_FORM_FIELDS, "max_part_size": MAX_PART_BYTES}
        async with request.form(**limits) as form:
            return unbracket(form.multi_items())
    raw = await request.body()
    # `curl -d '{…}'` without a header calls its JSON a form.
    if content_type == "application/x-www-form-urlencoded" and not raw.lstrip().startswith(b"{"):
        return unbracket(_split_form(raw))
    return _decode_object("body", raw)


def _split_form(raw: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
    except ValueError as error:
        raise InvalidInput("body", f"is no form: {error}") from error


def _decode_object(field: str, raw: bytes | str) -> Fields:
    try:
        return msgspec.json.decode(raw, type=Fields)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidInput(field, f"is no JSON object: {error}", code="invalid_json") from error


def unbracket(pairs: Iterable[tuple[str, Any]]) -> Fields:
    """Form fields as clients flatten them: ``a=1``, ``b[c]=2``, ``d[]=3`` -> ``{a: 1, b: {c: 2}, d: [3]}``.

    Raises:
        InvalidInput: a field is given twice, or as two different things.
    """
    fields: Fields = {}
    for name, value in pairs:
        is_item = name.endswith("[]")
        outer, *inner = _split_brackets(name.removesuffix("[]"))
        if "" in inner:
            raise InvalidInput(name, "is a list of something else than values")
        place, key = fields, outer
        for part in inner:
            place, key = _descend(place, key, name), part
        if is_item:
            items = place.setdefault(key, [])
            if not isinstance(items, list):
                raise InvalidInput(name, "is given as a list and as something else")
            items.append(value)
        elif key in place:
            raise InvalidInput(name, "is given twice")
        else:
            place[key] = value
    return fields


def _split_brackets(name: str) -> list[str]:
    """``a[b][c]`` -> a, b, c; anything else is one name."""
    return re.split(r"\]\[|\[", name.removesuffix("]")) if name.endswith("]") else [name]


def _descend(place: Fields, key: str, name: str) -> Fields:
    inner = place.setdefault(key, {})
    if not isinstance(inner, dict):
        raise InvalidInput(name, "is given as an object and as something else")
    return inner


def _merge_nested(fields: Fields) -> Fields:
    for name in NESTED:
        nested = fields.pop(name, None)
        if nested is None:
            continue
        if isinstance(nested, str):
            nested = _decode_object(name, nested)
        if not isinstance(nested, dict):
            raise InvalidInput(name, "is no object")
        for key, value in nested.items():
            if fields.setdefault(key, value) != value:
                raise InvalidInput(key, f"is given twice, outside of {name} and in it")
    return fields


def _as_invalid_input(error: ValidationError, kind: type[Generation]) -> InvalidInput:
    """The first complaint in OpenAI's words."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "missing":
        return InvalidInput(field, "is required", code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return InvalidInput(field, f"is no parameter of this endpoint{hint}", code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return InvalidInput(field, message[0].lower() + message[1:])


# ---- answers -----------------------------------------------------------------------------------------------------


def video_object(job: Job) -> dict[str, Any]:
    """OpenAI's Video, and what we know beyond it."""
    params = job.params
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None,
        "error": error_object(job) if job.error_code is not None else None,
        "prompt": params.prompt,
        "seconds": f"{params.num_frames / params.fps:g}",
        "size": f"{params.width}x{params.height}",
        "remixed_from_video_id": None,
        "seed": params.seed,
        "fps": params.fps,
        "num_frames": params.num_frames,
        "num_inference_steps": params.num_inference_steps,
        "timings": job.timings,
        "eta_s": job.eta_s,
        "queue_position": job.queue_position,
        "stage": job.stage,
        "step": job.step,
    }


def error_object(job: Job) -> dict[str, Any]:
    """Why a job ended without a video."""
    kind = "server_error" if job.status == "failed" else "invalid_request_error"
    return error_body(job.error_message or "", kind, None, job.error_code)["error"]


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, dict[str, Any]]:
    """The one shape in which every OpenAI client reads an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, encoded by msgspec."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")
