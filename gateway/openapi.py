"""The description of the API: what every answer looks like, and the finish on what FastAPI writes. Decides nothing.

Answers are dictionaries that msgspec encodes; the models here only describe them, and the fuzz tests hold them to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from gateway.auth import needs_no_key
from gateway.jobs.store import Status
from gateway.media.formats import VideoFormat
from runtime.config import Config

DESCRIPTION = """\
Images and videos from diffusion models, in the shapes of OpenAI's Images and Videos API, with frames while they are
made. Every error has the same shape and every answer an `x-request-id`. Further fields may appear in any object.
Bodies may be JSON, multipart or URL-encoded; in forms, nested fields are written `a[b]` and lists `a[]`.
"""
MAKES = {"Video": ("video_id", "$response.body#/id"), "Images": ("image_id", "$response.body#/data/0/id")}
"""Answers that carry a new id: the parameter that takes it elsewhere, and where it is."""
TOKEN_PATHS = ("/v1/videos/{video_id}", "/v1/images/{image_id}")
"""What can be read with a token in the query as well."""
HTTP_METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
REF = "#/components/schemas/"
Json = dict[str, Any]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Why there is nothing better to answer: `param` names the field at fault, `code` is for programs."""

    error: ErrorObject


class Usage(BaseModel):
    """What a generation took of the mesh."""

    queue_s: float
    rank_seconds: float
    attempts: int
    peak_memory_mb: float


class TokenCounts(BaseModel):
    text_tokens: int
    image_tokens: int


