"""How a gateway and its meshes stand, as plain objects for whoever looks: readiness, ranks, queues, configuration.

Asks the meshes, answers nobody: the routes do.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from gateway.catalog import Catalog, Model
from gateway.families import Snapshot
from gateway.mesh import Mesh
from runtime.config import Config
from runtime.protocol import Status
from runtime.sampling import SamplingParams

SECRET = re.compile("key|secret|token|password|credential|webhook", re.IGNORECASE)
"""Settings whose values are told to nobody; the URL of a webhook is often all that it takes to write to somebody."""
HIDDEN = "***"


def readiness(model: Model) -> dict[str, Any]:
    """Whether a model can be used now, and what is missing."""
    state = model.mesh.state
    return {name: getattr(state, name) for name in ("ready", "reason", "ranks_ready", "num_ranks")}


async def look(catalog: Catalog) -> list[Snapshot]:
    """Every mesh, all asked at once."""
    return await asyncio.gather(*(_snapshot(model, str(n), mesh) for model in catalog for n, mesh in _meshes(model)))


async def server_info(catalog: Catalog) -> dict[str, Any]:
    """The models and the meshes behind them."""
    models = [_model(model) for model in catalog]
    described = [(model, mesh) for model in catalog for _, mesh in _meshes(model)]
    seen = await look(catalog)
    meshes = [_mesh(model, mesh, one.status) for (model, mesh), one in zip(described, seen, strict=True)]
    return {"models": models, "meshes": meshes}


def public_config(config: Config) -> dict[str, Any]:
    """Every setting but the secret ones; of a URL neither the password nor the query."""
    return {name: _shown(name, value) for name, value in asdict(config).items()}


def _meshes(model: Model) -> list[tuple[int, Mesh]]:
    return list(enumerate(model.mesh.meshes))


async def _snapshot(model: Model, name: str, mesh: Mesh) -> Snapshot:
    status = await mesh.look()
    return Snapshot(model.name, name, status, mesh.stale, mesh.dropped_messages, mesh.dropped_chunks)


def _model(model: Model) -> dict[str, Any]:
    """By name alone while nobody has told what it is."""
    card = model.known or model.mesh.card
    if card is None:
        return {"id": model.name} | readiness(model)
    defaults = card.check(SamplingParams(prompt="any", seed=0))
    names = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "true_cfg_scale")
    return {
        "id": model.name,
        "family": card.family,
        "task_type": card.task_type,
        "pipeline_class": card.pipeline_class,
        "decode_streams": card.decode_streams,
        "defaults": {name: getattr(defaults, name) for name in names},
    } | readiness(model)


def _mesh(model: Model, mesh: Mesh, status: Status | None) -> dict[str, Any]:
    """What is known without the scheduler's answer comes from its last news."""
    state = model.mesh.state_of(mesh)
    known = {"model": model.name, "ready": state.ready, "reason": state.reason, "draining": state.draining}
    if status is None:
        unknown = dict.fromkeys(("layout", "policy", "queued", "running", "epoch", "cost_error"))
        return known | unknown | {"ranks": [], "step_times": [], "losses": state.losses}
    layout = status.layout
    return known | {
        "layout": {"cfg": layout.cfg, "ring": layout.ring, "ulysses": layout.ulysses, "num_ranks": layout.num_ranks},
        "policy": status.policy,
        "ranks": [_fields(rank) for rank in status.ranks],
        "queued": sum(status.queued.values()),
        "running": sum(job.stage != "queued" for job in status.jobs),
        "step_times": [_fields(time) for time in status.step_times],
        "epoch": status.epoch,
        "losses": status.losses,
        "cost_error": status.cost_error,
    }


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _shown(name: str, value: Any) -> Any:
    if SECRET.search(name) and value:
        return HIDDEN
    if isinstance(value, dict):
        return {key: _shown(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(name, inner) for inner in value]
    return _without_password(value) if isinstance(value, str) and "://" in value else value


def _without_password(url: str) -> str:
    """A URL without what may be secret in it: password, query, fragment."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{parts.scheme}://{name}{colon and f':{HIDDEN}'}{at}{host}{parts.path}"
