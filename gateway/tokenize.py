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
        self._tokenizers: dict[str, Tokenizer] = {}
        for export in model.tokenizers:
            tokenizer = Tokenizer.from_str(export.json)
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self._tokenizers[export.encoder] = tokenizer

    def tokenize(self, params: ResolvedParams) -> dict[str, dict[str, tuple[int, ...]]]:
        """Encoder -> "prompt" | "negative_prompt" -> ids.

        Raises:
            InvalidInput: a prompt does not even fit the encoder with the highest limit.
        """
        texts = {"prompt": params.prompt, "negative_prompt": params.negative_prompt}
        most = max(self._limits.values(), default=0)
        ids: dict[str, dict[str, tuple[int, ...]]] = {}
        for encoder, tokenizer in self._tokenizers.items():
            ids[encoder] = {}
            for name, text in texts.items():
                tokens = tuple(tokenizer.encode(self._card.clean_prompt(text)).ids)
                if len(tokens) > most:
                    raise InvalidInput(
                        name,
                        f"has {len(tokens)} tokens, the text encoder takes {most}; shorten it by {len(tokens) - most}",
                        code="string_above_max_length",
                    )
                ids[encoder][name] = tokens
        return ids
