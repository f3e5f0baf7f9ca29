"""What goes out: OpenAI's objects and errors as JSON, and what we know beyond them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

from gateway.jobs.store import Job

CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's `type` of an error; all others below 500 are the request's own."""
NO_RETRY = {"x-should-retry": "false"}
"""The OpenAI SDK repeats whatever answers 5xx unless it is told that nothing would change."""


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
        "remixed_from_video_id": job.asked.remixed_from,
        "seed": params.seed,
        "fps": params.fps,
        "num_frames": params.num_frames,
        "num_inference_steps": params.num_inference_steps,
        "timings": job.timings,
        "eta_s": job.eta_s,
        "queue_position": job.queue_position,
        "stage": job.stage,
        "step": job.step,
        "warnings": job.asked.warnings,
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


def error_reply(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    return reply(error_body(message, kind, param, code), status, headers)


def retry_after(seconds: float) -> dict[str, str]:
    """Headers that say when to come back: whole seconds for everybody, milliseconds for who reads them."""
    return {"retry-after": str(max(math.ceil(seconds), 1)), "retry-after-ms": str(max(math.ceil(seconds * 1000), 1))}
