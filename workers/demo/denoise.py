"""The demo transformer's training loss: velocity, heavier near the shape, and two losses that exist in training only.

Wan has relative positions only; from pure noise nothing tells a token where it is. So a linear head must read each
token's frame, row and column from the input of an early block, and another what the prompt asks for. Without them the
model learns colours and hardly any motion.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from workers.demo.data import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, describe
from workers.demo.trainer import Losses

CLASSES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "motion": MOTIONS,
    "size": tuple(SIZES),
}
TEXT_TOKENS = 512
"""What the pipeline pads prompts to, with zero vectors that the model attends to."""
WORDS = 26
"""Training pads to this many and counts the zero vectors as often as needed: the same result, far fewer tokens."""
PLACES = 16
"""The most frames, rows or columns of tokens that the position head can name."""
HEADS_AT = 2
"""The heads read the input of this block."""


class WordsHead(nn.Linear):
    """Reads from every token all that the prompt asks for."""

    def __init__(self, width: int) -> None:
        super().__init__(width, sum(len(names) for names in CLASSES.values()))

    def loss(self, hidden_BLD: torch.Tensor, scenes: Sequence[Scene], mask_BL: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the attributes; only of the tokens in the mask."""
        parts = self(hidden_BLD).float().split([len(names) for names in CLASSES.values()], dim=2)
        total = hidden_BLD.new_zeros((), dtype=torch.float32)
        for part, (attribute, names) in zip(parts, CLASSES.items(), strict=True):
            wanted = torch.tensor([names.index(getattr(scene, attribute)) for scene in scenes], device=part.device)
            each = F.cross_entropy(part.movedim(2, 1), wanted[:, None].expand(-1, part.shape[1]), reduction="none")
            total = total + (each * mask_BL).sum() / mask_BL.sum().clamp(min=1)
        return total / len(CLASSES)


@dataclass(frozen=True)
class Batch:
    """latents (B, C, T, H, W), normalised; what they show; where the random numbers come from."""

    latents: torch.Tensor
    scenes: Sequence[Scene]
    rng: random.Random
    generator: torch.Generator


class CountedText:
    """Cross-attention whose padding counts several times: `bias` (B, 1, 1, L) is added to the scores."""

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: object
    ) -> torch.Tensor:
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        k = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        v = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out: torch.Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class DenoiserLoss(nn.Module):
    """Text encoder, transformer and the heads; called with a batch it gives the losses."""

    def __init__(self, tokenizer: Any, text_encoder: nn.Module, transformer: Any, compiled: bool = False) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.place_head = nn.Linear(width, 3 * PLACES)
        self.words_head = WordsHead(width)
        self._tokenizer = tokenizer
        self._counted = CountedText()
        self._seen: list[torch.Tensor] = []
        for block in transformer.blocks:
            block.attn2.set_processor(self._counted)
        early = min(HEADS_AT, len(transformer.blocks) - 1)
        transformer.blocks[early].register_forward_pre_hook(lambda _, args: self._seen.append(args[0]))
        if compiled:
            for block in transformer.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)

    def forward(self, batch: Batch) -> Losses:
        device = batch.latents.device
        count = len(batch.latents)
        silent = torch.rand(count, generator=batch.generator) < 0.1
        prompts = ["" if no else describe(s, batch.rng) for s, no in zip(batch.scenes, silent.tolist(), strict=True)]
        text = self._embed(prompts, device)
        spoken = ~silent[:, None].to(device)
        sigma = _sigmas(count, batch.generator).to(device)
        noise = torch.randn(batch.latents.shape, generator=batch.generator).to(device)
        wide = sigma.view(-1, 1, 1, 1, 1)
        noisy = batch.latents.lerp(noise, wide)
        self._seen.clear()
        velocity = self.transformer(noisy, sigma * 1000, text, return_dict=False)[0]
        error = (velocity - (noise - batch.latents)).square().mean(dim=1)
        weight = _weight(batch.latents, sigma)
        losses = {
            "velocity": error.mean(),
            "weighted": (error * weight).sum() / weight.sum(),
            "place": self._place_loss(self._seen[0], batch.latents.shape[2:]),
            "words": self.words_head.loss(self._seen[0], batch.scenes, spoken.expand(-1, self._seen[0].shape[1])),
        }
        return {"total": losses["weighted"] + 0.1 * losses["place"] + 0.05 * losses["words"]} | losses

    def _embed(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """(B, WORDS, text dim), zero after the last token of each; leaves in the processor how often zeros count."""
        tokens = self._tokenizer(prompts, padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(device)
        hidden = self.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state * mask[:, :, None]
        words = mask.sum(dim=1, keepdim=True)
        zeros = ((TEXT_TOKENS - words) / (WORDS - words).clamp(min=1)).log()
        self._counted.bias = torch.where(mask.bool(), 0.0, zeros)[:, None, None, :]
        return hidden

    def _place_loss(self, hidden: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Each token must name its frame, row and column."""
        frames, rows, columns = (n // p for n, p in zip(shape, self.transformer.config.patch_size, strict=True))
        grid = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
        wanted = torch.stack([axis.flatten() for axis in grid], dim=1).clamp(max=PLACES - 1).to(hidden.device)
        logits = self.place_head(hidden).unflatten(2, (3, PLACES)).movedim(3, 1)
        return F.cross_entropy(logits, wanted.expand(len(hidden), -1, -1))


def _sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """One per clip, spread evenly and then shifted as the sampler's steps are (flow_shift 3).

    Every fourth is not shifted, or little would be learnt of the small sigmas of runs with many steps.
    """
    even = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    shift = torch.where(torch.arange(count) % 4 == 0, 1, 3)
    return shift * even / (1 + (shift - 1) * even)


def _weight(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W): up to 4 where a cell differs from its frame's usual one, once enough can be seen (sigma < 0.85)."""
    usual = latents.flatten(3).median(dim=3).values[..., None, None]
    away = (latents - usual).norm(dim=1)
    near = (2 * away / away.amax(dim=(1, 2, 3), keepdim=True)).clamp(max=1)
    visible = ((0.85 - sigma) / 0.35).clamp(0, 1)
    return 1 + 3 * near * visible.view(-1, 1, 1, 1)
