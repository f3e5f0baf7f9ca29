"""A request's state <-> one safetensors file with a header. Knows bytes and values, no folder, no thread.

A checkpoint is everything that the next step reads: the latents, the solver's history and counters, the RNG. What
`prepare` makes again from the parameters (timesteps, sigmas, embeddings) is not in it. A resume is exact or refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from runtime.errors import CheckpointUnusable, NotCheckpointable
from workers.state import RequestState

FORMAT = 1
LATENTS, GENERATOR = "latents", "generator"

SOLVER_FIELDS: dict[str, tuple[str, ...]] = {
    "UniPCMultistepScheduler": ("_step_index", "lower_order_nums", "this_order", "model_outputs", "last_sample"),
    "DPMSolverMultistepScheduler": ("_step_index", "lower_order_nums", "model_outputs"),
    "FlowMatchEulerDiscreteScheduler": ("_step_index",),
    "EulerDiscreteScheduler": ("_step_index",),
    "EulerAncestralDiscreteScheduler": ("_step_index",),
    "DDIMScheduler": (),
}
"""What `step` of a diffusers scheduler reads of the steps before, by class. Another class is not checkpointable."""

Scalar = bool | int | str | None


class TensorNote(msgspec.Struct, frozen=True):
    """Where a tensor is in the file, and what a safetensors file does not say of it."""

    name: str
    device: str
    strides: tuple[int, ...]
    """Kernels are chosen by memory format, so bits depend on it."""


Value = Scalar | TensorNote | list[Scalar | TensorNote]


class Header(msgspec.Struct, frozen=True):
    """The file's metadata: whose state it is, and its values that are no tensors."""

    format: int
    request_id: str
    step: int
    params: str
    """Digest of the `ResolvedParams`."""
    model: str
    """Digest of the model's configs and precisions."""
    solver: str
    """Class, and the version of diffusers that it is of."""
    latents: TensorNote
    generator: TensorNote | None
    """The RNG's state, of solvers whose step takes one."""
    fields: dict[str, Value]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state at one moment, by reference: solvers replace tensors, so these keep their values."""

    header: Header
    tensors: dict[str, torch.Tensor]


def digest(value: Any) -> str:
    """sha256 of anything that JSON can say, in hex."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def capture(state: RequestState, model: str) -> Snapshot:
    """What the step after `state.step` reads; copies lists and the RNG, and refers to tensors.

    Raises:
        NotCheckpointable: nobody has written down what this solver's next step reads.
    """
    solver, tensors = state.solver, {LATENTS: state.latents}
    fields = {name: _note(name, _field(state, name), tensors) for name in _fields_of(solver)}
    noise = None
    if state.draws_noise:
        assert state.generator is not None
        tensors[GENERATOR] = state.generator.get_state()
        noise = _note_tensor(GENERATOR, tensors[GENERATOR])
    header = Header(
        format=FORMAT,
        request_id=state.request.id,
        step=state.step,
        params=digest(state.params),
        model=model,
        solver=_solver_name(solver),
        latents=_note_tensor(LATENTS, state.latents),
        generator=noise,
        fields=fields,
    )
    return Snapshot(header, tensors)


def encode(snapshot: Snapshot) -> bytes:
    """The content of the file. Copies from the device, after all work that was queued on it before."""
    host = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in snapshot.tensors.items()}
    return save(host, {"framemesh": msgspec.json.encode(snapshot.header).decode()})


def restore(state: RequestState, path: Path, step: int, model: str) -> None:
    """Put a freshly prepared state where the file's was, to the bit; changes nothing of it on an error.

    Raises:
        CheckpointUnusable: the file cannot be read, or is not of this request, step, model and solver.
    """
    header, tensors = _read(path, state)
    expected = {
        "format": FORMAT,
        "request_id": state.request.id,
        "step": step,
        "params": digest(state.params),
        "model": model,
        "solver": _solver_name(state.solver),
    }
    for name, value in expected.items():
        if getattr(header, name) != value:
            raise _unusable(state, f"its {name} is {getattr(header, name)}, not {value}")
    if not 0 <= step <= state.params.num_inference_steps:
        raise _unusable(state, f"step {step} is none of {state.params.num_inference_steps}")
    if set(header.fields) != set(SOLVER_FIELDS.get(type(state.solver).__name__, ())):
        raise _unusable(state, f"its solver fields are {sorted(header.fields)}")
    if (header.generator is not None) != state.draws_noise:
        raise _unusable(state, "it has no RNG state that fits the solver")
    fields = {name: _value(state, note, tensors) for name, note in header.fields.items()}
    latents = _latents(state, header, tensors)
    generator = state.generator if header.generator is None else _generator(state, header.generator, tensors)
    state.latents, state.generator, state.step = latents, generator, step
    for name, value in fields.items():
        setattr(state.solver, name, value)


