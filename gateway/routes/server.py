"""/server_info for people and /metrics for Prometheus: how this gateway and its meshes stand."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.media.metadata import version
from gateway.openapi import ServerInfo, answers
from gateway.overview import look, public_config, server_info
from gateway.replies import reply
from gateway.services import Here

router = APIRouter()

_TEXT = {"200": {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/server_info", responses=answers(ServerInfo))
async def info(here: Here) -> Response:
    """The meshes are asked at most twice a second, however many look."""
    about = {"version": version(), "uptime_s": round(time.monotonic() - here.started, 1)}
    return reply(about | await server_info(here.catalog) | {"config": public_config(here.config)})


@router.get("/metrics", openapi_extra={"responses": _TEXT})
async def metrics(request: Request, here: Here) -> Response:
    if not here.config.enable_metrics:
        raise HTTPException(404, "switched off; start the server with --enable-metrics")
    body, content_type = here.metrics.tell(await look(here.catalog), request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
