"""What the torch halves of text-to-image families share: packed latents, the flow-matching schedule, pixels.

latents (1, C, h, w)  --pack-->  (1, h/2 * w/2, 4C)  … denoise …  --unpack-->  (1, C, h, w)
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from runtime.models.image import PACK
from workers.parallel.comm import ALONE, Group
from workers.parallel.vae import StripParallel, my_strip, strip_rows, whole_frames


def packed_noise(
    grid: tuple[int, int], channels: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """(1, tokens, channels) fp32, drawn unpacked and at full shape as the pipelines draw it."""
    rows, columns = grid
    shape = (1, channels // PACK**2, rows * PACK, columns * PACK)
    return pack(randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(1, channels / 4, 2 rows, 2 columns) -> (1, tokens, channels)."""
    patches = latents.unflatten(3, (-1, PACK)).unflatten(2, (-1, PACK))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(1, tokens, channels) -> (1, channels / 4, 2 rows, 2 columns)."""
    rows, columns = grid
    patches = latents.unflatten(2, (-1, PACK, PACK)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, rows * PACK, columns * PACK)


def flow_solver(solver: Any, steps: int, image_tokens: int, device: torch.device) -> Any:
    """A copy of the pipeline's solver with this request's schedule; its shift grows with the picture."""
    own, config = copy.deepcopy(solver), solver.config
    mu = calculate_shift(
        image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    own.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
    own.set_begin_index(0)
    return own


def decode_still(vae: Any, latents: torch.Tensor, strips: StripParallel, group: Group) -> torch.Tensor:
    """(1, C, h, w), or (1, C, 1, h, w) of a video VAE -> uint8 (1, height, width, 3), by all members of the group."""
    rows = strip_rows(latents.shape[-2], group)
    if len(rows) == 1:
        group = ALONE
    tiling = vae.use_tiling
    # Strips are what tiles are for, less memory per rank, and they blend nothing.
    vae.use_tiling = tiling and group.size == 1
    try:
        with strips.over(group, rows):
            image = vae.decode(my_strip(latents, rows, group), return_dict=False)[0]
    finally:
        vae.use_tiling = tiling
    strip = to_pixels(image[:, :, 0] if image.ndim == 5 else image)
    return whole_frames(strip, rows, group) if group.size > 1 else strip


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """(1, 3, height, width) in [-1, 1] -> uint8 (1, height, width, 3)."""
    unit = (image * 0.5 + 0.5).clamp(0, 1)
    return (unit.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
