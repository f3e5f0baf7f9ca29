"""One rank of a parity run: cases (JSON) through the executor with real work items; saves latents and frames."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from runtime.config import Config
from runtime.models.card import card_for, read_configs
from runtime.protocol import Decode, Denoise, Encode, Release, Request
from runtime.sampling import SamplingParams
from workers.parallel import ulysses
from workers.setup import build_executor


class Collector:
    """Stands in for the frame sender."""

    def __init__(self):
        self.chunks = []

    def send(self, endpoint, header, pixels):
        self.chunks.append(pixels)


def mutate(name):
    """Break one thing on purpose: the parity bound must notice."""
    if name == "heads":
        right = ulysses.gather_heads
        ulysses.gather_heads = lambda x, sizes, group: right(x, sizes, group).roll(1, dims=3)
    elif name == "tokens":
        right_tokens = ulysses.gather_tokens
        ulysses.gather_tokens = lambda x, sizes, group: right_tokens(x, sizes, group).roll(sizes[0], dims=2)
    else:
        assert name == "none", name


def main(folder, cases_file, out, mutation):
    import os

    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mutate(mutation)
    config = Config(model_path=folder, num_gpus=num_ranks, device="cpu", dist_timeout=60)
    card = card_for(read_configs(Path(folder)))
    frames = Collector()
    executor, _, _ = build_executor(config, Path(folder), card, torch.device("cpu"), rank, 0, frames)
    everyone, layout = tuple(range(num_ranks)), config.layout
    tensors = {}
    for name, case in json.loads(Path(cases_file).read_text()).items():
        params = card.check(
            SamplingParams(
                prompt=case["prompt"],
                negative_prompt=case.get("negative_prompt"),
                seed=case["seed"],
                height=case["height"],
                width=case["width"],
                num_frames=case["num_frames"],
                num_inference_steps=case["steps"],
                guidance_scale=case["guidance"],
            )
        )
        frames.chunks.clear()
        executor.run(Encode(1, everyone, (Request(name, params),)))
        # Two items, the second with the rest: steps must go on where the last item stopped.
        executor.run(Denoise(2, everyone, layout, (name,), 3))
        executor.run(Denoise(3, everyone, layout, (name,), case["steps"] - 3))
        tensors[f"{name}/latents"] = executor.states[name].latents.clone()
        executor.run(Decode(4, (rank,), name, 1, ""))
        executor.run(Decode(5, (rank,), name, len(card.decode_chunks(params)) - 1, "", first_chunk=1))
        tensors[f"{name}/frames"] = torch.cat(frames.chunks)
        executor.run(Release(6, everyone, (name,)))
        assert not executor.states
    save_file(tensors, Path(out) / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
