"""Parts of a diffusers folder that every family loads alike, whole or as this rank's slices. safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from runtime.log import get_logger
from workers.parallel import encoder, fsdp
from workers.parallel.comm import Group

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
    tensor_group: Group | None = None
    """The ranks that share the layers of the text encoders; None: every rank computes all of them."""

    def whole(self, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
        """A diffusers or transformers module with all its weights on the device."""
        return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(self.device).eval()

    def vae(self, cls: Any, folder: Path, dtype: torch.dtype, with_encoder: bool | None) -> Any:
        """An autoencoder; unset, without the half that nobody calls on the way from text to pixels."""
        vae = self.whole(cls, folder, dtype)
        if not with_encoder:
            # A module without layers: some go through the encoder's too when they empty their caches.
            vae.encoder, vae.quant_conv = nn.Module(), None
        return vae

    def denoiser(self, cls: Any, folder: Path, dtype: torch.dtype) -> Any:
        return self.whole(cls, folder, dtype) if self.mesh is None else self._sharded(cls, folder, dtype, "", ())

    def text_encoder(
        self, cls: Any, folder: Path, dtype: torch.dtype, *, used: str = "", unused: tuple[str, ...] = ()
    ) -> Any:
        """A text encoder: whole, split by layers over `tensor_group`, or sharded over `mesh`.

        Args:
            cls: class of the weights in the folder.
            folder: of the component.
            dtype: what it computes in.
            used: the submodule that will be called, by name; unset: the module itself.
            unused: submodules that nobody calls (a vision tower, a language head), which are not held at all.
        """
        plan = encoder.PLANS.get(cls.__name__)
        if self.tensor_group is not None and plan is not None:
            return self._split(cls, folder, dtype, used, unused, plan, self.tensor_group)
        if self.mesh is not None:
            return self._sharded(cls, folder, dtype, used, unused)
        module = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
        _drop(module, unused)
        return module.to(self.device).get_submodule(used)

    def _sharded(self, cls: Any, folder: Path, dtype: torch.dtype, used: str, unused: tuple[str, ...]) -> Any:
        assert self.mesh is not None
        module = empty_module(cls, folder, dtype)
        # Before the classes get their FSDP names, by which transformers does not know them.
        weights = Weights(folder, module)
        _drop(module, unused)
        # FSDP gathers what its root holds when the root is called: that is the part which will be.
        root = module.get_submodule(used)
        fsdp.shard(root, self.mesh)
        fill(module, weights, self.device, fsdp.local_slices, fsdp.with_local)
        fsdp.log_resident("weights loaded", root)
        return root

    def _split(
        self,
        cls: Any,
        folder: Path,
        dtype: torch.dtype,
        used: str,
        unused: tuple[str, ...],
        plan: encoder.TensorPlan,
        group: Group,
    ) -> Any:
        module = empty_module(cls, folder, dtype)
        weights = Weights(folder, module)
        _drop(module, unused)
        parts = encoder.parts(module, plan, group)
        fill(module, weights, self.device, lambda p: parts.get(p) or encoder.whole(p), lambda _, mine: mine)
        encoder.split(module, plan, group)
        return module.get_submodule(used)


def _drop(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, None)


class Weights:
    """The safetensors files of one component; knows where each tensor is and how many bytes were read."""

    def __init__(self, folder: Path, module: Any) -> None:
        self.bytes_read = 0
        self._files = {key: file for file in weight_files(folder) for key in _keys(file)}
        self._keys = _names_in(module, self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the tensor that the module calls so; the rest of it stays on disk."""
        key = self._keys[name]
        with safe_open(self._files[key], framework="pt") as file:
            view = file.get_slice(key)
            # A scalar cannot be sliced, and an empty slice need not be read.
            tensor: torch.Tensor = view[part] if part else file.get_tensor(key)
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


def _names_in(module: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in the module -> key in the files: transformers renamed some modules after their weights were saved."""
    names = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
    renames = get_model_conversion_mapping(module) if isinstance(module, PreTrainedModel) else []
    found = {}
    for key in keys:
        name = key
        for rename in renames:
            if name in names:
                break
            name, _ = rename.rename_source_key(name)
        found[name] = key
    return found


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
    part_of: Callable[[nn.Parameter], tuple[slice, ...]],
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
