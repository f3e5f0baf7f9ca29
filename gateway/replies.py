"""What goes out: OpenAI's objects and errors as JSON, and what we know beyond them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from gateway.jobs.store import Job
from runtime.protocol import CANCELLED, TIMED_OUT, Usage

FAILURES = {"out_of_memory": 400, CANCELLED: 400, TIMED_OUT: 400, "draining": 503, "gateway_lost": 503}
"""Status of a call that waited for work that failed, by the reason's code; everything else is 500. What a timeout of
the client's own ended would end so again: no status may make an SDK repeat it."""
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
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "error": error_object(job) if job.error_code is not None else None,
        "prompt": params.prompt,
        "seconds": f"{params.num_frames / params.fps:g}",
        "size": f"{params.width}x{params.height}",
        "remixed_from_video_id": job.asked.remixed_from,
        "seed": params.seed,
        "fps": params.fps,
        "num_frames": params.num_frames,
        "num_inference_steps": params.num_inference_steps,
        "output_format": job.asked.output_format,
        "timings": job.timings,
        "usage": usage_object(job.usage),
        "finished_reason": _finished_reason(job),
        "eta_s": job.eta_s,
        "queue_position": job.queue_position,
        "stage": job.stage,
        "step": job.step,
        "warnings": job.asked.warnings,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """What a generation took of the mesh; zeros until it has ended. Memory is that of the fullest rank, in MiB."""
    return {
        "queue_s": round(usage.queue_s, 6),
        "rank_seconds": round(usage.rank_seconds, 6),
        "attempts": usage.attempts,
        "peak_memory_mb": round(usage.peak_memory_bytes / 2**20, 1),
    }


def _finished_reason(job: Job) -> str | None:
    """The word that the metrics count it under: completed, cancelled, or the code of its failure."""
    if not job.finished:
        return None
    return job.status if job.status != "failed" else job.error_code or "failed"


def total_usage(text_tokens: int, usages: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's token counts, and beside them what all images of a call took together.

    The prompt's tokens are read once, by all of them; a diffusion model writes none, whatever the size.
    """
    together = Usage(
        queue_s=sum(usage.queue_s for usage in usages),
        rank_seconds=sum(usage.rank_seconds for usage in usages),
        attempts=sum(usage.attempts for usage in usages),
        peak_memory_bytes=max(usage.peak_memory_bytes for usage in usages),
    )
    tokens = {
        "total_tokens": text_tokens,
        "input_tokens": text_tokens,
        "output_tokens": 0,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
    }
    return tokens | usage_object(together)


def error_object(job: Job) -> dict[str, Any]:
    """Why a job ended without a video."""
    kind = "invalid_request_error" if job.error_code in {CANCELLED, TIMED_OUT} else "server_error"
    return error_body(job.error_message or "", kind, None, job.error_code)["error"]


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, dict[str, Any]]:
    """The one shape in which every OpenAI client reads an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure(code: str, reason: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Status and body for a call whose work failed."""
    status = FAILURES.get(code, 500)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, error_body(reason, kind, None, code)


def failure_reply(code: str, reason: str) -> Response:
    """To a call that waited for work that failed; only where a second try may end better is one invited."""
    status, body = failure(code, reason)
    return reply(body, status, {"retry-after": "5"} if status == 503 else {"x-should-retry": "false"})


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
