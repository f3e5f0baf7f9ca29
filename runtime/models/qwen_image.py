"""The card of Qwen-Image text-to-image: sizes, limits, defaults. Weights live in workers/models/qwen_image.py.

Qwen-Image Technical Report (arXiv 2508.02324), as `diffusers.QwenImagePipeline` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from runtime.errors import InvalidInput
from runtime.models.image import ImageCard

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34
"""The template's beginning: its embeddings are dropped."""
MAX_TEXT_TOKENS = 512
"""Embeddings that the denoiser gets at most, the template's end among them."""
TEXT_TOKENS = 64
"""Of a usual prompt."""

PIPELINE_DEFAULTS: dict[str, float] = {"num_inference_steps": 50, "true_cfg_scale": 4.0}
SIDE = 128
"""Latent pixels of a default picture's side."""

UNSUPPORTED = {
    "guidance_embeds": "a guidance-distilled Qwen-Image",
    "zero_cond_t": "an editing Qwen-Image",
    "use_additional_t_cond": "a layered Qwen-Image",
    "use_layer3d_rope": "a layered Qwen-Image",
}


@dataclass(frozen=True, kw_only=True)
class QwenImageCard(ImageCard):
    """Qwen-Image, from the folder's `transformer` and `vae` configs."""

    family: str = "qwen_image"
    pipeline_class: str = "QwenImagePipeline"
    text_tokens: int = TEXT_TOKENS
    most_text_tokens: int = MAX_TEXT_TOKENS
    unused: ClassVar[dict[str, tuple[str, ...]]] = {
        **ImageCard.unused,
        # A text-only prompt needs neither the eyes nor the words that would come next.
        "text_encoder": ("model.visual", "lm_head"),
    }

    @staticmethod
    def from_configs(configs: dict[str, dict[str, Any]]) -> QwenImageCard:
        dit, vae = configs["transformer"], configs["vae"]
        for key, hint in UNSUPPORTED.items():
            if dit.get(key):
                raise InvalidInput("model_path", f"{key} in transformer/config.json means {hint}: not available yet")
        spatial = 2 ** len(vae["temperal_downsample"])
        defaults = PIPELINE_DEFAULTS | {"height": SIDE * spatial, "width": SIDE * spatial}
        return QwenImageCard(
            heads=dit["num_attention_heads"],
            head_dim=dit["attention_head_dim"],
            layers=dit["num_layers"],
            token_channels=dit["in_channels"],
            spatial=spatial,
            text_dim=dit["joint_attention_dim"],
            defaults=defaults | configs.get("framemesh", {}).get("defaults", {}),
        )

    def clean_prompt(self, text: str) -> str:
        return TEMPLATE.format(text)
