"""One rank in the test's own process: a tiny Wan with any solver, its executor, and requests for it."""

import json
import shutil
from pathlib import Path

import torch

from runtime.config import Config
from runtime.layout import Layout
from runtime.models.card import card_for, read_configs
from runtime.protocol import Denoise, Encode, Request
from runtime.sampling import SamplingParams
from workers.checkpoint import digest
from workers.seat import Seat
from workers.setup import build_executor
from workers.spool import Spool

STEPS = 8
ALONE = Layout(1, 1, 1)
GIB = 1 << 30


def with_solver(tiny: Path, folder: Path, solver) -> Path:
    """The same model with another diffusers scheduler."""
    shutil.copytree(tiny, folder)
    shutil.rmtree(folder / "scheduler")
    solver.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(solver).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def a_seat(endpoint="ipc:///nobody", rank=0, epoch=1):
    return Seat(endpoint, f"worker{rank}".encode(), rank, 1, 0, epoch, "here", 4711)


class Frames:
    """Stands in for the frame sender: keeps what the gateway would get."""

    def __init__(self):
        self.headers, self.chunks = [], []

    def send(self, endpoint, header, pixels):
        self.headers.append(header)
        self.chunks.append(pixels)


class SingleRank:
    """An executor with a spool whose thread does not run: resumes work, writes wait."""

    def __init__(self, folder: Path, spool_folder: Path, seat=None, sender=None, device="cpu", **settings):
        configs = read_configs(folder)
        self.card = card_for(configs)
        self.frames = sender or Frames()
        config = Config(model_path=str(folder), device=device, **settings)
        self.executor, self.family, precisions = build_executor(
            config, folder, self.card, torch.device(device), 0, 0, self.frames
        )
        self.model = digest((configs, precisions, device))
        self.spool = Spool(seat or a_seat(), spool_folder, GIB, self.model)
        self.executor.spool = self.spool

    def request(self, request_id="a", **asked):
        wanted = {"prompt": "a red circle", "seed": 3, "height": 32, "width": 32, "num_frames": 5}
        params = SamplingParams(**{**wanted, "num_inference_steps": STEPS, "guidance_scale": 4.0, **asked})
        return Request(request_id, self.card.check(params))

    def encode(self, *requests, **resume):
        self.executor.run(Encode(1, (0,), requests, resume))
        return self.executor.states[requests[0].id]

    def denoise(self, steps, *ids):
        self.executor.run(Denoise(2, (0,), ALONE, ids, steps))
