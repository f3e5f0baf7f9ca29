"""Qwen-Image text-to-image with diffusers' own modules, one step at a time. Sizes and limits are its card's business.

Follows `diffusers.QwenImagePipeline` formula by formula, so that the same seed gives the same picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from runtime.config import Config
from runtime.models.qwen_image import MAX_TEXT_TOKENS, TEMPLATE_TOKENS, QwenImageCard
from runtime.protocol import Request, TokenizerExport
from runtime.sampling import ResolvedParams
from workers.attention.backends import Attend, as_bias
from workers.models.loading import Loader, load_scheduler
from workers.models.prompts import TokenIds, embed_branches, token_ids
from workers.models.still import decode_still, flow_solver, pack, packed_noise, unpack
from workers.parallel.comm import ALONE, Group
from workers.parallel.sequence import SequencePlan, Split
from workers.parallel.vae import StripParallel
from workers.state import RequestState

MAX_IDS = TEMPLATE_TOKENS + MAX_TEXT_TOKENS
"""The pipeline embeds more and cuts afterwards; its encoder is causal, so that what is cut changes nothing before."""

SEQUENCE_PLAN = SequencePlan(
    split_inputs={
        "transformer_blocks.0": {"hidden_states": Split("image", 1), "encoder_hidden_states": Split("text", 1)},
        "transformer_blocks.*": {"encoder_hidden_states_mask": Split("text", 1)},
    },
    split_outputs={"pos_embed": {0: Split("image", 0), 1: Split("text", 0)}},
    gather_outputs={"proj_out": Split("image", 1)},
    attention={"transformer_blocks.*.attn": ("text", "image")},
)
"""Text and picture are split before the first block, the text's mask in every block; only the picture comes out."""


class QwenImageAttention:
    """Attention processor of one Qwen-Image block: projections, norms and rotary embedding around `attend`.

    Shapes: hidden_states (B, S, H*D), encoder_hidden_states (B, T, H*D), mask (B, T) -> the first two; text comes
    before the image, and nobody attends to its padding.
    """

    def __init__(self, padding: TextPadding, attend: Attend) -> None:
        self._padding = padding
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert attention_mask is None, "the mask is the text's"
        assert image_rotary_emb is not None
        image_angles, text_angles = image_rotary_emb
        image = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        text_qkv = _project(encoder_hidden_states, attn.heads, text_angles, *text)
        image_qkv = _project(hidden_states, attn.heads, image_angles, *image)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text_qkv, image_qkv, strict=True))
        bias = self._padding.bias(encoder_hidden_states_mask, hidden_states.shape[1], q.dtype)
        out = self._attend(q, k, v, key_bias=bias).flatten(2, 3).type_as(q)
        out_text, out_image = out.split((encoder_hidden_states.shape[1], hidden_states.shape[1]), dim=1)
        for layer in attn.to_out:
            out_image = layer(out_image)
        return out_image, attn.to_add_out(out_text)


@dataclass
class TextPadding:
    """The score bias of the forward under way, made once for all blocks: they get the very same mask."""

    _mask: torch.Tensor | None = None
    _bias: torch.Tensor | None = None

    def bias(self, mask: torch.Tensor | None, image_tokens: int, dtype: torch.dtype) -> torch.Tensor | None:
        """(B, T), true for a token and false for padding -> (B, 1, 1, T + image tokens)."""
        if mask is None:
            return None
        if mask is not self._mask:
            keep = torch.nn.functional.pad(mask, (0, image_tokens), value=True)
            self._mask, self._bias = mask, as_bias(keep, dtype)
        return self._bias


def _project(
    x: torch.Tensor, heads: int, angles: torch.Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one stream, (B, S, H, D) each, with its own projections and positions."""
    q, k, v = (project(x).unflatten(-1, (heads, -1)) for project in (to_q, to_k, to_v))
    return _rotate(norm_q(q), angles), _rotate(norm_k(k), angles), v


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """diffusers' own; a small picture may leave a rank without any of its tokens, which that cannot reshape."""
    rotated: torch.Tensor = apply_rotary_emb_qwen(x, angles, use_real=False) if x.shape[1] else x
    return rotated


@dataclass
class QwenImageFamily:
    """The modules of one Qwen-Image model on one rank."""

    card: QwenImageCard
    device: torch.device
    tokenizer: Any
    text_encoder: Any
    denoiser: Any
    vae: Any
    solver: Any
    strips: StripParallel
    sequence_plan: SequencePlan = SEQUENCE_PLAN
    attention_processor: Callable[[Attend], Any] = field(
        default_factory=lambda: functools.partial(QwenImageAttention, TextPadding())
    )

    @staticmethod
    def load(
        folder: Path, card: QwenImageCard, config: Config, loader: Loader, dtypes: dict[str, torch.dtype]
    ) -> QwenImageFamily:
        text_encoder = loader.text_encoder(
            Qwen2_5_VLForConditionalGeneration,
            folder / "text_encoder",
            dtypes["text_encoder"],
            used="model",
            unused=card.unused["text_encoder"],
        )
        denoiser = loader.denoiser(QwenImageTransformer2DModel, folder / "transformer", dtypes["dit"])
        vae = loader.vae(AutoencoderKLQwenImage, folder / "vae", dtypes["vae"], config.vae_config.load_encoder)
        if config.vae_tiling:
            vae.enable_tiling(config.vae_config.tile_sample_min_height, config.vae_config.tile_sample_min_width)
        return QwenImageFamily(
            card=card,
            device=loader.device,
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder=text_encoder,
            denoiser=denoiser,
            vae=vae,
            solver=load_scheduler(folder),
            strips=StripParallel(vae.decoder),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return self.denoiser.img_in.weight.dtype

    def tokenizers(self) -> tuple[TokenizerExport, ...]:
        return (TokenizerExport("text_encoder", self.tokenizer.backend_tokenizer.to_str(), MAX_IDS),)

    def encode(self, requests: Sequence[Request]) -> list[dict[str, torch.Tensor]]:
        return embed_branches(requests, self.card, self._token_ids, self._embed)

    def _token_ids(self, request: Request, branch: str) -> TokenIds:
        return token_ids(request, branch, "text_encoder", self.card, self.tokenizer, MAX_IDS)

    def _embed(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """(1, tokens, text dim) without the template's beginning.

        One prompt per forward: its embedding does not depend on its neighbours, to the bit.
        """
        ids = torch.tensor([tokens], device=self.device)
        hidden = self.text_encoder(ids, torch.ones_like(ids), use_cache=False).last_hidden_state
        # A copy: a view would hold the template's part for as long as the request lives.
        return hidden[:, TEMPLATE_TOKENS:].to(self.dtype, copy=True)

    def prepare(
        self, request: Request, embeddings: dict[str, torch.Tensor], generator: torch.Generator
    ) -> RequestState:
        _, tokens, channels = self.card.latent_shape(request.params)
        solver = flow_solver(self.solver, request.params.num_inference_steps, tokens, self.device)
        latents = packed_noise(self.card.grid(request.params), channels, generator, self.device)
        return RequestState(request, latents, solver, embeddings)

    def inputs(self, states: Sequence[RequestState], branches: Sequence[str]) -> dict[str, Any]:
        rows = [(state, branch) for branch in branches for state in states]
        text, mask = pad_text([state.embeddings[branch] for state, branch in rows])
        return {
            "hidden_states": torch.cat([state.latents.to(self.dtype) for state, _ in rows]),
            "timestep": torch.stack([state.timestep for state, _ in rows]) / 1000,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, *self.card.grid(states[0].params))]] * len(rows),
            "return_dict": False,
        }

    def advance(self, state: RequestState, predictions: dict[str, torch.Tensor]) -> None:
        prediction = predictions["cond"].float()
        if "uncond" in predictions:
            prediction = rescaled_guidance(prediction, predictions["uncond"].float(), state.params.true_cfg_scale)
        state.advance(prediction)

    def to_grid(self, latents: torch.Tensor, params: ResolvedParams) -> torch.Tensor:
        return unpack(latents, self.card.grid(params))[0].unsqueeze(1)

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        return pack(grid.transpose(0, 1))

    def decode(self, state: RequestState, group: Group = ALONE) -> Iterator[torch.Tensor]:
        latents = unpack(state.latents, self.card.grid(state.params)).unsqueeze(2).to(self.vae.dtype)
        config = self.vae.config
        mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = 1.0 / latents.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)
        yield decode_still(self.vae, latents / std + mean, self.strips, group)


def pad_text(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(1, tokens_i, dim) per row -> (B, longest, dim) and a mask (B, longest), None where nothing is padded."""
    lengths = [prompt.shape[1] for prompt in prompts]
    if len(set(lengths)) == 1:
        return torch.cat(list(prompts)), None
    text = prompts[0].new_zeros(len(prompts), max(lengths), prompts[0].shape[-1])
    # Filled where it is used: a copy from the host would wait for all that is queued on the device.
    mask = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
    for row, prompt in enumerate(prompts):
        text[row, : lengths[row]] = prompt[0]
        mask[row, : lengths[row]] = True
    return text, mask


def rescaled_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Guidance at the length of the conditional prediction, token by token: (1, tokens, channels) each."""
    combined = uncond + scale * (cond - uncond)
    return combined * (cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
