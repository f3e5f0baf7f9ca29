"""What layouts are chosen by: a model's sizes from its files, and constants of this machine. Loads no weights."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from launch.devices import Gpu, linked, memory_limit, visible_gpus
from runtime.choice import choose
from runtime.config import Config, fit_layout
from runtime.errors import InvalidInput
from runtime.folding import resolve_tp
from runtime.machine import Machine, load_machine
from runtime.models.card import Card, most_branches, read_configs, usual_request
from runtime.tune import Tuner, Weights

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LONGEST_HEADER = 100 << 20
"""Of a safetensors file, as its own library bounds it."""


def settle_layout(config: Config, folder: Path, card: Card) -> tuple[Config, tuple[str, ...]]:
    """The configuration with the layout that the mesh gets: as it was asked for, else chosen, with lines that say why.

    How many ranks share the text encoders follows from it.

    A launcher calls it once; every process of the mesh then gets the same integers.

    Raises:
        InvalidInput: what was asked for does not fit the model, or its weights cannot be read.
    """
    lines: tuple[str, ...] = ()
    if config.layout_is_open:
        config, lines = choose(config, tuner_for(config, folder, card), card.check(usual_request()))
    config = fit_layout(config, card, most_branches(card))
    # Sharded encoders hold 1/N already.
    if config.num_gpus == 1 or config.tp_size is not None or config.use_fsdp_inference:
        return config, lines
    tp, reason = resolve_tp(None, read_configs(folder), config.layout.sp, this_machine(config))
    return replace(config, tp_size=tp), (*lines, f"text encoders: {reason}") if config.layout.sp > 1 else lines


def tuner_for(config: Config, folder: Path, card: Card, machine: Machine | None = None) -> Tuner:
    """Of the model in a folder, on this machine or on the one that is given."""
    machine = this_machine(config) if machine is None else machine
    unused = dict(card.unused)
    if config.vae_config.load_encoder:
        del unused["vae"]
    return Tuner(card, read_configs(folder), read_weights(folder, machine.element, unused), machine)


# ---- the machine -------------------------------------------------------------------------------------------------


def this_machine(config: Config) -> Machine:
    """The shipped constants that are nearest to what the ranks run on, with the memory that each really has."""
    ranks = config.num_gpus * config.replicas
    gpus = [] if config.device == "cpu" else visible_gpus()
    if gpus and (len(gpus) >= ranks or config.dist_backend == "staged"):
        machine = _with_gpus(gpus, ranks)
    else:
        machine = msgspec.structs.replace(load_machine("cpu-gloo"), memory=memory_limit()[0] / ranks)
    if config.dit_precision is not None:
        machine = msgspec.structs.replace(machine, element=BYTES[config.dit_precision])
    return machine


def _with_gpus(gpus: list[Gpu], ranks: int) -> Machine:
    """By the fullest size of those that the ranks get, so that the same machine always gives the same layout."""
    chosen = sorted(gpus, key=lambda gpu: gpu.memory_total, reverse=True)[:ranks]
    machine = load_machine("h100-nvlink" if linked(chosen) else "h100-pcie")
    name = f"{chosen[0].name} by the constants of {machine.name}"
    return msgspec.structs.replace(machine, name=name, memory=chosen[-1].memory_total * min(len(chosen) / ranks, 1.0))


# ---- the model ---------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    name: str
    rows: int
    """Its first dimension."""
    numel: int


def read_weights(folder: Path, element: int, unused: Mapping[str, Sequence[str]]) -> Weights:
    """Sizes from the headers of the safetensors files; no tensor is read.

    Args:
        folder: of the model.
        element: bytes of a value of the denoiser and the text encoders.
        unused: submodules by component that no rank holds.

    Raises:
        InvalidInput: a file is none of safetensors.
    """

    def held(part: Path) -> list[_Tensor]:
        return [tensor for tensor in _tensors(part) if not _belongs(tensor.name, unused.get(part.name, ()))]

    denoiser = held(folder / "transformer")
    encoders = [held(part) for part in sorted(folder.glob("text_encoder*")) if part.is_dir()]
    return Weights(
        denoiser=element * _numel(denoiser),
        gathered=element * max(_gathered(part) for part in (denoiser, *encoders)),
        blocks=len(_blocks(denoiser)),
        encoders=element * sum(map(_numel, encoders)),
        # The VAE stays in fp32 unless it is told otherwise.
        vae=4 * _numel(held(folder / "vae")),
        row_bytes={rows: element * numel for rows, numel in _row_numels(denoiser).items()},
    )


def _belongs(name: str, submodules: Sequence[str]) -> bool:
    """Whether a tensor is in one of them, by its name or the older one without the language model around it."""
    return any(name.startswith((f"{part}.", f"{part.removeprefix('model.')}.")) for part in submodules)


def _numel(tensors: list[_Tensor]) -> int:
    return sum(tensor.numel for tensor in tensors)


def _row_numels(tensors: list[_Tensor]) -> Counter[int]:
    """First dimension -> values in one row of all tensors that have it."""
    found = Counter[int]()
    for tensor in tensors:
        found[tensor.rows] += tensor.numel // max(tensor.rows, 1)
    return found


def _blocks(tensors: list[_Tensor]) -> Counter[str]:
    """Values in each of the repeated blocks; what is in none belongs to the root."""
    blocks = Counter[str]()
    for name, _, numel in tensors:
        if block := re.match(r".*?\.\d+(?=\.)", name):
            blocks[block[0]] += numel
    return blocks


def _gathered(tensors: list[_Tensor]) -> int:
    """Values that a rank of a shard group has whole at once: root, block, next block and its buffer."""
    blocks = _blocks(tensors)
    return _numel(tensors) - blocks.total() + 3 * max(blocks.values(), default=0)


def _tensors(folder: Path) -> list[_Tensor]:
    """Those of a component."""
    found = dict[str, _Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = _header(file)
            found |= {name: _tensor(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
            raise InvalidInput("model_path", f"{file} cannot be read as safetensors: {error}") from error
    return list(found.values())


def _tensor(name: str, shape: list[int]) -> _Tensor:
    return _Tensor(name, shape[0] if shape else 1, math.prod(shape))


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > LONGEST_HEADER:
            raise ValueError(f"its header would have {length} bytes")
        header: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
    return header
