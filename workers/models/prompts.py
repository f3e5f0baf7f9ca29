"""A request's texts as token ids, by guidance branch, and each different text embedded once. Knows no encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from runtime.models.card import Card
from runtime.protocol import Request

PROMPTS = {"cond": "prompt", "uncond": "negative_prompt"}
"""Guidance branch -> the request's text for it."""

TokenIds = tuple[int, ...]


def token_ids(request: Request, branch: str, encoder: str, card: Card, tokenizer: Any, limit: int) -> TokenIds:
    """What the gateway made of the branch's text for this encoder, or else the same made here."""
    name = PROMPTS[branch]
    known = request.token_ids.get(encoder, {}).get(name)
    if known is not None:
        return known
    text = card.clean_prompt(getattr(request.params, name))
    return tuple(tokenizer(text, truncation=True, max_length=limit).input_ids)


def embed_branches(
    requests: Sequence[Request],
    card: Card,
    ids_of: Callable[[Request, str], TokenIds],
    embed: Callable[[TokenIds], torch.Tensor],
) -> list[dict[str, torch.Tensor]]:
    """Per request its embeddings by guidance branch; `embed` sees each different text once, and alone."""
    known: dict[TokenIds, torch.Tensor] = {}
    embeddings: list[dict[str, torch.Tensor]] = []
    for request in requests:
        ids = {branch: ids_of(request, branch) for branch in card.branches(request.params, 0)}
        for tokens in ids.values():
            if tokens not in known:
                known[tokens] = embed(tokens)
        embeddings.append({branch: known[tokens] for branch, tokens in ids.items()})
    return embeddings
