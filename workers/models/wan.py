"""Wan text-to-video with diffusers' own modules, one step at a time. Sizes and limits are its card's business.

Follows `diffusers.WanPipeline` formula by formula, so that the same seed gives the same video.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.utils.torch_utils import randn_tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from runtime.config import Config
from runtime.models.card import Card
from runtime.models.wan import TEXT_TOKENS
from runtime.protocol import Request, TokenizerExport
from runtime.sampling import ResolvedParams
from workers.attention.backends import Attend
from workers.models.loading import Loader, load_scheduler
from workers.models.prompts import TokenIds, embed_branches, token_ids
from workers.parallel.comm import ALONE, Group
from workers.parallel.sequence import SequencePlan, Split
from workers.parallel.vae import StripParallel, my_strip, strip_rows, whole_frames
from workers.state import RequestState

SEQUENCE_PLAN = SequencePlan(
    split_inputs={"blocks.0": {"hidden_states": Split("video", 1)}},
    split_outputs={"rope": {0: Split("video", 1), 1: Split("video", 1)}},
    gather_outputs={"proj_out": Split("video", 1)},
    attention={"blocks.*.attn1": ("video",)},
)
"""Video tokens are split before the first block and gathered after the last projection; text stays whole."""


class WanAttention:
    """Attention processor of one Wan self-attention: projections, norms and rotary embedding around `attend`.

    Shapes: hidden_states (B, S, H*D) -> (B, S, H*D), where S may be this rank's share of the tokens.
    """

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        assert encoder_hidden_states is None, "this is cross-attention"
        assert rotary_emb is not None
        q, k, v = _project(attn, hidden_states, hidden_states)
        q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        return _finish(attn, self._attend(q, k, v).type_as(q))


class TextAttention:
    """Attention processor of one Wan cross-attention, over a text whose padding was folded into two tokens.

    The pipeline attends to 512 text tokens without a mask; all padding is zero before the text embedder, so all of it
    has one key and one value, and n equal keys weigh as much as one with log(n) added to its score. Exact, and some
    five hundred text tokens cheaper in every layer.
    """

    def __init__(self, text: FoldedText) -> None:
        self._text = text

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        assert encoder_hidden_states is not None, "this is self-attention"
        q, k, v = (x.transpose(1, 2) for x in _project(attn, hidden_states, encoder_hidden_states))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._text.bias)
        return _finish(attn, out.transpose(1, 2).type_as(q))


@dataclass
class FoldedText:
    """The score bias that belongs to the text of the forward under way: (B, 1, 1, tokens)."""

    bias: torch.Tensor | None = None

    def fold(self, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """(1, tokens_i, dim) per row, unpadded -> (B, longest + 2, dim); sets the bias to match."""
        longest = max(prompt.shape[1] for prompt in prompts)
        width = min(longest + 2, TEXT_TOKENS)
        text = prompts[0].new_zeros(len(prompts), width, prompts[0].shape[-1])
        # Filled where it is used: a copy from the host would wait for all that is queued on the device.
        bias = text.new_full((len(prompts), 1, 1, width), -math.inf)
        for row, prompt in enumerate(prompts):
            tokens = prompt.shape[1]
            text[row, :tokens] = prompt[0]
            bias[row, ..., :tokens] = 0.0
            for place, score in enumerate(folded_scores(TEXT_TOKENS - tokens, text.dtype), start=tokens):
                bias[row, ..., place] = score
        self.bias = bias
        return text


@cache
def folded_scores(count: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Biases of the tokens, at most two, that together weigh as `count` equal ones do; `dtype` has these numbers.

    log(count) in bf16 is off by up to 1.6 % of the weight: it is rounded down, and a second token has the rest.
    """
    if count < 2:
        return (0.0,) * count
    first = torch.tensor(math.log(count), dtype=dtype)
    while math.exp(first) >= count:
        first -= torch.finfo(dtype).eps * first
    return first.item(), torch.tensor(math.log(count - math.exp(first)), dtype=dtype).item()


def _project(
    attn: Any, hidden_states: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q of the hidden states, k and v of the context: (B, S, H, D) each."""
    q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
    k = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
    return q, k, attn.to_v(context).unflatten(2, (attn.heads, -1))


def _finish(attn: Any, out_BSHD: torch.Tensor) -> torch.Tensor:
    out = out_BSHD.flatten(2, 3)
    for layer in attn.to_out:
        out = layer(out)
    return out


def _rotate(x_BSHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of interleaved pairs; cos and sin repeat each frequency twice: (1, S, 1, D)."""
    even, odd = x_BSHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x_BSHD)


