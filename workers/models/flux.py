"""FLUX.1 text-to-image with diffusers' own modules, one step at a time. Sizes and limits are its card's business.

Follows `diffusers.FluxPipeline` formula by formula, so that the same seed gives the same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from runtime.config import Config, VaeConfig
from runtime.errors import InvalidInput
from runtime.models.flux import TEXT_TOKENS, FluxCard
from runtime.protocol import Request, TokenizerExport
from runtime.sampling import ResolvedParams
from workers.attention.backends import Attend
from workers.models.loading import Loader, load_scheduler
from workers.models.prompts import TokenIds, token_ids
from workers.models.still import decode_still, flow_solver, pack, packed_noise, unpack
from workers.parallel.comm import ALONE, Group
from workers.parallel.sequence import SequencePlan, Split
from workers.parallel.vae import StripParallel
from workers.state import RequestState

POOLED = "/pooled"
"""Behind a branch's name: its pooled embedding."""

SEQUENCE_PLAN = SequencePlan(
    split_inputs={
        "": {
            "hidden_states": Split("image", 1),
            "encoder_hidden_states": Split("text", 1),
            "img_ids": Split("image", 0),
            "txt_ids": Split("text", 0),
        }
    },
    split_outputs={},
    gather_outputs={"proj_out": Split("image", 1)},
    attention={
        "transformer_blocks.*.attn": ("text", "image"),
        "single_transformer_blocks.*.attn": ("text", "image"),
    },
)
"""Text and picture are split from the first embedder on, positions with them; only the picture comes out."""


class FluxAttention:
    """Attention processor of one FLUX block: projections, norms and rotary embedding around `attend`.

    Shapes: hidden_states (B, S, H*D), encoder_hidden_states (B, T, H*D) -> the same; text comes before the image. In
    a single-stream block both are in hidden_states already.
    """

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert attention_mask is None, "FLUX attends to all of its text"
        q, k, v = (split_heads(project(hidden_states), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (split_heads(project(encoder_hidden_states), attn) for project in projections)
            q = torch.cat((attn.norm_added_q(text_q), q), dim=1)
            k = torch.cat((attn.norm_added_k(text_k), k), dim=1)
            v = torch.cat((text_v, v), dim=1)
        q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
        k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
        out = self._attend(q, k, v).flatten(2, 3).type_as(q)
        if encoder_hidden_states is None:
            return out
        text, image = out.split((encoder_hidden_states.shape[1], hidden_states.shape[1]), dim=1)
        for layer in attn.to_out:
            image = layer(image)
        return image, attn.to_add_out(text)


def split_heads(x: torch.Tensor, attn: Any) -> torch.Tensor:
    """(B, S, H*D) -> (B, S, H, D)."""
    return x.unflatten(-1, (attn.heads, -1))


@dataclass
class FluxFamily:
    """The modules of one FLUX.1 model on one rank."""

    card: FluxCard
    device: torch.device
    tokenizers_by_encoder: dict[str, Any]
    clip: Any
    t5: Any
    denoiser: Any
    vae: Any
    solver: Any
    strips: StripParallel
    sequence_plan: SequencePlan = SEQUENCE_PLAN
    attention_processor: Callable[[Attend], Any] = FluxAttention

    @staticmethod
    def load(
        folder: Path, card: FluxCard, config: Config, loader: Loader, dtypes: dict[str, torch.dtype]
    ) -> FluxFamily:
        clip = loader.whole(CLIPTextModel, folder / "text_encoder", dtypes["text_encoder"])
        t5 = loader.text_encoder(T5EncoderModel, folder / "text_encoder_2", dtypes["text_encoder_2"])
        denoiser = loader.denoiser(FluxTransformer2DModel, folder / "transformer", dtypes["dit"])
        vae = loader.vae(AutoencoderKL, folder / "vae", dtypes["vae"], config.vae_config.load_encoder)
        if config.vae_tiling:
            tile(vae, config.vae_config)
        tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
        return FluxFamily(
            card=card,
            device=loader.device,
            tokenizers_by_encoder={
                encoder: AutoTokenizer.from_pretrained(folder / name) for encoder, name in tokenizers.items()
            },
            clip=clip,
            t5=t5,
            denoiser=denoiser,
            vae=vae,
            solver=load_scheduler(folder),
            strips=StripParallel(vae.decoder),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return self.denoiser.x_embedder.weight.dtype

    def tokenizers(self) -> tuple[TokenizerExport, ...]:
        return tuple(
            TokenizerExport(encoder, tokenizer.backend_tokenizer.to_str(), self._limit(encoder))
            for encoder, tokenizer in self.tokenizers_by_encoder.items()
        )

    def encode(self, requests: Sequence[Request]) -> list[dict[str, torch.Tensor]]:
        known: dict[tuple[tuple[int, ...], ...], tuple[torch.Tensor, torch.Tensor]] = {}
        return [self._encode_one(request, known) for request in requests]

    def _encode_one(
        self, request: Request, known: dict[tuple[tuple[int, ...], ...], tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        embeddings = {}
        for branch in self.card.branches(request.params, 0):
            ids = tuple(self._token_ids(request, encoder, branch) for encoder in self.tokenizers_by_encoder)
            if ids not in known:
                known[ids] = self._embed(*ids)
            embeddings[branch], embeddings[branch + POOLED] = known[ids]
        return embeddings

    def _limit(self, encoder: str) -> int:
        """CLIP reads a prompt's beginning; T5 reads all of it."""
        return TEXT_TOKENS if encoder == "text_encoder_2" else self.tokenizers_by_encoder[encoder].model_max_length

    def _token_ids(self, request: Request, encoder: str, branch: str) -> TokenIds:
        tokenizer = self.tokenizers_by_encoder[encoder]
        return token_ids(request, branch, encoder, self.card, tokenizer, self._limit(encoder))

    def _embed(self, clip_ids: tuple[int, ...], t5_ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's (1, 512, text dim) and CLIP's pooled (1, pooled dim); both read their padding as the pipeline has it.

        One prompt per forward: its embedding does not depend on its neighbours, to the bit.
        """
        pooled = self.clip(self._padded("text_encoder", clip_ids)).pooler_output
        text = self.t5(self._padded("text_encoder_2", t5_ids))[0]
        return text.to(self.dtype), pooled.to(self.dtype)

    def _padded(self, encoder: str, ids: tuple[int, ...]) -> torch.Tensor:
        padded = self.tokenizers_by_encoder[encoder].pad(
            {"input_ids": [list(ids)]}, padding="max_length", max_length=self._limit(encoder), return_tensors="pt"
        )
        return padded.input_ids.to(self.device)

    def prepare(
        self, request: Request, embeddings: dict[str, torch.Tensor], generator: torch.Generator
    ) -> RequestState:
        _, tokens, channels = self.card.latent_shape(request.params)
        solver = flow_solver(self.solver, request.params.num_inference_steps, tokens, self.device)
        latents = packed_noise(self.card.grid(request.params), channels, generator, self.device)
        return RequestState(request, latents, solver, embeddings)

    def inputs(self, states: Sequence[RequestState], branches: Sequence[str]) -> dict[str, Any]:
        rows = [(state, branch) for branch in branches for state in states]
        # Filled where they are used: a copy from the host would wait for all that is queued on the device.
        scales = [torch.full((1,), state.params.guidance_scale, device=self.device) for state, _ in rows]
        return {
            "hidden_states": torch.cat([state.latents.to(self.dtype) for state, _ in rows]),
            # Rounded before the division, as in the pipeline: the denoiser multiplies by 1000 again and finds what was
            # rounded once. The other order is off by up to twice as much in bf16.
            "timestep": torch.stack([state.timestep for state, _ in rows]).to(self.dtype) / 1000,
            "guidance": torch.cat(scales) if self.card.guidance_embeds else None,
            "pooled_projections": torch.cat([state.embeddings[branch + POOLED] for state, branch in rows]),
            "encoder_hidden_states": torch.cat([state.embeddings[branch] for state, branch in rows]),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=self.device),
            "img_ids": positions(self.card.grid(states[0].params), self.device),
            "return_dict": False,
        }

    def advance(self, state: RequestState, predictions: dict[str, torch.Tensor]) -> None:
        prediction = predictions["cond"].float()
        if "uncond" in predictions:
            uncond = predictions["uncond"].float()
            prediction = uncond + state.params.true_cfg_scale * (prediction - uncond)
        state.advance(prediction)

    def to_grid(self, latents: torch.Tensor, params: ResolvedParams) -> torch.Tensor:
        return unpack(latents, self.card.grid(params))[0].unsqueeze(1)

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        return pack(grid.transpose(0, 1))

    def decode(self, state: RequestState, group: Group = ALONE) -> Iterator[torch.Tensor]:
        latents = unpack(state.latents, self.card.grid(state.params))
        config = self.vae.config
        latents = (latents / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        yield decode_still(self.vae, latents, self.strips, group)


def tile(vae: Any, wanted: VaeConfig) -> None:
    """Switch on the VAE's own tiling, which knows square tiles only.

    Raises:
        InvalidInput: the tile's sides differ.
    """
    sides = {side for side in (wanted.tile_sample_min_height, wanted.tile_sample_min_width) if side is not None}
    if len(sides) > 1:
        raise InvalidInput("vae_config.tile_sample_min_width", "must equal the tile's height: this VAE's are square")
    for side in sides:
        vae.tile_sample_min_size = side
        vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
    vae.enable_tiling()


def positions(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(tokens, 3): 0, row and column of every image token."""
    rows, columns = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    return torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
