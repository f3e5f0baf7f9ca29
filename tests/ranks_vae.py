"""One rank of the strip decodes: every VAE decodes the same latents alone and with the others; saves both."""

import os
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from safetensors.torch import save_file
from tiny_wan import randomise

from runtime.config import Config
from runtime.models.card import card_for, read_configs
from runtime.protocol import Decode, Encode, Request
from runtime.sampling import SamplingParams
from workers import setup
from workers.models.wan import StreamDecoder
from workers.parallel import vae as strips
from workers.parallel.comm import Group
from workers.parallel.groups import init_distributed

CPU = torch.device("cpu")
RANK, NUM_RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
COMMON = {"z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
HEIGHTS = {2: (2, 6, 7), 4: (4, 6, 11)}
"""Latent rows; 6 and 11 rows on 4 ranks and 7 on 2 are uneven strips."""


def vaes():
    """Name -> VAE, the same weights on every rank."""
    torch.manual_seed(0)
    yield "wan", AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2], temperal_downsample=[False, True], **COMMON)
    wan22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    yield (
        "wan22",
        AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2], temperal_downsample=[False, True], **COMMON, **wan22),
    )
    yield "qwen", AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2], temperal_downsample=[False, True], **COMMON)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    yield "kl", AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks)


def decode(vae, z):
    """All frames: (B, C, T, H, W), or (B, C, H, W) of a VAE for stills."""
    if isinstance(vae, AutoencoderKLWan):
        decoder = StreamDecoder(vae, z)
        return torch.cat([decoder.frame(index) for index in range(z.shape[2])], dim=2)
    return vae.decode(z, return_dict=False)[0]


def modules(group):
    tensors = {}
    for seed, (name, vae) in enumerate(vaes()):
        randomise(vae, seed)
        vae.eval()
        parallel = strips.StripParallel(vae.decoder)
        for height in HEIGHTS[NUM_RANKS]:
            frames = {"kl": (), "qwen": (1,)}.get(name, (3,))
            z = torch.randn(1, 4, *frames, height, 5, generator=torch.Generator().manual_seed(height))
            whole = decode(vae, z)
            rows = strips.strip_rows(height, group)
            with parallel.over(group, rows):
                strip = decode(vae, strips.my_strip(z, rows, group))
            scale = strip.shape[-2] // rows[RANK]
            made = group.all_gather(strip, strip.ndim - 2, [size * scale for size in rows])
            tensors |= {f"{name}/{height}/whole": whole, f"{name}/{height}/strips": made}
            assert torch.equal(decode(vae, z), whole), "the hooks are still at work"
    return tensors


class Collector:
    def __init__(self):
        self.chunks = []

    def send(self, endpoint, header, pixels):
        assert pixels.is_contiguous(), "frames are sent as they lie in memory"
        self.chunks.append(pixels)


def executed(folder):
    """Through the executor: two requests whose decodes alternate, one of them with fewer rows than ranks."""
    config = Config(model_path=folder, num_gpus=NUM_RANKS, device="cpu", vae_sp=True)
    card = card_for(read_configs(Path(folder)))
    frames = Collector()
    executor, _, _ = setup.build_executor(config, Path(folder), card, CPU, RANK, 0, frames)
    everyone, tensors = tuple(range(NUM_RANKS)), {}
    shapes = {"tall": (112, 32), "flat": (16, 48), "other": (64, 32)}
    frame_count = 9 if card.task_type == "T2V" else None
    requests = [
        Request(name, card.check(SamplingParams(prompt="x", seed=5, height=h, width=w, num_frames=frame_count)))
        for name, (h, w) in shapes.items()
    ]
    executor.run(Encode(1, everyone, tuple(requests)))
    for ranks, place in (((RANK,), "alone"), (everyone, "together")):
        made = {name: [] for name in shapes}
        for chunk in range(len(card.decode_chunks(requests[0].params))):
            for name in shapes:
                frames.chunks.clear()
                executor.run(Decode(2, ranks, name, 1, "", chunk))
                made[name] += frames.chunks
                assert len(frames.chunks) == (place == "alone" or RANK == 0), "one rank sends"
        for name, chunks in made.items():
            if chunks:
                tensors[f"executed/{card.family}/{name}/{place}"] = torch.cat(chunks)
    return tensors


def mutate(name):
    """Break one thing on purpose: the bound must notice."""
    if name == "halo":
        right = strips.exchange_halo

        def swapped(x, reach, group):
            wide = right(x, reach, group)
            return wide.roll(1, dims=-2) if group.rank else wide

        strips.exchange_halo = swapped
    elif name == "moments":
        strips.StripParallel._frame_moments = lambda self, x: (
            x.mean(2, keepdim=True),
            x.var(2, correction=0, keepdim=True),
        )
    else:
        assert name == "none", name


@torch.inference_mode()
def main(folders, out, mutation):
    init_distributed("gloo", 60, 0)
    setup.init_distributed = lambda *_: None
    mutate(mutation)
    tensors = modules(Group(NUM_RANKS, RANK, torch.distributed.group.WORLD))
    if mutation == "none":
        for folder in folders.split(","):
            tensors |= executed(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(out) / f"rank{RANK}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
