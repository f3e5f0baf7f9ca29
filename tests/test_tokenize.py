"""The gateway's tokenizing against transformers' own, and what it costs to import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from fake_mesh import MODEL_FOLDER, demo_model
from tokenizers import Tokenizer

from gateway.tokenize import PromptTokenizer
from runtime.errors import InvalidInput
from runtime.models.card import card_for
from runtime.sampling import SamplingParams

LIMIT = 512


@pytest.fixture(scope="module")
def card():
    return card_for(demo_model().configs)


@pytest.fixture(scope="module")
def tokenizer(card):
    return PromptTokenizer(demo_model(), card)


@pytest.fixture(scope="module")
def oracle():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer")


def ask(card, prompt, negative_prompt=""):
    return card.check(SamplingParams(prompt=prompt, negative_prompt=negative_prompt, seed=1))


@pytest.mark.parametrize(
    "text",
    [
        "a red circle moving right",
        "A LARGE Blue Square, moving up; then   down.",
        "a&amp;b &lt;tag&gt;",
        "schön 中文 🎬 e\u0301",
        "</s> <pad> <unk> [MASK]",
        "x",
        "&nbsp;",
        "red " * 300,
    ],
)
def test_ids_are_those_of_transformers(tokenizer, oracle, card, text):
    ids = tokenizer.tokenize(ask(card, text, negative_prompt=text.upper()))
    assert set(ids) == {"text_encoder"}
    assert set(ids["text_encoder"]) == {"prompt", "negative_prompt"}
    assert list(ids["text_encoder"]["prompt"]) == oracle(card.clean_prompt(text)).input_ids
    assert list(ids["text_encoder"]["negative_prompt"]) == oracle(card.clean_prompt(text.upper())).input_ids


def test_the_empty_negative_prompt_is_not_padded(tokenizer, oracle, card):
    ids = tokenizer.tokenize(ask(card, "a cat"))["text_encoder"]["negative_prompt"]
    assert list(ids) == oracle("").input_ids == [oracle.eos_token_id]


# "red" is one token, and </s> ends the prompt.
LONGEST = " ".join(["red"] * (LIMIT - 1))


def test_the_longest_prompt_that_fits(tokenizer, card):
    ids = tokenizer.tokenize(ask(card, LONGEST))["text_encoder"]["prompt"]
    assert len(ids) == LIMIT


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_longer_one_is_refused_with_the_counts(tokenizer, card, field):
    texts = {"prompt": "red", "negative_prompt": "red"} | {field: LONGEST + " red red red"}
    words = re.escape(f"has {LIMIT + 3} tokens, the text encoder takes {LIMIT}; shorten it by 3")
    with pytest.raises(InvalidInput, match=words) as refusal:
        tokenizer.tokenize(ask(card, **texts))
    assert (refusal.value.field, refusal.value.code) == (field, "string_above_max_length")


def test_padding_and_truncation_of_the_export_do_not_reach_the_ids(tokenizer, card):
    model = demo_model()
    limited = Tokenizer.from_str(model.tokenizers[0].json)
    limited.enable_truncation(4)
    limited.enable_padding(length=600)
    export = msgspec.structs.replace(model.tokenizers[0], json=limited.to_str())
    params = ask(card, "a large red circle moving right and then left")
    other = PromptTokenizer(msgspec.structs.replace(model, tokenizers=(export,)), card)
    assert other.tokenize(params) == tokenizer.tokenize(params)


def test_importing_and_using_it_needs_neither_torch_nor_transformers():
    code = """
import sys
from fake_mesh import demo_model
from gateway.tokenize import PromptTokenizer
from runtime.models.card import card_for
from runtime.sampling import SamplingParams
card = card_for(demo_model().configs)
PromptTokenizer(demo_model(), card).tokenize(card.check(SamplingParams(prompt="a cat")))
print(*sorted({"torch", "transformers", "diffusers"} & set(sys.modules)))
"""
    here = Path(__file__).parent
    paths = f"{here.parent}:{here}"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr
