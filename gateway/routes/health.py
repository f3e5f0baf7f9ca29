"""/health: whether this process lives, and whether a mesh behind it takes work."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from gateway.replies import reply
from gateway.services import Here

router = APIRouter(prefix="/health")


@router.get("/live")
async def live() -> Response:
    return reply({"status": "live"})


@router.get("")
@router.get("/ready")
async def ready(here: Here) -> Response:
    state = here.catalog.state
    answer = {"reason": state.reason, "ranks_ready": state.ranks_ready, "num_ranks": state.num_ranks}
    if state.ready and not state.draining:
        return reply({"status": "ready"} | answer)
    return reply({"status": "draining" if state.draining else "not_ready"} | answer, 503, {"retry-after": "1"})
