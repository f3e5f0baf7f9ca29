"""/v1/models in OpenAI's shape, and /models with what the mesh really runs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from gateway.catalog import Model
from gateway.replies import reply
from gateway.services import Here
from runtime.errors import NotReady

router = APIRouter()


@router.get("/v1/models")
async def list_models(here: Here) -> Response:
    return reply({"object": "list", "data": [_card(model) for model in here.catalog]})


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, here: Here) -> Response:
    return reply(_card(here.catalog.find(model_id)))


@router.get("/models")
async def describe(here: Here) -> Response:
    """What the reference system's clients ask before anything else; it has one model only."""
    return reply(_description(here.catalog.default))


def _card(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "framemesh"} | _description(model)


def _description(served: Model) -> dict[str, Any]:
    model = served.mesh.model
    if model is None:
        raise NotReady(served.mesh.state.reason)
    card = served.card
    return {
        "model_path": model.model_path,
        "task_type": card.task_type,
        "pipeline_name": f"{card.family}_pipeline",
        "pipeline_class": card.pipeline_class,
        "num_gpus": model.layout.num_ranks,
        "dit_precision": model.dit_precision,
        "vae_precision": model.vae_precision,
    }