@dataclass
class WanFamily:
    """The modules of one Wan T2V model on one rank."""

    card: Card
    device: torch.device
    tokenizer: Any
    text_encoder: Any
    denoiser: Any
    vae: Any
    solver: Any
    text: FoldedText
    strips: StripParallel
    sequence_plan: SequencePlan = SEQUENCE_PLAN
    attention_processor: Callable[[Attend], Any] = WanAttention

    @staticmethod
    def load(folder: Path, card: Card, config: Config, loader: Loader, dtypes: dict[str, torch.dtype]) -> WanFamily:
        text_encoder = loader.text_encoder(UMT5EncoderModel, folder / "text_encoder", dtypes["text_encoder"])
        denoiser = loader.denoiser(WanTransformer3DModel, folder / "transformer", dtypes["dit"])
        vae = loader.vae(AutoencoderKLWan, folder / "vae", dtypes["vae"], config.vae_config.load_encoder)
        text = FoldedText()
        for block in denoiser.blocks:
            block.attn2.set_processor(TextAttention(text))
        if config.vae_tiling:
            vae.enable_tiling(config.vae_config.tile_sample_min_height, config.vae_config.tile_sample_min_width)
        return WanFamily(
            card=card,
            device=loader.device,
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder=text_encoder,
            denoiser=denoiser,
            vae=vae,
            solver=load_scheduler(folder),
            text=text,
            strips=StripParallel(vae.decoder),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in; some of its weights stay fp32."""
        return self.denoiser.patch_embedding.weight.dtype

    def tokenizers(self) -> tuple[TokenizerExport, ...]:
        return (TokenizerExport("text_encoder", self.tokenizer.backend_tokenizer.to_str(), TEXT_TOKENS),)

    def encode(self, requests: Sequence[Request]) -> list[dict[str, torch.Tensor]]:
        return embed_branches(requests, self.card, self._token_ids, self._embed)

    def _token_ids(self, request: Request, branch: str) -> TokenIds:
        return token_ids(request, branch, "text_encoder", self.card, self.tokenizer, TEXT_TOKENS)

    def _embed(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """(1, tokens, text dim), without the padding that the pipeline masks in the encoder and zeroes after it.

        One prompt per forward: its embedding does not depend on its neighbours, to the bit.
        """
        ids = torch.tensor([tokens], device=self.device)
        return self.text_encoder(ids, torch.ones_like(ids)).last_hidden_state.to(self.dtype)

    def prepare(
        self, request: Request, embeddings: dict[str, torch.Tensor], generator: torch.Generator
    ) -> RequestState:
        solver = copy.deepcopy(self.solver)
        solver.set_timesteps(request.params.num_inference_steps, device=self.device)
        if hasattr(solver, "set_begin_index"):
            # Solvers that are told the timestep have no count of their own.
            solver.set_begin_index(0)
        latents = randn_tensor(
            self.card.latent_shape(request.params), generator=generator, device=self.device, dtype=torch.float32
        )
        return RequestState(request, latents, solver, embeddings)

    def inputs(self, states: Sequence[RequestState], branches: Sequence[str]) -> dict[str, Any]:
        rows = [(state, branch) for branch in branches for state in states]
        return {
            "hidden_states": torch.cat([state.latents.to(self.dtype) for state, _ in rows]),
            "timestep": torch.stack([state.timestep for state, _ in rows]),
            "encoder_hidden_states": self.text.fold([state.embeddings[branch] for state, branch in rows]),
            "return_dict": False,
        }

    def advance(self, state: RequestState, predictions: dict[str, torch.Tensor]) -> None:
        prediction = predictions["cond"]
        if "uncond" in predictions:
            uncond = predictions["uncond"]
            prediction = uncond + state.params.guidance_scale * (prediction - uncond)
        state.advance(prediction)

    def to_grid(self, latents: torch.Tensor, params: ResolvedParams) -> torch.Tensor:
        return latents[0]

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        return grid[None]

    def decode(self, state: RequestState, group: Group = ALONE) -> Iterator[torch.Tensor]:
        latents = state.latents.to(self.vae.dtype)
        config = self.vae.config
        mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = 1.0 / latents.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)
        rows = strip_rows(latents.shape[-2], group)
        if len(rows) == 1:
            group = ALONE
        # Strips are what tiles are for, less memory per rank, and they blend nothing.
        decoder = StreamDecoder(self.vae, my_strip(latents / std + mean, rows, group), tiling=group.size == 1)
        for index in range(latents.shape[2]):
            with self.strips.over(group, rows):
                pixels = decoder.frame(index)
            unit = (pixels[0] * 0.5 + 0.5).clamp(0, 1)
            strip = (unit.float() * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
            yield whole_frames(strip, rows, group) if group.size > 1 else strip


class StreamDecoder:
    """Wan's causal decoder, one latent frame per call, with the feature cache outside the module.

    Bitwise what `vae.decode` gives for all frames at once; several decodes can be open on one VAE. With tiling on and
    a frame larger than the tile, every tile has a cache of its own and frames are blended as `vae.tiled_decode` does.
    """

    def __init__(self, vae: Any, latents: torch.Tensor, *, tiling: bool = True) -> None:
        self._vae = vae
        self._latents = latents
        self._tiling = tiling and vae.use_tiling
        self._windows = self._tile_windows()
        convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._caches = [[[None] * convolutions for _ in row] for row in self._windows]
        # Frame by frame or all at once, a 1x1x1 convolution is the same; with tiles it belongs to each tile.
        self._hidden = latents if self._tiled else vae.post_quant_conv(latents)

    def frame(self, index: int) -> torch.Tensor:
        """(1, 3, frames, height, width) in [-1, 1]: 1 frame for index 0, `scale_factor_temporal` after."""
        rows = [
            [self._tile(index, window, cache) for window, cache in zip(windows, caches, strict=True)]
            for windows, caches in zip(self._windows, self._caches, strict=True)
        ]
        out = self._blend(rows) if self._tiled else rows[0][0]
        if self._vae.config.patch_size is not None:
            out = unpatchify(out, patch_size=self._vae.config.patch_size)
        return out.clamp(-1.0, 1.0)

    @property
    def _tiled(self) -> bool:
        return len(self._windows) > 1 or len(self._windows[0]) > 1

    def _tile_windows(self) -> list[list[tuple[slice, slice]]]:
        height, width = self._latents.shape[-2:]
        vae, ratio = self._vae, self._vae.spatial_compression_ratio
        tile_h, tile_w = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
        if not self._tiling or (height <= tile_h and width <= tile_w):
            return [[(slice(None), slice(None))]]
        rows = range(0, height, vae.tile_sample_stride_height // ratio)
        columns = range(0, width, vae.tile_sample_stride_width // ratio)
        return [[(slice(i, i + tile_h), slice(j, j + tile_w)) for j in columns] for i in rows]

    def _tile(self, index: int, window: tuple[slice, slice], cache: list[Any]) -> torch.Tensor:
        rows, columns = window
        hidden = self._hidden[:, :, index : index + 1, rows, columns]
        if self._tiled:
            hidden = self._vae.post_quant_conv(hidden)
        first = {"first_chunk": True} if index == 0 else {}
        out: torch.Tensor = self._vae.decoder(hidden, feat_cache=cache, feat_idx=[0], **first)
        return out

    def _blend(self, rows: list[list[torch.Tensor]]) -> torch.Tensor:
        """Cross-fade overlapping tiles; before unpatchify, so all pixel sizes are divided by the VAE's patch size."""
        vae, patch = self._vae, self._vae.config.patch_size or 1
        stride_h, stride_w = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
        fade_h, fade_w = vae.tile_sample_min_height // patch - stride_h, vae.tile_sample_min_width // patch - stride_w
        bands = []
        for i, row in enumerate(rows):
            band = []
            for j, tile in enumerate(row):
                if i > 0:
                    vae.blend_v(rows[i - 1][j], tile, fade_h)
                if j > 0:
                    vae.blend_h(row[j - 1], tile, fade_w)
                band.append(tile[..., :stride_h, :stride_w])
            bands.append(torch.cat(band, dim=-1))
        ratio = vae.spatial_compression_ratio // patch
        height, width = self._latents.shape[-2] * ratio, self._latents.shape[-1] * ratio
        return torch.cat(bands, dim=-2)[..., :height, :width]
