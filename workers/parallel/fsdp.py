"""FSDP2 for inference: every rank holds 1/n of the weights, a block is whole only while it computes.

    weight  (R, …)  --fully_shard-->  (R/n, …) per rank  --all-gather before its block-->  (R, …)  --freed after-->

The next block's all-gather runs while this one computes. PyTorch FSDP (arXiv 2304.11277), per-parameter sharding.
Forwards gather weights over the whole group, so its members run the same forwards in the same order; all of them
under `torch.inference_mode`, for a buffer that was made in one mode cannot be filled in the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from runtime.log import get_logger
from workers.parallel.groups import new_group

REPORT_AFTER = 10
"""Forwards after which a sharded module says what it holds: as much as after loading, or something stays gathered."""

KEPT_SHARE = 0.1
"""Share of a module's weights that may stay whole on every rank without a warning."""

log = get_logger("fsdp")


def shard_mesh(num_ranks: int, device: torch.device) -> DeviceMesh | None:
    """All ranks as one shard group, with a communicator of its own; None for one rank, who has nothing to share.

    Every rank has to call it, in the same order as it makes its other groups.
    """
    if num_ranks == 1:
        return None
    return DeviceMesh.from_group(new_group(range(num_ranks)), device.type)


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard each repeated block and then the module itself over the mesh; its weights may be on the meta device.

    FSDP gathers weights of one dtype per block: those of another dtype than most (norms and embedders that are kept
    in fp32) stay whole on every rank.
    """
    kept = minor_dtype_parameters(module)
    warn_of_kept(module, kept)
    blocks = repeated_blocks(module)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    # Without a sharded root every block would be a root of its own, and roots stay gathered after a forward.
    root = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    sharded = [block for block in blocks if isinstance(block, FSDPModule)]
    for block, following in pairwise(sharded):
        block.set_modules_to_forward_prefetch([following])
    if mesh.device_type == "cpu":
        # CUDA gathers on a stream of its own; on the CPU only an asynchronous collective runs beside compute.
        root._set_unshard_async_op(True)
    module.register_forward_hook(_Report())


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of the outermost lists, in the order in which they run."""
    return [block for parent in _outermost_lists(module) for block in parent if any(True for _ in block.parameters())]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def minor_dtype_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of every dtype but the one that most bytes have."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        sizes[parameter.dtype] += parameter.nbytes
    most = sizes.most_common(1)[0][0]
    return {parameter for parameter in module.parameters() if parameter.dtype != most}


def warn_of_kept(module: nn.Module, kept: set[nn.Parameter]) -> None:
    """T5 in fp16, for one: transformers keeps a third of every feed-forward in fp32, and no rank is spared it."""
    share = sum(parameter.nbytes for parameter in kept) / whole_bytes([module])
    if share > KEPT_SHARE:
        log.warning("kept whole on every rank, for its dtype", module=type(module).__name__, share=round(share, 3))


def local_slices(parameter: torch.Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def with_local(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local` as this rank's part of a parameter sharded like `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def resident_bytes(module: nn.Module) -> int:
    """Bytes of weights that this rank holds now: its share, and whatever is gathered at the moment."""
    held: dict[int, int] = {}
    for parameter in module.parameters():
        tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def whole_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of the same weights on one rank; DTensors count with their global shape."""
    return sum(p.nbytes for module in modules for p in module.parameters())


class _Report:
    """Logs once, after a few forwards, what the module holds between two of them."""

    def __init__(self) -> None:
        self._forwards = 0

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        self._forwards += 1
        if self._forwards == REPORT_AFTER:
            log_resident(f"weights after {REPORT_AFTER} forwards", module)


def log_resident(event: str, module: nn.Module) -> None:
    held, whole = resident_bytes(module), whole_bytes([module])
    log.info(event, module=type(module).__name__, bytes=held, whole=whole, share=round(held / whole, 3))
