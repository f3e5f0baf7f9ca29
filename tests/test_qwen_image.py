"""Qwen-Image against diffusers.QwenImagePipeline: same seed, fp32, alone and in company of other lengths of text."""

import inspect
import json

import msgspec
import pytest
from still_parity import check_equal, check_noticed, oracle_of, run_plan
from tiny_qwen_image import build_tiny_qwen_image, load_pipeline, reference

from gateway.tokenize import PromptTokenizer
from runtime.errors import InvalidInput
from runtime.layout import Layout
from runtime.models.card import card_for, read_configs
from runtime.models.qwen_image import MAX_TEXT_TOKENS, TEMPLATE, TEMPLATE_TOKENS
from runtime.protocol import ModelInfo, TokenizerExport
from runtime.sampling import SamplingParams

LONG = "a red circle moving right, a star over the sea; " * 12


def case(prompt, seed, height, width, steps=8, **more):
    return {"prompt": prompt, "seed": seed, "height": height, "width": width, "num_inference_steps": steps, **more}


PLAN = {
    "cases": {
        "square": case("a red circle", 0, 64, 64, negative_prompt=" "),
        "odd": case("a star over the sea", 1, 48, 80, negative_prompt="a square", true_cfg_scale=3.0),
        "long": case(LONG, 2, 48, 80, steps=6, negative_prompt="", true_cfg_scale=5.0),
        "third": case("star", 3, 48, 80, steps=5, negative_prompt=LONG),
        "unguided": case("a red circle", 4, 80, 48),
        "unguided-long": case(LONG, 5, 80, 48, steps=6),
        "unguided-short": case("a", 6, 80, 48, steps=5),
        "cut": case("red star " * 400, 7, 32, 48),
    },
    "batches": [["odd", "long", "third"], ["unguided", "unguided-long", "unguided-short"]],
}
"""48x80 has 15 tokens of the picture: they do not divide by 2; "cut" has more than 512 tokens of text."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return build_tiny_qwen_image(tmp_path_factory.mktemp("tiny") / "qwen-image")


@pytest.fixture(scope="session")
def oracle(tiny):
    return oracle_of(load_pipeline(tiny), reference, PLAN)


def test_it_equals_diffusers(tmp_path, tiny, oracle):
    check_equal(run_plan(tmp_path, tiny, PLAN), PLAN, oracle)


@pytest.mark.parametrize(
    ("mutation", "noticed_in"),
    [
        ("attended_padding", "batch/unguided-short"),
        ("plain_guidance", "alone/square"),
        ("kept_template", "alone/unguided"),
        ("shared_timestep", "batch/third"),
    ],
)
def test_a_mutation_is_noticed(tmp_path, tiny, oracle, mutation, noticed_in):
    check_noticed(tmp_path, tiny, PLAN, noticed_in, oracle, mutation)


# ---- the card ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(tiny):
    """The tiny model without its own defaults: Qwen-Image's."""
    return card_for({name: config for name, config in read_configs(tiny).items() if name != "framemesh"})


def ask(**changes):
    return SamplingParams(**{"prompt": "a cat", "seed": 1, **changes})


def test_defaults_and_the_template_are_the_pipelines_own(card, tiny):
    from diffusers import QwenImagePipeline

    pipeline = load_pipeline(tiny)
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == TEMPLATE_TOKENS
    assert len(pipeline.tokenizer(TEMPLATE.partition("{}")[0]).input_ids) == TEMPLATE_TOKENS
    signature = inspect.signature(QwenImagePipeline.__call__).parameters
    assert signature["max_sequence_length"].default == MAX_TEXT_TOKENS
    resolved = card.check(ask(negative_prompt=" "))
    assert resolved.num_inference_steps == signature["num_inference_steps"].default
    assert resolved.true_cfg_scale == signature["true_cfg_scale"].default
    assert (resolved.height, resolved.width) == (pipeline.default_sample_size * pipeline.vae_scale_factor,) * 2


def test_guidance_needs_a_negative_prompt_as_in_the_pipeline(card):
    assert card.branches(card.check(ask()), 0) == ("cond",)
    assert card.branches(card.check(ask(negative_prompt="")), 0) == ("cond", "uncond")
    assert card.branches(card.check(ask(negative_prompt="", true_cfg_scale=1.0)), 0) == ("cond",)
    with pytest.raises(InvalidInput, match="needs a negative_prompt"):
        card.check(ask(true_cfg_scale=4.0))
    with pytest.raises(InvalidInput, match="true_cfg_scale"):
        card.check(ask(guidance_scale=4.0))


def test_a_resolved_request_can_be_checked_again(card):
    for wish in (ask(), ask(negative_prompt=""), ask(negative_prompt="b", true_cfg_scale=2.0)):
        resolved = card.check(wish)
        again = SamplingParams(**{name: getattr(resolved, name) for name in resolved.__struct_fields__})
        assert card.check(again) == resolved


@pytest.mark.parametrize("key", ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_other_kinds_of_qwen_image_are_refused(tiny, key):
    configs = read_configs(tiny)
    with pytest.raises(InvalidInput, match=key):
        card_for(configs | {"transformer": configs["transformer"] | {key: True}})


def test_a_gateway_gives_the_ids_that_the_pipeline_embeds(card, tiny):
    from transformers import AutoTokenizer

    exported = (tiny / "tokenizer" / "tokenizer.json").read_text()
    limit = TEMPLATE_TOKENS + MAX_TEXT_TOKENS
    export = TokenizerExport("text_encoder", exported, limit)
    model = ModelInfo("tiny", str(tiny), read_configs(tiny), (export,), "fp32", "fp32", "cpu", Layout(1, 1, 1))
    tokenizer, oracle = PromptTokenizer(model, card), AutoTokenizer.from_pretrained(tiny / "tokenizer")
    for prompt in ("a red circle", "{} <|im_end|> 中文", LONG):
        ids = tokenizer.tokenize(card.check(ask(prompt=prompt)))["text_encoder"]["prompt"]
        assert list(ids) == oracle(TEMPLATE.format(prompt)).input_ids
    with pytest.raises(InvalidInput, match=f"takes {limit}"):
        tokenizer.tokenize(card.check(ask(prompt=LONG * 9)))


def test_a_tokenizer_without_a_limit_can_travel(tiny):
    written = json.loads((tiny / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
    configs = read_configs(tiny)
    assert written > 2**64 > configs["tokenizer"]["model_max_length"] > 10**18
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(configs)) == configs


def test_a_mesh_of_two_ranks_makes_the_same_picture(tiny, oracle):
    from framemesh import Generator

    with Generator.from_pretrained(str(tiny), num_gpus=2) as generator:
        for name in ("odd", "unguided"):
            result = generator.generate(SamplingParams(**PLAN["cases"][name]))
            shades = result.frames[0].astype(int) - oracle[name][1].astype(int)
            assert abs(shades).max() <= 1, name