class ImagesUsage(Usage):
    """OpenAI's token counts, and what all images of a call took together."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: TokenCounts


class ServerInfo(BaseModel):
    version: str
    uptime_s: float
    models: list[dict[str, Any]]
    meshes: list[dict[str, Any]]
    config: dict[str, Any]


class Video(BaseModel):
    """OpenAI's Video, and what we know beyond it."""

    id: str
    object: Literal["video"]
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error: ErrorObject | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None
    seed: int
    fps: int
    num_frames: int
    num_inference_steps: int
    output_format: VideoFormat
    timings: dict[str, float]
    usage: Usage
    finished_reason: str | None
    eta_s: float | None
    queue_position: int | None
    stage: str
    step: int
    warnings: list[str]


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class Image(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    id: str
    seed: int
    timings: dict[str, float]
    usage: Usage


class Images(BaseModel):
    """OpenAI's ImagesResponse, and what we know beyond it."""

    created: int
    data: list[Image]
    output_format: str
    size: str
    quality: str
    background: str
    usage: ImagesUsage
    warnings: list[str]


class ModelDescription(BaseModel):
    model_path: str
    task_type: str
    pipeline_name: str
    pipeline_class: str
    num_gpus: int
    dit_precision: str
    vae_precision: str


class ModelObject(BaseModel):
    """`root` is the name that answers carry; what the mesh runs is told once it is loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    model_path: str = ""
    task_type: str = ""
    pipeline_name: str = ""
    pipeline_class: str = ""
    num_gpus: int = 0
    dit_precision: str = ""
    vae_precision: str = ""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelObject]


class Token(BaseModel):
    object: Literal["token"]
    token: str
    video_id: str
    expires_at: int


class Probed(BaseModel):
    status: Literal["ok", "failed"]
    model: str
    seconds: float


class Live(BaseModel):
    status: Literal["live"]


class Health(BaseModel):
    status: Literal["ready", "draining", "not_ready"]
    reason: str
    ranks_ready: int
    num_ranks: int
    models: dict[str, Any]


ERRORS: dict[int | str, Json] = {
    "4XX": {"model": ErrorAnswer, "description": "The request, the key or the moment is wrong."},
    "5XX": {"model": ErrorAnswer, "description": "The server failed, or cannot take work now (503)."},
}
"""Of every route."""


def answers(kind: type[BaseModel], description: str = "Done.", *, stream: bool = False) -> dict[int | str, Json]:
    """What a route answers when all is well, for its decorator; with `stream` it may be told as events too."""
    events = {"content": {"text/event-stream": {"schema": {"type": "string"}}}} if stream else {}
    return {200: {"model": kind, "description": description} | events}


def answers_bytes(*media_types: str, description: str = "The file.", ranges: bool = False) -> dict[int | str, Json]:
    """Likewise for a file; with `ranges` a part of it too."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}
    found: dict[int | str, Json] = {200: {"content": content, "description": description}}
    if ranges:
        some = {"multipart/byteranges": {"schema": {"type": "string", "format": "binary"}}}
        found[206] = {"content": content | some, "description": "The part that the header Range asks for."}
        found[302] = {"description": "It lies in an object store: where, for a while."}
        found[304] = {"description": "The client has it already."}
    return found


def body_of(kind: type[BaseModel]) -> Json:
    """`openapi_extra` for a route that reads its body with `gateway.body.read_body`."""
    content = {"schema": kind.model_json_schema()}
    forms = ("application/json", "multipart/form-data", "application/x-www-form-urlencoded")
    return {"requestBody": {"required": True, "content": dict.fromkeys(forms, content)}}


def describe(app: FastAPI, config: Config, models: Sequence[str], *, protected: bool) -> None:
    """Have the application describe itself.

    Args:
        app: with all its routes.
        config: says what needs no key, and whether `model` may hold any name.
        models: the names that it may hold otherwise.
        protected: whether API keys are asked for.
    """

    def openapi() -> Json:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
            app.openapi_schema = _finish(found, None if config.allow_any_model else models)
            if protected:
                _protect(found, config.protect_metrics)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _finish(found: Json, models: Sequence[str] | None) -> Json:
    components = found.setdefault("components", {}).setdefault("schemas", {})
    for _, operation in _operations(found):
        for media in operation.get("requestBody", {}).get("content", {}).values():
            media["schema"] = _hoist(media["schema"], components, models)
        for status, answer in operation["responses"].items():
            answer.setdefault("headers", {})["x-request-id"] = {"schema": {"type": "string"}, "required": True}
            if status in ERRORS:
                # FastAPI takes the errors of a stream for a stream.
                answer["content"] = {"application/json": {"schema": {"$ref": f"{REF}{ErrorAnswer.__name__}"}}}
    _link(found)
    return found


def _protect(found: Json, protect_metrics: bool) -> None:
    """Say what wants a key, and where a token will do."""
    scheme = {"type": "http", "scheme": "bearer", "description": "An API key of this server."}
    token = {"type": "apiKey", "in": "query", "name": "token", "description": "Made by POST /v1/tokens."}
    found["components"]["securitySchemes"] = {"api_key": scheme, "token": token}
    for path, operation in _operations(found):
        if not needs_no_key(path, protect_metrics=protect_metrics):
            by_token = operation is found["paths"][path].get("get") and path.startswith(TOKEN_PATHS)
            operation["security"] = [{"api_key": []}, *([{"token": []}] if by_token else [])]


def _link(found: Json) -> None:
    """Say where the ids come from that other operations want."""
    operations = list(_operations(found))
    for _, operation in operations:
        content = operation["responses"].get("200", {}).get("content", {})
        made = content.get("application/json", {}).get("schema", {}).get("$ref", "").removeprefix(REF)
        if made in MAKES and "requestBody" in operation:
            parameter, place = MAKES[made]
            operation["responses"]["200"]["links"] = {
                other["operationId"]: {"operationId": other["operationId"], "parameters": {parameter: place}}
                for path, other in operations
                if f"{{{parameter}}}" in path
            }


def _operations(found: Json) -> Iterator[tuple[str, Json]]:
    for path, item in found["paths"].items():
        yield from ((path, operation) for method, operation in item.items() if method in HTTP_METHODS)


def _hoist(schema: Json, components: Json, models: Sequence[str] | None) -> Json:
    """A body's schema among the components, with everything that it refers to; a reference to it is left."""
    if "$ref" in schema:
        return schema
    schema = copy.deepcopy(schema)
    for name, inner in schema.pop("$defs", {}).items():
        components[name] = _refer(inner)
    if models is not None and "model" in schema.get("properties", {}):
        schema["properties"]["model"] = {"enum": [*models, None]}
    name = schema["title"]
    components[name] = _refer(_with_nulls(schema))
    return {"$ref": REF + name}


def _with_nulls(schema: Json) -> Json:
    """What is not required may be null: it then says nothing."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if (
            name not in required
            and {"type": "null"} not in field.get("anyOf", ())
            and None not in field.get("enum", ())
        ):
            told = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **told}
    return schema


def _refer(schema: Any) -> Any:
    """The same with references into the components."""
    if isinstance(schema, list):
        return [_refer(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _refer(inner) for key, inner in schema.items()}
    if isinstance(found.get("$ref"), str):
        found["$ref"] = found["$ref"].replace("#/$defs/", REF)
    return found
