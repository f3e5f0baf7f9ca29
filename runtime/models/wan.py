"""The card of Wan text-to-video (Wan 2.1 T2V): sizes, limits, defaults, cost. Weights live in workers/models/wan.py.

Wan: Open and Advanced Large-Scale Video Generative Models (arXiv 2503.20314).
"""

from __future__ import annotations

import html
import re
import secrets
from dataclasses import dataclass
from typing import Any, ClassVar

import ftfy

from runtime.bounds import MAX_PROMPT_CHARS
from runtime.errors import UNSUPPORTED_PARAMETER, InvalidInput
from runtime.sampling import ResolvedParams, SamplingParams

TEXT_TOKENS = 512
"""Every prompt is padded to this many tokens, which the denoiser attends to unmasked."""

FOLDED_TEXT = 32
"""Text tokens of a usual prompt once its padding is folded into one."""

PIPELINE_DEFAULTS: dict[str, float] = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "fps": 16,
}


@dataclass(frozen=True)
class WanCard:
    """Wan T2V, from the folder's `transformer` and `vae` configs."""

    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    channels: int
    patch: tuple[int, int, int]
    text_dim: int
    spatial: int
    temporal: int
    vae_base_dim: int
    vae_patch: int
    defaults: dict[str, float]

    family: str = "wan"
    pipeline_class: str = "WanPipeline"
    task_type: str = "T2V"
    decode_streams: str = "per latent frame"
    decodes_in_strips: bool = True
    max_input_images: int = 0
    unused: ClassVar[dict[str, tuple[str, ...]]] = {"vae": ("encoder", "quant_conv")}

    @staticmethod
    def from_configs(configs: dict[str, dict[str, Any]]) -> WanCard:
        index = configs["model_index"]
        for key, hint in {"boundary_ratio": "two-expert Wan 2.2", "expand_timesteps": "Wan 2.2 TI2V"}.items():
            if index.get(key):
                raise InvalidInput("model_path", f"{key} in model_index.json means {hint}, which is not available yet")
        dit, vae = configs["transformer"], configs["vae"]
        if dit.get("added_kv_proj_dim") or dit.get("image_dim"):
            raise InvalidInput("model_path", "this is an image-to-video Wan, which is not available yet")
        return WanCard(
            heads=dit["num_attention_heads"],
            head_dim=dit["attention_head_dim"],
            layers=dit["num_layers"],
            ffn_dim=dit["ffn_dim"],
            channels=dit["in_channels"],
            patch=tuple(dit["patch_size"]),
            text_dim=dit["text_dim"],
            spatial=vae.get("scale_factor_spatial", 8),
            temporal=vae.get("scale_factor_temporal", 4),
            vae_base_dim=vae.get("decoder_base_dim") or vae["base_dim"],
            vae_patch=vae.get("patch_size") or 1,
            defaults=PIPELINE_DEFAULTS | configs.get("framemesh", {}).get("defaults", {}),
        )

    def check(self, params: SamplingParams) -> ResolvedParams:
        if not params.prompt.strip():
            raise InvalidInput("prompt", "is empty; say what to generate", code="missing_required_parameter")
        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(params, name) or "")) > MAX_PROMPT_CHARS:
                raise InvalidInput(name, f"has {length} characters, at most {MAX_PROMPT_CHARS} are taken")
        height = self._size("height", params.height, self.spatial * self.patch[1])
        width = self._size("width", params.width, self.spatial * self.patch[2])
        seed = secrets.randbelow(2**31) if params.seed is None else params.seed
        if not 0 <= seed < 2**63:
            raise InvalidInput("seed", f"{seed} is out of range; take 0 to 2^63 - 1")
        guidance = self._default("guidance_scale", params.guidance_scale)
        if not 0 <= guidance <= 100:
            raise InvalidInput("guidance_scale", f"{guidance} is out of range; take 0 to 100 (1 or less: no guidance)")
        if params.true_cfg_scale is not None and params.true_cfg_scale > 1:
            raise InvalidInput(
                "true_cfg_scale", "is for image models; Wan's is guidance_scale", code=UNSUPPORTED_PARAMETER
            )
        return ResolvedParams(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt or "",
            num_inference_steps=self._whole("num_inference_steps", params.num_inference_steps, 1000),
            guidance_scale=guidance,
            seed=seed,
            height=height,
            width=width,
            num_frames=self._frames(params.num_frames),
            fps=self._whole("fps", params.fps, 240),
            deterministic=bool(params.deterministic),
        )

    def clean_prompt(self, text: str) -> str:
        return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()

    def frames_for(self, seconds: float, fps: int) -> int:
        return max(round((seconds * fps - 1) / self.temporal), 0) * self.temporal + 1

    def latent_shape(self, params: ResolvedParams) -> tuple[int, ...]:
        frames = (params.num_frames - 1) // self.temporal + 1
        return (1, self.channels, frames, params.height // self.spatial, params.width // self.spatial)

    def tokens(self, params: ResolvedParams) -> int:
        _, _, t, h, w = self.latent_shape(params)
        return (t // self.patch[0]) * (h // self.patch[1]) * (w // self.patch[2])

    def step_flops(self, params: ResolvedParams) -> float:
        """2 per multiply-add: projections, self- and cross-attention scores, feed-forward, the text's K and V."""
        s, d = self.tokens(params), self.heads * self.head_dim
        per_layer = s * (6 * d * d + 2 * self.ffn_dim * d) + 2 * FOLDED_TEXT * d * d + 2 * s * (s + FOLDED_TEXT) * d
        return 2.0 * per_layer * self.layers * len(self.branches(params, 0))

    def branches(self, params: ResolvedParams, step: int) -> tuple[str, ...]:
        return ("cond", "uncond") if params.guidance_scale > 1.0 else ("cond",)

    def batch_key(self, params: ResolvedParams, step: int) -> tuple[Any, ...]:
        return (self.latent_shape(params), self.branches(params, step), params.deterministic)

    def decode_chunks(self, params: ResolvedParams) -> tuple[int, ...]:
        latent_frames = self.latent_shape(params)[2]
        return (1,) + (self.temporal,) * (latent_frames - 1)

    def state_bytes(self, params: ResolvedParams, stage: str) -> int:
        """fp32 latents, three solver tensors, and the embeddings; while decoding, the VAE's feature cache.

        The cache keeps two frames of every causal convolution's input; its widest level is the full-size one.
        """
        numel = 1
        for size in self.latent_shape(params):
            numel *= size
        state = 4 * (4 * numel + len(self.branches(params, 0)) * TEXT_TOKENS * self.text_dim)
        if stage != "decode":
            return state
        pixels = params.height * params.width // self.vae_patch**2
        return state + 2 * 4 * 16 * self.vae_base_dim * pixels

    def _default(self, name: str, value: float | None) -> float:
        return self.defaults[name] if value is None else value

    def _whole(self, name: str, value: int | None, most: int) -> int:
        chosen = int(self._default(name, value))
        if not 1 <= chosen <= most:
            raise InvalidInput(name, f"{chosen} is out of range; take 1 to {most}")
        return chosen

    def _size(self, name: str, value: int | None, multiple: int) -> int:
        chosen = int(self._default(name, value))
        if chosen > 8192:
            raise InvalidInput(name, f"{chosen} is too large; take at most 8192")
        if chosen < multiple:
            raise InvalidInput(name, f"{chosen} is too small; take at least {multiple}")
        if chosen % multiple:
            low = chosen // multiple * multiple
            raise InvalidInput(
                name, f"{chosen} is not a multiple of {multiple}; the nearest are {low} and {low + multiple}"
            )
        return chosen

    def _frames(self, value: int | None) -> int:
        chosen = int(self._default("num_frames", value))
        if chosen < 1:
            raise InvalidInput("num_frames", f"{chosen} is too few; take {self.temporal}k + 1, e.g. 1 (a still) or 17")
        most = 4095 // self.temporal * self.temporal + 1
        if chosen > most:
            raise InvalidInput("num_frames", f"{chosen} is too many; take at most {most}")
        if chosen % self.temporal != 1 % self.temporal:
            low = (chosen - 1) // self.temporal * self.temporal + 1
            raise InvalidInput(
                "num_frames", f"{chosen} is not {self.temporal}k + 1; the nearest are {low} and {low + self.temporal}"
            )
        return chosen
