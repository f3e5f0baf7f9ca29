"""The three families at real size and tiny, with random weights made where they are used. Measures nothing.

No downloads and no text encoders: embeddings are random too, of the shape that a usual prompt has. Sizes are those of
the published configs of Wan2.1-T2V-1.3B, FLUX.1-dev and Qwen-Image.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import nn

from runtime.layout import Layout
from runtime.models.card import Card, card_for
from runtime.models.wan import TEXT_TOKENS as WAN_TEXT
from runtime.protocol import Request
from runtime.sampling import ResolvedParams, SamplingParams
from workers.attention.backends import choose
from workers.executor import Executor
from workers.models.family import Family
from workers.models.flux import POOLED, FluxFamily
from workers.models.loading import empty_module, slots
from workers.models.qwen_image import QwenImageFamily
from workers.models.wan import FoldedText, TextAttention, WanFamily
from workers.parallel.groups import SOLO, Groups
from workers.parallel.sequence import SequenceParallel
from workers.parallel.vae import StripParallel
from workers.state import RequestState


@dataclass(frozen=True)
class Parts:
    """diffusers' classes of a pipeline, and those of its parts that nobody needs once a text is embedded."""

    denoiser: Any
    vae: Any
    solver: Any
    absent: tuple[str, ...] = ("text_encoder", "tokenizer")


PARTS = {
    "WanPipeline": Parts(WanTransformer3DModel, AutoencoderKLWan, UniPCMultistepScheduler),
    "FluxPipeline": Parts(
        FluxTransformer2DModel,
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    ),
    "QwenImagePipeline": Parts(QwenImageTransformer2DModel, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler),
}


@dataclass(frozen=True)
class Recipe:
    """What a family is made of, as its folder's JSON would say, and what is asked of it."""

    pipeline: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    asked: dict[str, Any]
    """Fields of `SamplingParams`."""
    text: dict[str, int]
    """Guidance branch -> tokens of its prompt."""

    @property
    def card(self) -> Card:
        index = {"_class_name": self.pipeline}
        return card_for({"model_index": index, "transformer": self.transformer, "vae": self.vae})

    def params(self, steps: int) -> ResolvedParams:
        asked = {"prompt": "-", "seed": 0, "num_inference_steps": steps, **self.asked}
        return self.card.check(SamplingParams(**asked))