def _fields_of(solver: Any) -> tuple[str, ...]:
    name = type(solver).__name__
    if name not in SOLVER_FIELDS:
        raise NotCheckpointable(f"no checkpoints with {name}: its state is not known; known are {[*SOLVER_FIELDS]}")
    if getattr(solver, "solver_p", None) is not None:
        raise NotCheckpointable(f"no checkpoints with {name} and a solver_p: that has a state of its own")
    return SOLVER_FIELDS[name]


def _field(state: RequestState, name: str) -> Any:
    """Some fields appear with the first step; None before it says the same to every listed solver."""
    if state.step > 0 and not hasattr(state.solver, name):
        raise NotCheckpointable(f"{_solver_name(state.solver)} has no {name}")
    return getattr(state.solver, name, None)


def _note(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The header's word for a field; its tensors go into `tensors`."""
    match value:
        case torch.Tensor():
            tensors[f"solver.{name}"] = value
            return _note_tensor(f"solver.{name}", value)
        case list():
            return [_note(f"{name}.{index}", entry, tensors) for index, entry in enumerate(value)]
        case bool() | int() | str() | None:
            return value
    raise NotCheckpointable(f"the solver's {name} is a {type(value).__name__}, which no checkpoint holds")


def _note_tensor(name: str, tensor: torch.Tensor) -> TensorNote:
    return TensorNote(name, tensor.device.type, tensor.stride())


@cache
def _diffusers() -> str:
    return version("diffusers")


def _solver_name(solver: Any) -> str:
    return f"{type(solver).__name__} {_diffusers()}"


def _read(path: Path, state: RequestState) -> tuple[Header, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = msgspec.json.decode((file.metadata() or {}).get("framemesh", ""), type=Header)
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise _unusable(state, str(error).replace(str(path), path.name)) from error


def _latents(state: RequestState, header: Header, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    latents, prepared = _tensor(state, header.latents, tensors), state.latents
    if (latents.shape, latents.dtype, latents.device) != (prepared.shape, prepared.dtype, prepared.device):
        raise _unusable(
            state,
            f"its latents are {tuple(latents.shape)} {latents.dtype} on {latents.device}, "
            f"not {tuple(prepared.shape)} {prepared.dtype} on {prepared.device}",
        )
    return latents


def _generator(state: RequestState, note: TensorNote, tensors: dict[str, torch.Tensor]) -> torch.Generator:
    generator = torch.Generator("cpu")
    try:
        generator.set_state(_tensor(state, note, tensors))
    except (RuntimeError, TypeError) as error:
        raise _unusable(state, f"its RNG state: {error}") from error
    return generator


def _value(state: RequestState, note: Value, tensors: dict[str, torch.Tensor]) -> Any:
    match note:
        case TensorNote():
            tensor = _tensor(state, note, tensors)
            if tensor.ndim and tensor.shape != state.latents.shape:
                raise _unusable(state, f"{note.name} is {tuple(tensor.shape)}, not {tuple(state.latents.shape)}")
            return tensor
        case list():
            return [_value(state, entry, tensors) for entry in note]
        case _:
            return note


def _tensor(state: RequestState, note: TensorNote, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A copy in the memory format and on the kind of device that it had."""
    if note.name not in tensors:
        raise _unusable(state, f"{note.name} is missing")
    if note.device not in {"cpu", state.latents.device.type}:
        raise _unusable(state, f"{note.name} was on {note.device}, the model is on {state.latents.device.type}")
    stored = tensors[note.name]
    if len(note.strides) != stored.ndim or min(note.strides, default=0) < 0:
        raise _unusable(state, f"{note.name} has {stored.ndim} dimensions, not the strides {note.strides}")
    device = "cpu" if note.device == "cpu" else state.latents.device
    return torch.empty_strided(stored.shape, note.strides, dtype=stored.dtype, device=device).copy_(stored)


def _unusable(state: RequestState, why: str) -> CheckpointUnusable:
    return CheckpointUnusable(f"the checkpoint of {state.request.id} cannot be resumed: {why}")
