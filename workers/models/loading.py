"""Parts of a diffusers folder that every family loads alike, whole or as this rank's slices. safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from runtime.log import get_logger
from workers.parallel import fsdp

LANGUAGE_PREFIXES = ("model.language_model.", "model.")
"""Before the names of a vision-language model's text layers, as transformers 5 and as earlier ones save them."""

log = get_logger("loading")


def load_scheduler(folder: Path) -> Any:
    """The pipeline's own solver class with its own config; requests work on deep copies of it."""
    index = json.loads((folder / "model_index.json").read_text())
    library, name = index["scheduler"]
    assert library == "diffusers", library
    return getattr(diffusers, name).from_pretrained(folder / "scheduler")


@dataclass(frozen=True)
class Loader:
    """How the weights of a component come to this rank."""

    device: torch.device
    mesh: DeviceMesh | None = None
    """The shard group of FSDP; None: every rank holds everything."""

    def whole(self, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
        """A diffusers or transformers module with all its weights on the device."""
        return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(self.device).eval()

    def denoiser(self, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
        return self._sharded(cls, folder, dtype)

    def text_encoder(self, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
        return self._sharded(cls, folder, dtype)

    def language_model(self, cls: Any, inner: Any, folder: Path, dtype: torch.dtype) -> Any:
        """The `inner` language model of a vision-language `cls`, of which a text-only prompt needs nothing else."""
        if self.mesh is None:
            return self.whole(cls, folder, dtype).model.language_model
        return self._sharded(inner, folder, dtype, LANGUAGE_PREFIXES)

    def _sharded(self, cls: Any, folder: Path, dtype: torch.dtype, prefixes: tuple[str, ...] = ()) -> Any:
        if self.mesh is None:
            return self.whole(cls, folder, dtype)
        module = empty_module(cls, folder, dtype)
        fsdp.shard(module, self.mesh)
        fill(module, Weights(folder, prefixes), self.device, fsdp.local_slices, fsdp.with_local)
        fsdp.log_resident("weights loaded", module)
        return module


class Weights:
    """The safetensors files of one component; knows where each tensor is and how many bytes were read.

    The first of `prefixes` that a name in the files begins with is left out of it.
    """

    def __init__(self, folder: Path, prefixes: tuple[str, ...] = ()) -> None:
        self.bytes_read = 0
        self._files = {_without(prefixes, key): (file, key) for file in weight_files(folder) for key in _keys(file)}

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def read(self, key: str, part: tuple[slice, ...]) -> torch.Tensor:
        """A slice of a tensor; the rest of it stays on disk."""
        path, name = self._files[key]
        with safe_open(path, framework="pt") as file:
            view = file.get_slice(name)
            # A scalar cannot be sliced, and an empty slice need not be read.
            tensor: torch.Tensor = view[part] if part else file.get_tensor(name)
            # The slice is a view of the mapped file: only a copy lets go of it.
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read: those of the index, else the one of the usual name."""
    for name in ("diffusion_pytorch_model", "model"):
        index = folder / f"{name}.safetensors.index.json"
        if index.is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
    return sorted(folder.glob("*.safetensors"))


def _without(prefixes: tuple[str, ...], key: str) -> str:
    return key.removeprefix(next((prefix for prefix in prefixes if key.startswith(prefix)), ""))


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


@dataclass(frozen=True)
class Slot:
    """One parameter of a module: a tied one has several names and hangs in several places."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]

    def put(self, tensor: torch.Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, leaf in self.owners:
            module._parameters[leaf] = parameter


def slots(module: nn.Module) -> Iterator[Slot]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, known in names.items():
        places = [name.rpartition(".") for name in known]
        yield Slot(tuple(known), parameter, tuple((module.get_submodule(place), leaf) for place, _, leaf in places))


def empty_module(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The module as `from_pretrained` makes it, its parameters on the meta device; buffers are real."""
    with init_empty_weights(include_buffers=False):
        if issubclass(cls, diffusers.ModelMixin):
            module = cls.from_config(json.loads((folder / "config.json").read_text()))
        else:
            module = cls(cls.config_class.from_pretrained(folder))
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    for slot in slots(module):
        slot.put(torch.empty_like(slot.parameter, dtype=_dtype(module, slot, dtype)))
    return module.eval()


def fill(
    module: Any,
    weights: Weights,
    device: torch.device,
    part_of: Callable[[torch.Tensor], tuple[slice, ...]],
    wrap: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Give every parameter its values: `part_of` names this rank's slice, `wrap` makes the parameter of it.

    Raises:
        ValueError: the files lack a parameter.
    """
    for slot in slots(module):
        key = next((name for name in slot.names if name in weights), None)
        if key is None:
            raise ValueError(f"the weights of {type(module).__name__} lack {' or '.join(slot.names)}")
        local = weights.read(key, part_of(slot.parameter)).to(device=device, dtype=slot.parameter.dtype)
        slot.put(wrap(slot.parameter, local))
    for name, buffer in list(module.named_buffers()):
        place, _, leaf = name.rpartition(".")
        value = weights.read(name, ()).to(buffer.dtype) if name in weights else buffer
        module.get_submodule(place)._buffers[leaf] = value.to(device)


def _dtype(module: Any, slot: Slot, dtype: torch.dtype) -> torch.dtype:
    """What `from_pretrained` would cast the parameter to: both libraries keep some modules in fp32."""
    if not slot.parameter.is_floating_point():
        return slot.parameter.dtype
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    # transformers means the plain list for fp16 only, diffusers for every dtype.
    if isinstance(module, diffusers.ModelMixin) or dtype == torch.float16:
        kept |= set(module._keep_in_fp32_modules or ())
    words = {word for name in slot.names for word in name.split(".")}
    return torch.float32 if words & kept else dtype
