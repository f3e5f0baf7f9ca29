"""/v1/tokens: short-lived addresses for what cannot send an API key, such as a video element of a page."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from gateway.auth import TOKEN_S, caller, token_for
from gateway.body import read_body
from gateway.jobs.outputs import VIDEO_ID
from gateway.openapi import Token, answers, body_of
from gateway.replies import reply
from gateway.routes.videos import existing
from gateway.services import Here

router = APIRouter(prefix="/v1/tokens")


class TokenCreate(BaseModel):
    """The body of POST /v1/tokens."""

    model_config = ConfigDict(extra="forbid")

    video_id: Annotated[str, Field(pattern=f"^{VIDEO_ID.pattern}$", max_length=64)]
    expires_in: Annotated[int, Field(ge=1, le=86_400, description="seconds")] = int(TOKEN_S)


@router.post("", openapi_extra=body_of(TokenCreate), responses=answers(Token))
async def create(request: Request, here: Here) -> Response:
    """A token for `?token=` of GET /v1/videos/{id} and everything below it; empty where no key is asked for."""
    body = await read_body(request, TokenCreate)
    job = await existing(body.video_id, request, here)
    token, until = token_for(caller(request), job.id, body.expires_in)
    return reply({"object": "token", "token": token, "video_id": job.id, "expires_at": until})
