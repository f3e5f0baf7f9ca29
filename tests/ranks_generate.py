"""One rank of a parity run: a plan (JSON) of runs through executors with real work items; saves latents and frames.

Plan: {"models": {name: {"folder", and fields of Config}}, "runs": [{"name", "model", "layout": [cfg, ring, ulysses],
"mutation", "joint", "requests": [case, …]}]}. One request runs alone; of several, one more joins the batch
after every three steps.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from mutations import broken
from safetensors.torch import save_file

from runtime.config import Config
from runtime.layout import Layout, layouts_of
from runtime.models.card import card_for, read_configs
from runtime.protocol import Decode, Denoise, Encode, Release, Request
from runtime.sampling import SamplingParams
from runtime.traffic import JOINT_TOKENS
from workers import setup
from workers.parallel.comm import ALONE
from workers.parallel.groups import SOLO, make_groups

STRIDE = 3
"""Steps after which an item ends and another request joins."""


class Collector:
    """Stands in for the frame sender."""

    def __init__(self):
        self.chunks = {}

    def send(self, endpoint, header, pixels):
        self.chunks.setdefault(header.request_id, []).append(pixels)


def params_of(case):
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    return SamplingParams(**{names.get(name, name): value for name, value in case.items()})


class Rank:
    """One executor per model, with the groups of every layout of the plan."""

    def __init__(self, plan):
        self.rank, self.num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.everyone = tuple(range(self.num_ranks))
        self.frames, self.tensors = Collector(), {}
        self.executors, self.denoisers, self.cards = {}, {}, {}
        for name, fields in plan["models"].items():
            folder = Path(fields["folder"])
            changes = {field: value for field, value in fields.items() if field != "folder"}
            config = Config(model_path=str(folder), num_gpus=self.num_ranks, device="cpu", dist_timeout=60, **changes)
            card = self.cards[name] = card_for(read_configs(folder))
            args = config, folder, card, torch.device("cpu"), self.rank, 0, self.frames
            self.executors[name], family, _ = setup.build_executor(*args)
            self.denoisers[name] = family.denoiser
            setup.init_distributed = lambda *_: None
        groups = self.groups_of(list(dict.fromkeys(Layout(*run["layout"]) for run in plan["runs"])))
        for executor in self.executors.values():
            executor._groups = groups

    def groups_of(self, layouts):
        """Those of the layouts and of what they fold to; smaller ones run on every group of ranks by itself."""
        every = [each for card in self.cards.values() for layout in layouts for each in layouts_of(layout, card)]
        whole = dict.fromkeys(each for each in every if each.num_ranks == self.num_ranks)
        groups = make_groups(list(whole), self.rank, "gloo")
        for layout in layouts:
            if layout.num_ranks < self.num_ranks:
                guided = Layout(self.num_ranks // layout.num_ranks, layout.ring, layout.ulysses)
                groups[layout] = replace(groups.get(guided, SOLO), cfg=ALONE)
        return groups

    def run(self, run):
        executor, card, layout = self.executors[run["model"]], self.cards[run["model"]], Layout(*run["layout"])
        waiting = [Request(f"{run['name']}/{i}", card.check(params_of(case))) for i, case in enumerate(run["requests"])]
        decode = len(waiting) == 1 and run["mutation"] == "none"
        executor.joint_tokens = JOINT_TOKENS if run.get("joint", True) else 0
        running = []
        with broken(run["mutation"], self.denoisers[run["model"]]):
            while waiting or running:
                if waiting:
                    request = waiting.pop(0)
                    executor.run(Encode(1, self.everyone, (request,)))
                    running.append(request)
                left = min(request.params.num_inference_steps - executor.states[request.id].step for request in running)
                steps = min(STRIDE, left)
                # The order of a batch is the scheduler's business: here the latest comes first.
                ids = tuple(request.id for request in reversed(running))
                executor.run(Denoise(2, self.everyone, layout, ids, steps))
                for request in [r for r in running if executor.states[r.id].step == r.params.num_inference_steps]:
                    self.finish(executor, card, request, decode)
                    running.remove(request)
        assert not executor.states

    def finish(self, executor, card, request, decode):
        self.tensors[f"{request.id}/latents"] = executor.states[request.id].latents.clone()
        if decode:
            chunks = len(card.decode_chunks(request.params))
            executor.run(Decode(4, (self.rank,), request.id, 1, ""))
            if chunks > 1:
                executor.run(Decode(5, (self.rank,), request.id, chunks - 1, "", first_chunk=1))
            self.tensors[f"{request.id}/frames"] = torch.cat(self.frames.chunks.pop(request.id))
        executor.run(Release(6, self.everyone, (request.id,)))


def main(plan_file, out):
    plan = json.loads(Path(plan_file).read_text())
    rank = Rank(plan)
    for run in plan["runs"]:
        rank.run(run)
    save_file(rank.tensors, Path(out) / f"rank{rank.rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
