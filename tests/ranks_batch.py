"""One rank of an isolation run: requests alone, then joining and leaving one batch at different steps."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from runtime.config import Config
from runtime.models.card import card_for, read_configs
from runtime.protocol import Decode, Denoise, Encode, Release, Request
from runtime.sampling import SamplingParams
from workers.setup import build_executor

WANTED = {
    "long": SamplingParams(prompt="a red circle moving right", seed=1, num_inference_steps=12, guidance_scale=4.0),
    "short": SamplingParams(prompt="a star", seed=2, num_inference_steps=5, guidance_scale=2.0),
    "late": SamplingParams(prompt="a blue square, getting bigger and bigger", seed=3, num_inference_steps=8),
}


class Sink:
    def __init__(self):
        self.chunks = {}

    def send(self, endpoint, header, pixels):
        self.chunks.setdefault(header.request_id, []).append(pixels)


def main(folder, out):
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = Config(model_path=folder, num_gpus=num_ranks, device="cpu", dist_timeout=60)
    card = card_for(read_configs(Path(folder)))
    sink = Sink()
    executor, _, _ = build_executor(config, Path(folder), card, torch.device("cpu"), rank, 0, sink)
    everyone, layout = tuple(range(num_ranks)), config.layout
    tensors = {}

    def encode(*names, prefix):
        requests = (Request(f"{prefix}/{name}", card.check(WANTED[name])) for name in names)
        executor.run(Encode(0, everyone, tuple(requests)))

    def denoise(steps, *ids):
        executor.run(Denoise(0, everyone, layout, ids, steps))

    def finish(request_id):
        state = executor.states[request_id]
        assert state.step == state.params.num_inference_steps
        tensors[f"{request_id}/latents"] = state.latents.clone()
        executor.run(Decode(0, (rank,), request_id, len(card.decode_chunks(state.params)), ""))
        tensors[f"{request_id}/frames"] = torch.cat(sink.chunks.pop(request_id))
        executor.run(Release(0, everyone, (request_id,)))

    for name, params in WANTED.items():
        encode(name, prefix="alone")
        denoise(params.num_inference_steps, f"alone/{name}")
        finish(f"alone/{name}")

    encode("long", "short", prefix="batch")
    denoise(2, "batch/long", "batch/short")
    encode("late", prefix="cancelled")
    denoise(1, "batch/short", "cancelled/late")
    executor.run(Release(0, everyone, ("cancelled/late",)))
    denoise(2, "batch/short", "batch/long")
    finish("batch/short")
    encode("late", prefix="batch")
    denoise(8, "batch/long", "batch/late")
    finish("batch/late")
    finish("batch/long")

    encode("long", prefix="again")
    denoise(12, "again/long")
    finish("again/long")
    assert not executor.states
    save_file(tensors, Path(out) / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
