"""/v1/models in OpenAI's shape, and /models with what the mesh really runs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from gateway.catalog import Model
from gateway.openapi import ModelDescription, ModelList, ModelObject, answers
from gateway.replies import reply
from gateway.services import Here
from runtime.errors import NotReady

router = APIRouter()


@router.get("/v1/models", responses=answers(ModelList))
async def list_models(here: Here) -> Response:
    """Every name under which a model is served; `root` is the one that its answers carry. Models that are still loading
    come by name alone; 503 until one is loaded."""
    if all(model.mesh.model is None for model in here.catalog):
        raise NotReady(here.catalog.state.reason)
    data = [_card(model, name) for model in here.catalog for name in (model.name, *model.aliases)]
    return reply({"object": "list", "data": data})


@router.get("/v1/models/{model_id:path}", responses=answers(ModelObject))
async def retrieve_model(model_id: str, here: Here) -> Response:
    model = here.catalog.find(model_id)
    return reply(_card(model, model_id) | _description(model))


@router.get("/models", responses=answers(ModelDescription))
async def describe(here: Here) -> Response:
    """What the reference system's clients ask before anything else; it has one model only."""
    return reply(_description(here.catalog.default))


def _card(model: Model, name: str) -> dict[str, Any]:
    known = {"id": name, "object": "model", "created": 0, "owned_by": "framemesh", "root": model.name}
    return known if model.mesh.model is None else known | _description(model)


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
