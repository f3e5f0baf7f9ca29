"""/health: whether this process lives, and whether the mesh behind it takes work."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from gateway.openapi import Health, Live, answers
from gateway.replies import reply
from gateway.services import Here

router = APIRouter(prefix="/health")

_READINESS = answers(Health) | {503: {"model": Health, "description": "Not ready, and why."}}


@router.get("/live", responses=answers(Live))
async def live() -> Response:
    return reply({"status": "live"})


@router.get("", responses=_READINESS)
@router.get("/ready", responses=_READINESS)
async def ready(here: Here) -> Response:
    state = here.catalog.default.mesh.state
    answer = {"reason": state.reason, "ranks_ready": state.ranks_ready, "num_ranks": state.num_ranks}
    if state.ready and not state.draining:
        return reply({"status": "ready"} | answer)
    return reply({"status": "draining" if state.draining else "not_ready"} | answer, 503, {"retry-after": "1"})
