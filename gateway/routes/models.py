"""/v1/models in OpenAI's shape, and /models with what the mesh really runs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from gateway.mesh import Mesh
from gateway.schema import reply
from runtime.errors import InvalidInput, NotReady
from runtime.models.card import card_for
from runtime.protocol import ModelInfo

router = APIRouter()


def _model(request: Request) -> ModelInfo:
    mesh: Mesh = request.app.state.mesh
    if mesh.model is None:
        raise NotReady(mesh.state.reason)
    return mesh.model


Model = Annotated[ModelInfo, Depends(_model)]


@router.get("/v1/models")
async def list_models(model: Model) -> Response:
    return reply({"object": "list", "data": [_card(model)]})


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, model: Model) -> Response:
    if model_id != model.name:
        message = f"{model_id!r} does not exist here; this server has {model.name!r}"
        raise InvalidInput("model", message, code="model_not_found")
    return reply(_card(model))


@router.get("/models")
async def describe(model: Model) -> Response:
    return reply(_description(model))


def _card(model: ModelInfo) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "framemesh"} | _description(model)


def _description(model: ModelInfo) -> dict[str, Any]:
    card = card_for(model.configs)
    return {
        "model_path": model.model_path,
        "task_type": card.task_type,
        "pipeline_name": f"{card.family}_pipeline",
        "pipeline_class": card.pipeline_class,
        "num_gpus": model.layout.num_ranks,
        "dit_precision": model.dit_precision,
        "vae_precision": model.vae_precision,
    }
