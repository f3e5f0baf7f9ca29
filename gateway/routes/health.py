"""/health: whether this process lives, whether a mesh behind it takes work, and whether pictures come out of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from gateway.catalog import Model
from gateway.overview import readiness
from gateway.replies import error_body, reply
from gateway.services import Here

router = APIRouter()


@router.get("/health/live")
async def live() -> Response:
    return reply({"status": "live"})


@router.get("/health")
@router.get("/health/ready")
async def ready(here: Here) -> Response:
    """Ready as soon as one model is; what the others lack is told too."""
    models = {model.name: readiness(model) for model in here.catalog}
    of = next((name for name, about in models.items() if about["ready"]), here.catalog.default.name)
    about = {name: models[of][name] for name in ("reason", "ranks_ready", "num_ranks")} | {"models": models}
    if models[of]["ready"]:
        return reply({"status": "ready"} | about)
    return _unavailable({"status": _status(here.catalog.find(of))} | about, "model_loading")


@router.get("/health_generate")
async def generate(here: Here, model: str | None = None) -> Response:
    """One step of the smallest picture, through the whole path; callers share one that runs."""
    served = here.catalog.find(model)
    outcome = await here.probe.run(served)
    about = {"model": served.name, "seconds": outcome.seconds}
    if not outcome.failure:
        return reply({"status": "ok"} | about)
    return _unavailable({"status": "failed", "reason": outcome.failure} | about, "probe_failed")


def _status(model: Model) -> str:
    return "draining" if model.mesh.state.draining else "not_ready"


def _unavailable(about: dict[str, Any], code: str) -> Response:
    """The reason is told in OpenAI's shape as well."""
    error = error_body(f"{about['status']}: {about['reason']}", "server_error", None, code)
    return reply(about | error, 503, {"retry-after": "1"})
