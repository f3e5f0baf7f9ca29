"""/health: whether this process lives, whether a mesh behind it takes work, and whether pictures come out of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from gateway.openapi import Health, Live, Probed, answers
from gateway.overview import readiness
from gateway.replies import error_body, reply
from gateway.services import Here

router = APIRouter()

_READINESS = answers(Health) | {503: {"model": Health, "description": "Not ready, and why."}}
_PROBED = answers(Probed) | {503: {"model": Probed, "description": "No picture came, and why."}}


@router.get("/health/live", responses=answers(Live))
async def live() -> Response:
    return reply({"status": "live"})


@router.get("/health", responses=_READINESS)
@router.get("/health/ready", responses=_READINESS)
async def ready(here: Here) -> Response:
    """Ready as soon as one model is; what the others lack is told too."""
    state = here.catalog.state
    ranks = {"ranks_ready": state.ranks_ready, "num_ranks": state.num_ranks}
    about = {"reason": state.reason} | ranks | {"models": {model.name: readiness(model) for model in here.catalog}}
    if state.ready:
        return reply({"status": "ready"} | about)
    return _unavailable({"status": "draining" if state.draining else "not_ready"} | about, "model_loading")


@router.get("/health_generate", responses=_PROBED)
async def generate(here: Here, model: str | None = None) -> Response:
    """One step of the smallest picture, through the whole path; callers share one that runs."""
    served = here.catalog.find(model)
    outcome = await here.probe.run(served)
    about = {"model": served.name, "seconds": outcome.seconds}
    if not outcome.failure:
        return reply({"status": "ok"} | about)
    return _unavailable({"status": "failed", "reason": outcome.failure} | about, "probe_failed")


def _unavailable(about: dict[str, Any], code: str) -> Response:
    """The reason is told in OpenAI's shape as well."""
    error = error_body(f"{about['status']}: {about['reason']}", "server_error", None, code)
    return reply(about | error, 503, {"retry-after": "1"})
