"""What the parity matrix needs of a model family: a tiny model, diffusers' own pipeline, and requests for both."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny_flux
import tiny_qwen_image
import tiny_wan
import torch
from diffusers.utils.torch_utils import randn_tensor

Case = dict[str, Any]
"""A request: fields of `SamplingParams`, `steps` and `guidance` for short in Wan's."""
SHAPES = ("even", "odd", "still", "masked", "unguided")
HEADS = (4, 3)
"""Head counts to build; the second divides by no degree."""
LONG_NEGATIVE = "a red circle moving right, a star over the sea; a big blue square, very bright!"


@dataclass(frozen=True)
class Family:
    """A new one is an entry of `FAMILIES`."""

    name: str
    build: Callable[..., Path]
    """(folder, heads=) -> a pipeline in the real folder layout, every parameter random."""
    load: Callable[..., Any]
    """(folder, dtype) -> diffusers' own pipeline."""
    call: Callable[..., Any]
    """(pipeline, case, output type, **more) -> what diffusers makes of a case."""
    common: Case
    """What every case asks: 8 steps, guidance 4."""
    scale: str
    """The field that decides over guidance branches."""
    cases: dict[str, Case]
    """By shape."""
    masks: bool
    """Padding of the text is kept out of the attention, or weighed."""

    def request(self, shape: str) -> Case:
        return self.common | self.cases[shape]

    def guided(self, shape: str) -> bool:
        return self.request(shape)[self.scale] > 1

    def companion(self, shape: str) -> Case:
        """Another request that may share forwards with the one of this shape."""
        first = self.request(shape)
        scale = min(first[self.scale], 2.5)
        return first | {"prompt": "two green triangles", "seed": first["seed"] + 50, self.scale: scale}

    def reference(self, pipeline: Any, case: Case) -> tuple[torch.Tensor, np.ndarray]:
        """(latents as in RequestState.latents, frames uint8 (T, H, W, 3)) by diffusers."""
        caught: dict[str, torch.Tensor] = {}

        def catch(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            caught.update(tensors)
            return {}

        pictures = self.call(pipeline, case, "pil", callback_on_step_end=catch)
        video = pictures[0] if isinstance(pictures[0], list) else pictures
        return caught["latents"], np.stack([np.asarray(picture) for picture in video])

    def rounded(self, pipeline: Any, case: Case) -> torch.Tensor:
        """Latents by diffusers in bf16."""
        with _noise_of_fp32(pipeline):
            return self.call(pipeline, case, "latent")


def _noise_of_fp32(pipeline: Any) -> Any:
    """The pipeline rounds its noise instead of drawing it in bf16: the same seed would be another picture."""

    def draw(shape: Any, generator: Any, device: Any, dtype: torch.dtype) -> torch.Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return mock.patch.object(sys.modules[type(pipeline).__module__], "randn_tensor", draw)


WAN_CASES = {
    "even": {"prompt": "a red circle moving right", "seed": 3, "height": 32, "width": 32, "num_frames": 9},
    "odd": {"prompt": "a star", "seed": 4, "height": 48, "width": 48, "num_frames": 9},
    "still": {"prompt": "a star", "seed": 5, "height": 16, "width": 48, "num_frames": 1},
    "masked": {
        "prompt": "a box",
        "negative_prompt": "blurry &amp; dull, a red circle moving right, a blue square getting bigger",
        "seed": 7,
        "height": 32,
        "width": 48,
        "num_frames": 5,
    },
    "unguided": {"prompt": "a box", "seed": 6, "height": 32, "width": 32, "num_frames": 5, "guidance": 1.0},
}
"""Tokens: 12, 27, 3, 12, 8. Three tokens on four ranks leave one rank without any."""

STILL_CASES = {
    "even": {"prompt": "a red circle", "negative_prompt": "a square", "seed": 3, "height": 64, "width": 64},
    "odd": {"prompt": "a star", "negative_prompt": "a red circle", "seed": 4, "height": 48, "width": 80},
    "still": {"prompt": "a star", "negative_prompt": "", "seed": 5, "height": 16, "width": 48},
    "masked": {"prompt": "a star", "negative_prompt": LONG_NEGATIVE, "seed": 7, "height": 32, "width": 48},
    "unguided": {"prompt": "a box", "seed": 6, "height": 32, "width": 64, "true_cfg_scale": 1.0},
}
"""Tokens of the picture: 16, 15, 3, 6, 8, beside those of the text."""

STILL = {"num_inference_steps": 8, "true_cfg_scale": 4.0}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="wan",
            build=tiny_wan.build_tiny_wan,
            load=tiny_wan.load_pipeline,
            call=tiny_wan.reference,
            common={"steps": 8, "guidance": 4.0},
            scale="guidance",
            cases=WAN_CASES,
            masks=True,
        ),
        Family(
            name="flux",
            build=tiny_flux.build_tiny_flux,
            load=tiny_flux.load_pipeline,
            call=tiny_flux.reference,
            common=STILL | {"guidance_scale": 4.0},
            scale="true_cfg_scale",
            cases=STILL_CASES,
            masks=False,
        ),
        Family(
            name="qwen_image",
            build=tiny_qwen_image.build_tiny_qwen_image,
            load=tiny_qwen_image.load_pipeline,
            call=tiny_qwen_image.reference,
            common=STILL,
            scale="true_cfg_scale",
            cases=STILL_CASES,
            masks=True,
        ),
    )
}