WAN_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLUX_SOLVER = {"shift": 3.0, "use_dynamic_shifting": True, "max_image_seq_len": 4096}
QWEN_SOLVER = {"use_dynamic_shifting": True, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
PATCH = (1, 2, 2)

REAL: dict[str, Recipe] = {
    "wan": Recipe(
        pipeline="WanPipeline",
        transformer={
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "num_layers": 30,
            "ffn_dim": 8960,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": PATCH,
            "text_dim": 4096,
            "freq_dim": 256,
        },
        vae={"base_dim": 96},
        scheduler=WAN_SOLVER,
        asked={"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 5.0},
        text={"cond": 31, "uncond": 31},
    ),
    "flux": Recipe(
        pipeline="FluxPipeline",
        transformer={
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 19,
            "num_single_layers": 38,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        vae={
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        scheduler=FLUX_SOLVER,
        asked={"height": 1024, "width": 1024, "guidance_scale": 3.5},
        text={"cond": 512},
    ),
    "qwen_image": Recipe(
        pipeline="QwenImagePipeline",
        transformer={
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 60,
            "in_channels": 64,
            "out_channels": 16,
            "joint_attention_dim": 3584,
        },
        vae={"temperal_downsample": [False, True, True]},
        scheduler=QWEN_SOLVER,
        asked={"height": 1024, "width": 1024, "negative_prompt": " ", "true_cfg_scale": 4.0},
        # The negative prompt is a space between the ends of the template: rows of one forward differ, and are masked.
        text={"cond": 64, "uncond": 6},
    ),
}

TINY: dict[str, Recipe] = {
    "wan": Recipe(
        pipeline="WanPipeline",
        transformer={
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "num_layers": 2,
            "ffn_dim": 128,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": PATCH,
            "text_dim": 32,
            "freq_dim": 64,
        },
        vae={
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2, 2],
            "num_res_blocks": 1,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.1, 0.9, 1.3, 1.0],
        },
        scheduler=WAN_SOLVER,
        asked={"height": 48, "width": 80, "num_frames": 9, "guidance_scale": 4.0},
        text={"cond": 9, "uncond": 4},
    ),
    "flux": Recipe(
        pipeline="FluxPipeline",
        transformer={
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        vae={
            "block_out_channels": (8, 8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        scheduler=FLUX_SOLVER,
        asked={"height": 48, "width": 80, "guidance_scale": 3.5},
        text={"cond": 512},
    ),
    "qwen_image": Recipe(
        pipeline="QwenImagePipeline",
        transformer={
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 2,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        vae={
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.1, 0.9, 1.3, 1.0],
        },
        scheduler=QWEN_SOLVER,
        asked={"height": 48, "width": 80, "negative_prompt": " ", "true_cfg_scale": 4.0},
        text={"cond": 11, "uncond": 5},
    ),
}
SCALES = {"real": REAL, "tiny": TINY}


@dataclass(frozen=True)
class Model:
    """Random modules of one recipe on one device."""

    recipe: Recipe
    family: Any
    """The product's `Family`, with its processors installed."""
    embeddings: dict[str, torch.Tensor]

    def executor(self, groups: Mapping[Layout, Groups] | None = None) -> Executor:
        """The product's own, over the denoiser; one per model, since its hooks stay on the module."""
        family: Family = self.family
        sequence = SequenceParallel(family.denoiser, family.sequence_plan, choose("auto"), family.attention_processor)
        return Executor(family, self.recipe.card, sequence, groups or {Layout(): SOLO}, lambda *_: None)

    def state(self, steps: int, seed: int = 0) -> RequestState:
        """A request that has been encoded, at its first step."""
        generator = torch.Generator("cpu").manual_seed(seed)
        state: RequestState = self.family.prepare(
            Request("bench", self.recipe.params(steps)), self.embeddings, generator
        )
        state.generator = generator
        return state

    def vae_latents(self, state: RequestState) -> torch.Tensor:
        """What the VAE's own `decode` takes: (1, channels, frames, h, w), or without frames for FLUX."""
        vae = self.family.vae
        latents = self.family.to_grid(state.latents, state.params)[None].to(vae.dtype)
        if self.recipe.pipeline == "FluxPipeline":
            scaled: torch.Tensor = latents[:, :, 0] / vae.config.scaling_factor + vae.config.shift_factor
            return scaled
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        unscaled: torch.Tensor = latents * std + mean
        return unscaled

    def stock(self, denoiser: nn.Module) -> Any:
        """diffusers' own pipeline around a denoiser."""
        absent = dict.fromkeys(PARTS[self.recipe.pipeline].absent)
        cls, solver = getattr(diffusers, self.recipe.pipeline), copy.deepcopy(self.family.solver)
        pipeline = cls(**absent, vae=self.family.vae, scheduler=solver, transformer=denoiser)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def words(self, steps: int, seed: int = 0) -> dict[str, Any]:
        """What diffusers' pipeline is called with for the same request."""
        params = self.recipe.params(steps)
        shared: dict[str, Any] = {"height": params.height, "width": params.width, "num_inference_steps": steps}
        shared |= {"latents": self.state(steps, seed).latents, "output_type": "latent"}
        embeds: dict[str, Any]
        cond, uncond = self.embeddings["cond"], self.embeddings.get("uncond")
        match self.recipe.card.family:
            case "wan":
                assert uncond is not None
                embeds = {"prompt_embeds": _padded(cond), "negative_prompt_embeds": _padded(uncond)}
                return shared | embeds | {"num_frames": params.num_frames, "guidance_scale": params.guidance_scale}
            case "flux":
                embeds = {"prompt_embeds": cond, "pooled_prompt_embeds": self.embeddings["cond" + POOLED]}
                return shared | embeds | {"guidance_scale": params.guidance_scale}
            case _:
                embeds = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
                return shared | embeds | {"true_cfg_scale": params.true_cfg_scale}


def build(recipe: Recipe, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype = torch.float32) -> Model:
    """Everything of the recipe; weights are drawn on the device in their own precision, at no time in another."""
    parts = PARTS[recipe.pipeline]
    denoiser, vae = unfilled(recipe, dtype), _empty(parts.vae, recipe.vae, vae_dtype)
    for seed, module in enumerate((denoiser, vae)):
        _randomise(module, device, seed)
    embeddings = {
        branch: _noise((1, count, _text_dim(recipe)), device, dtype, place)
        for place, (branch, count) in enumerate(recipe.text.items())
    }
    if recipe.pipeline == "FluxPipeline":
        pooled = (1, recipe.transformer["pooled_projection_dim"])
        embeddings |= {branch + POOLED: _noise(pooled, device, dtype, 9) for branch in recipe.text}
    return Model(recipe, _family(recipe, device, denoiser, vae, parts.solver(**recipe.scheduler)), embeddings)


def twin(model: Model, dtype: torch.dtype | None = None) -> Any:
    """Another denoiser with the same weights, in the same memory unless it has another precision; stock processors."""
    family = model.family
    module = unfilled(model.recipe, dtype or family.dtype)
    known = dict(family.denoiser.named_parameters())
    for slot in slots(module):
        slot.put(known[slot.names[0]].detach().to(slot.parameter.dtype))
    module.to(family.device)
    return module


def cast(model: Model, dtype: torch.dtype) -> Model:
    """The same model in another precision."""
    solver = copy.deepcopy(model.family.solver)
    family = _family(model.recipe, model.family.device, twin(model, dtype), model.family.vae, solver)
    return Model(model.recipe, family, {name: value.to(dtype) for name, value in model.embeddings.items()})


def _family(recipe: Recipe, device: torch.device, denoiser: Any, vae: Any, solver: Any) -> Any:
    """The product's family around ready modules, as its `load` would make it."""
    card: Any = recipe.card
    strips = StripParallel(vae.decoder)
    match recipe.pipeline:
        case "WanPipeline":
            text = FoldedText()
            for block in denoiser.blocks:
                block.attn2.set_processor(TextAttention(text))
            return WanFamily(card, device, None, None, denoiser, vae, solver, text, strips)
        case "FluxPipeline":
            return FluxFamily(card, device, {}, None, None, denoiser, vae, solver, strips)
        case _:
            return QwenImageFamily(card, device, None, None, denoiser, vae, solver, strips)


def unfilled(recipe: Recipe, dtype: torch.dtype) -> Any:
    """The denoiser without values."""
    return _empty(PARTS[recipe.pipeline].denoiser, recipe.transformer, dtype)


def _empty(cls: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The module without values, each parameter in the precision that a loaded one would have."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return empty_module(cls, Path(folder), dtype)


def _randomise(module: nn.Module, device: torch.device, seed: int) -> None:
    """Noise everywhere, gates and norms too, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator(device).manual_seed(seed)
    for slot in slots(module):
        values = torch.empty(slot.parameter.shape, dtype=slot.parameter.dtype, device=device)
        if values.ndim > 1:
            values.normal_(0.0, max(values[0].numel(), 1) ** -0.5, generator=generator)
        else:
            values.normal_(0.0 if slot.names[0].endswith("bias") else 1.0, 0.1, generator=generator)
        slot.put(values)
    module.to(device)


def _noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(device, dtype)


def _text_dim(recipe: Recipe) -> int:
    width: int = recipe.transformer.get("text_dim") or recipe.transformer["joint_attention_dim"]
    return width


def _padded(text: torch.Tensor) -> torch.Tensor:
    """(1, tokens, dim) with the zeros that the Wan pipeline appends."""
    return torch.nn.functional.pad(text, (0, 0, 0, WAN_TEXT - text.shape[1]))
