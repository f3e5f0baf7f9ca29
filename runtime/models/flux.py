"""The card of FLUX.1 text-to-image (dev and schnell): sizes, limits, defaults. Weights live in workers/models/flux.py.

FLUX.1 by Black Forest Labs, as `diffusers.FluxPipeline` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import InvalidInput
from runtime.models.image import MOST_GUIDANCE, ImageCard
from runtime.sampling import SamplingParams

TEXT_TOKENS = 512
"""Every prompt is padded to this many T5 tokens, which the denoiser attends to unmasked."""

PIPELINE_DEFAULTS: dict[str, float] = {
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "true_cfg_scale": 1.0,
}
SIDE = 128
"""Latent pixels of a default picture's side."""


@dataclass(frozen=True, kw_only=True)
class FluxCard(ImageCard):
    """FLUX.1, from the folder's `transformer` and `vae` configs."""

    guidance_embeds: bool
    """The guidance scale is an input (dev); without it the model takes none (schnell)."""

    family: str = "flux"
    pipeline_class: str = "FluxPipeline"
    text_tokens: int = TEXT_TOKENS
    most_text_tokens: int = TEXT_TOKENS

    @staticmethod
    def from_configs(configs: dict[str, dict[str, Any]]) -> FluxCard:
        dit, vae = configs["transformer"], configs["vae"]
        if dit.get("out_channels") not in {None, dit["in_channels"]}:
            raise InvalidInput("model_path", "this FLUX takes a picture as input, which is not available yet")
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        defaults = PIPELINE_DEFAULTS | {"height": SIDE * spatial, "width": SIDE * spatial}
        return FluxCard(
            heads=dit["num_attention_heads"],
            head_dim=dit["attention_head_dim"],
            layers=dit["num_layers"] + dit["num_single_layers"],
            token_channels=dit["in_channels"],
            spatial=spatial,
            text_dim=dit["joint_attention_dim"],
            guidance_embeds=dit.get("guidance_embeds", False),
            defaults=defaults | configs.get("framemesh", {}).get("defaults", {}),
        )

    def guidance(self, params: SamplingParams) -> float:
        if not self.guidance_embeds:
            return super().guidance(params)
        chosen = self._default("guidance_scale", params.guidance_scale)
        if not 0 <= chosen <= MOST_GUIDANCE:
            raise InvalidInput("guidance_scale", f"{chosen} is out of range; take 0 to 100")
        return chosen
