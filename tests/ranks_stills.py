"""One rank of a run of an image model: cases alone and in staggered batches, through real work items."""

import json
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


class Sink:
    """Stands in for the frame sender."""

    def __init__(self):
        self.frames = {}

    def send(self, endpoint, header, pixels):
        self.frames[header.request_id] = pixels


class Run:
    """Saves latents and frames of every request that is finished."""

    def __init__(self, folder, config):
        rank = int(os.environ["RANK"])
        self.card = card_for(read_configs(folder))
        self.sink, self.tensors = Sink(), {}
        self.everyone, self.rank, self.layout = tuple(range(config.num_gpus)), rank, config.layout
        cpu = torch.device("cpu")
        self.executor, self.family, _ = build_executor(config, folder, self.card, cpu, rank, 0, self.sink)

    def encode(self, request_id, case):
        request = Request(request_id, self.card.check(SamplingParams(**case)))
        self.executor.run(Encode(0, self.everyone, (request,)))

    def denoise(self, steps, *ids):
        self.executor.run(Denoise(0, self.everyone, self.layout, ids, steps))

    def finish(self, request_id):
        state = self.executor.states[request_id]
        assert state.step == state.params.num_inference_steps
        self.tensors[f"{request_id}/latents"] = state.latents.clone()
        self.executor.run(Decode(0, (self.rank,), request_id, 1, ""))
        self.tensors[f"{request_id}/frames"] = self.sink.frames.pop(request_id)
        self.executor.run(Release(0, self.everyone, (request_id,)))

    def alone(self, name, case):
        request_id = f"alone/{name}"
        self.encode(request_id, case)
        self.denoise(2, request_id)
        self.denoise(case["num_inference_steps"] - 2, request_id)
        self.finish(request_id)

    def together(self, names, cases):
        """Each joins one step after the one before it, so that no two are at the same timestep; all leave in turn."""
        ids = [f"batch/{name}" for name in names]
        left = {request_id: cases[name]["num_inference_steps"] for request_id, name in zip(ids, names, strict=True)}
        waiting, running = list(zip(ids, names, strict=True)), []
        while left:
            if waiting:
                request_id, name = waiting.pop(0)
                self.encode(request_id, cases[name])
                running.append(request_id)
            self.denoise(1, *running)
            for request_id in list(running):
                left[request_id] -= 1
                if not left[request_id]:
                    del left[request_id]
                    running.remove(request_id)
                    self.finish(request_id)


def main(folder, plan_file, out, mutate="none"):
    plan = json.loads(Path(plan_file).read_text())
    num_ranks = int(os.environ["WORLD_SIZE"])
    config = Config(model_path=folder, num_gpus=num_ranks, device="cpu")
    run = Run(Path(folder), config)
    if mutate != "none":
        import still_mutations

        getattr(still_mutations, mutate)(run.family)
    for name in plan.get("alone", plan["cases"]):
        run.alone(name, plan["cases"][name])
    for names in plan.get("batches", []):
        run.together(names, plan["cases"])
    assert not run.executor.states
    save_file(run.tensors, Path(out) / f"rank{run.rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
