"""Prompts to token ids with the tokenizers that the workers exported. Imports neither transformers nor torch."""

from __future__ import annotations

from tokenizers import Tokenizer

from runtime.errors import InvalidInput
from runtime.models.card import Card
from runtime.protocol import ModelInfo
from runtime.sampling import ResolvedParams


class PromptTokenizer:
    """Token ids per encoder and prompt, exactly as the family's pipeline makes them before padding."""

    def __init__(self, model: ModelInfo, card: Card) -> None:
        self._card = card
        self._limits = {export.encoder: export.max_length for export in model.tokenizers}
        self._most = max(self._limits.values(), default=0)
        self._tokenizers: dict[str, Tokenizer] = {}
        for export in model.tokenizers:
            tokenizer = Tokenizer.from_str(export.json)
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if export.max_length < self._most:
                # Another encoder reads all of the prompt; the pipelines cut it for this one.
                tokenizer.enable_truncation(export.max_length)
            self._tokenizers[export.encoder] = tokenizer

    def tokenize(self, params: ResolvedParams) -> dict[str, dict[str, tuple[int, ...]]]:
        """Encoder -> "prompt" | "negative_prompt" -> ids.

        Raises:
            InvalidInput: a prompt does not even fit the encoder with the highest limit.
        """
        texts = {"prompt": params.prompt, "negative_prompt": params.negative_prompt}
        ids: dict[str, dict[str, tuple[int, ...]]] = {}
        for encoder, tokenizer in self._tokenizers.items():
            ids[encoder] = {}
            for name, text in texts.items():
                tokens = tuple(tokenizer.encode(self._card.clean_prompt(text)).ids)
                if len(tokens) > self._most:
                    raise InvalidInput(
                        name,
                        f"has {len(tokens)} tokens, the text encoder takes {self._most}; "
                        f"shorten it by {len(tokens) - self._most}",
                        code="string_above_max_length",
                    )
                ids[encoder][name] = tokens
        return ids

    def warnings(self, params: ResolvedParams) -> tuple[str, ...]:
        """What `tokenize` cuts off, as the family's pipeline does, in words for the user."""
        texts = {"prompt": params.prompt, "negative_prompt": params.negative_prompt}
        return tuple(
            f"{name}: {encoder} reads only its first {limit} tokens"
            for encoder, limit in self._limits.items()
            if limit < self._most
            for name, text in texts.items()
            if self._tokenizers[encoder].encode(self._card.clean_prompt(text)).overflowing
        )
