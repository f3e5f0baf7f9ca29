"""One rank of the FSDP tests: every case writes what it saw, as JSON and safetensors, for the test to judge."""

import json
import os
import sys
import threading
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from runtime.config import Config
from runtime.models.card import card_for, read_configs
from runtime.protocol import Decode, Denoise, Encode, Request
from runtime.sampling import SamplingParams
from workers import setup
from workers.models.loading import Loader, Weights
from workers.parallel import fsdp
from workers.parallel.groups import init_distributed

CPU = torch.device("cpu")
RANK, NUM_RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
STEPS = 12


class Collector:
    def __init__(self):
        self.chunks = []

    def send(self, endpoint, header, pixels):
        self.chunks.append(pixels)


class Memory(threading.Thread):
    """Samples this process's anonymous memory; pages of mapped files do not count."""

    def __init__(self):
        super().__init__(daemon=True)
        self.process, self.done = psutil.Process(), threading.Event()
        self.start_bytes = self.peak = self.now()
        self.start()

    def now(self):
        info = self.process.memory_info()
        return info.rss - info.shared

    def run(self):
        while not self.done.wait(0.0005):
            self.peak = max(self.peak, self.now())

    def stop(self):
        self.done.set()
        self.join()
        return max(self.peak, self.now()) - self.start_bytes


def generate(folder, sharded, precision):
    """Tensors of one generation through the executor, and what the weights weigh after it."""
    config = Config(
        model_path=folder,
        num_gpus=NUM_RANKS,
        device="cpu",
        use_fsdp_inference=sharded,
        dit_precision=precision,
        # On four ranks: weights of all of them, tokens of two, one guidance branch each.
        enable_cfg_parallel=NUM_RANKS == 4,
    )
    card = card_for(read_configs(Path(folder)))
    frames = Collector()
    executor, family, _ = setup.build_executor(config, Path(folder), card, CPU, RANK, 0, frames)
    params = card.check(
        SamplingParams(
            prompt="a star", seed=4, height=48, width=48, num_frames=9, num_inference_steps=STEPS, guidance_scale=4.0
        )
    )
    everyone = tuple(range(NUM_RANKS))
    modules = {"denoiser": family.denoiser, "text_encoder": family.text_encoder}
    loaded = {name: fsdp.resident_bytes(module) for name, module in modules.items()}
    executor.run(Encode(1, everyone, (Request("a", params), Request("b", params))))
    embeddings = executor.states["a"].embeddings
    tensors = {f"embeddings/{branch}": x.clone() for branch, x in embeddings.items()}
    executor.run(Denoise(2, everyone, config.layout, ("a",), 5))
    executor.run(Denoise(3, everyone, config.layout, ("a", "b"), 5))
    executor.run(Denoise(4, everyone, config.layout, ("a",), STEPS - 10))
    tensors["latents"] = executor.states["a"].latents.clone()
    executor.run(Decode(5, (RANK,), "a", len(card.decode_chunks(params)), ""))
    tensors["frames"] = torch.cat(frames.chunks)
    report = {
        name: {
            "loaded": loaded[name],
            "after": fsdp.resident_bytes(module),
            "whole": fsdp.whole_bytes([module]),
            "dtypes": {key: str(p.dtype) for key, p in module.named_parameters()},
        }
        for name, module in modules.items()
    }
    return tensors, report


def parity(folder, out):
    tensors, report = {}, {}
    for precision in ("fp32", "bf16"):
        for sharded in (False, True):
            name = f"{precision}/{'sharded' if sharded else 'whole'}"
            made, report[name] = generate(folder, sharded, precision)
            tensors |= {f"{name}/{key}": tensor for key, tensor in made.items()}
    save_file(tensors, Path(out) / f"rank{RANK}.safetensors")
    return report


def memory(folder, out):
    """Load and run a denoiser whose weights dwarf everything else."""
    from diffusers import WanTransformer3DModel

    mesh = fsdp.shard_mesh(NUM_RANKS, CPU)
    reading, real_read = {"bytes": 0}, Weights.read

    def read(self, key, part):
        tensor = real_read(self, key, part)
        reading["bytes"] += tensor.numel() * tensor.element_size()
        return tensor

    Weights.read = read
    loading = Memory()
    module = Loader(CPU, mesh).denoiser(WanTransformer3DModel, Path(folder) / "transformer", torch.float32)
    load_peak = loading.stop()
    order = watch_gathers(module)
    running = Memory()
    with torch.inference_mode():
        for _ in range(3):
            module(torch.zeros(1, 4, 1, 4, 4), torch.tensor([500]), torch.zeros(1, 4, 32), return_dict=False)
    run_peak = running.stop()
    block = sum(p.numel() * p.element_size() for p in module.blocks[0].parameters())
    return {
        "whole": fsdp.whole_bytes([module]),
        "block": block,
        "read": reading["bytes"],
        "load_peak": load_peak,
        "run_peak": run_peak,
        "resident": fsdp.resident_bytes(module),
        "order": order,
    }


def watch_gathers(module):
    """The order in which blocks ask for their weights, compute, and give them back."""
    order, numbers = [], {}
    for number, block in enumerate(module.blocks):
        numbers[block._get_fsdp_state()._fsdp_param_group] = number
        # Registered after FSDP's own: runs when the block's weights are there.
        block.ffn.register_forward_hook(lambda *_, number=number: order.append(("computed", number)))
    real = FSDPParamGroup.unshard

    def unshard(self, *args):
        if self in numbers and self._all_gather_result is None and not self.is_unsharded:
            order.append(("gather", numbers[self]))
        return real(self, *args)

    FSDPParamGroup.unshard = unshard
    return order


def mutate(name):
    """Break one thing on purpose: the tests must notice."""
    if name == "slices":
        right = fsdp.local_slices

        def wrong(parameter):
            first, *others = right(parameter) or [slice(0, 0)]
            size = first.stop - first.start
            return (slice(0, size), *others) if parameter.ndim else ()

        fsdp.local_slices = wrong
    else:
        assert name == "none", name


def main(case, folder, out, mutation):
    mutate(mutation)
    init_distributed("gloo", 60, 0)
    setup.init_distributed = lambda *_: None
    report = {"parity": parity, "memory": memory}[case](folder, out)
    (Path(out) / f"rank{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
