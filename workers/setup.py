"""From a configuration to an executor on one rank: device, process groups, weights, hooks, in that order."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import torch

from runtime.config import Config, resolve_backend
from runtime.folding import resolve_tp
from runtime.layout import layouts_of
from runtime.log import get_logger
from runtime.machine import load_machine
from runtime.models.card import Card, read_configs
from runtime.protocol import ModelInfo
from workers.attention.backends import choose
from workers.executor import Executor
from workers.frames import FrameSender
from workers.models.family import Family, Precisions, load_family
from workers.models.loading import Loader
from workers.parallel.encoder import tensor_group
from workers.parallel.fsdp import shard_mesh
from workers.parallel.groups import init_distributed, make_groups, warm_up
from workers.parallel.sequence import SequenceParallel
from workers.parallel.usp import usp_attention
from workers.parallel.yunchang_engine import YunchangEngine

log = get_logger("setup")

STATE_SHARE = 0.5
"""Of the free memory; the rest is for the activations of a forward and of a decode."""


def pick_device(config: Config) -> torch.device:
    """CUDA as the launcher resolved it (one GPU per local rank), else the CPU."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    # Staged ranks may be more than there are GPUs: they share them.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(
        "cuda", local_rank % torch.cuda.device_count() if config.dist_backend == "staged" else local_rank
    )
    torch.cuda.set_device(device)
    return device


def build_executor(
    config: Config, folder: Path, card: Card, device: torch.device, rank: int, generation: int, sender: FrameSender
) -> tuple[Executor, Family, Precisions]:
    layout = config.layout
    backend = resolve_backend(config.dist_backend, device.type)
    if layout.num_ranks > 1:
        init_distributed(backend, config.dist_timeout, generation)
    groups = make_groups(layouts_of(layout, card), rank, backend)
    loader = make_loader(config, folder, device, rank, staged=backend == "staged")
    warm_up(groups, device)
    family, precisions = load_family(folder, card, config, loader)
    kernel = choose(config.attention_backend)
    engine = usp_attention if config.sp_engine == "native" else YunchangEngine(layout.num_ranks, "FA")
    sequence = SequenceParallel(family.denoiser, family.sequence_plan, kernel, family.attention_processor, engine)
    executor = Executor(family, card, sequence, groups, sender.send)
    executor.sharded = loader.mesh is not None or loader.tensor_group is not None
    if config.vae_sp:
        executor.decode_group = groups[layout].replica
    return executor, family, precisions


def make_loader(config: Config, folder: Path, device: torch.device, rank: int, *, staged: bool) -> Loader:
    """How weights are spread over the ranks; makes its groups, so every rank has to call it."""
    num_ranks = config.num_gpus
    mesh = shard_mesh(num_ranks, device) if config.use_fsdp_inference else None
    # A launcher has decided; by hand, without knowing its links, a machine is taken to have slow ones.
    machine = load_machine("h100-pcie" if device.type == "cuda" else "cpu-gloo")
    # Sharded encoders hold 1/N already; splitting their layers as well is only done when it is asked for.
    wanted = 1 if config.use_fsdp_inference and config.tp_size is None else config.tp_size
    tp, reason = resolve_tp(wanted, read_configs(folder), config.layout.sp, machine)
    if num_ranks > 1 and rank == 0:
        log.info("text encoders", reason=reason)
    return Loader(device, mesh, tensor_group(num_ranks, tp, rank, staged=staged))


def describe_model(
    config: Config, folder: Path, family: Family, precisions: Precisions, device: torch.device
) -> ModelInfo:
    """What rank 0 exports to the mesh."""
    return ModelInfo(
        name=config.model_name,
        model_path=config.model_path,
        configs=read_configs(folder),
        tokenizers=family.tokenizers(),
        dit_precision=precisions.dit,
        vae_precision=precisions.vae,
        device=device.type,
        layout=config.layout,
    )


def device_memory(device: torch.device) -> int:
    """Bytes in all of the device that a rank works on, which ranks may share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return int(psutil.virtual_memory().total)


def memory_budget(device: torch.device, ranks_on_host: int) -> int:
    """Bytes for the states of requests: what is free after loading, less room for activations."""
    if device.type == "cuda":
        sharing = math.ceil(ranks_on_host / torch.cuda.device_count())
        # What torch keeps of the warm-up is free for this rank, though not for others.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] / sharing + kept) * STATE_SHARE)
    return int(psutil.virtual_memory().available * STATE_SHARE / ranks_on_host)
