"""FLUX.1 against diffusers.FluxPipeline: same seed, fp32, alone and in company, dev-like and schnell-like."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import torch
from still_parity import check_equal, check_noticed, oracle_of, run_plan
from tiny_flux import build_tiny_flux, load_pipeline, reference

from gateway.schema import ImageCreate, VideoCreate
from gateway.tokenize import PromptTokenizer
from runtime.config import VaeConfig
from runtime.errors import InvalidInput
from runtime.layout import Layout
from runtime.models.card import card_for, read_configs
from runtime.models.flux import TEXT_TOKENS
from runtime.protocol import ModelInfo, TokenizerExport
from runtime.sampling import SamplingParams
from workers.models.flux import tile
from workers.models.still import to_pixels, unpack

LONG = "a red circle moving right, a star over the sea; " * 12
"""More than CLIP's 77 tokens: it reads the beginning, T5 all of it."""


def case(prompt, seed, height, width, steps=8, **more):
    return {
        "prompt": prompt,
        "seed": seed,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        **more,
    }


DEV = {
    "cases": {
        "square": case("a red circle", 0, 64, 64),
        "odd": case("a star over the sea", 1, 48, 80, guidance_scale=1.5),
        "long": case(LONG, 2, 48, 80, steps=6, guidance_scale=7.0),
        "third": case("a big blue square, very bright!", 3, 48, 80, steps=5),
        "turned": case("a red circle", 4, 80, 48),
        "true": case("a star", 5, 32, 48, negative_prompt="a square", true_cfg_scale=3.0),
        "true-empty": case("a red star", 6, 32, 48, steps=6, negative_prompt="", true_cfg_scale=2.0),
    },
    "batches": [["odd", "long", "third"], ["true", "true-empty"]],
}
"""48x80 has 15 tokens of the picture: they do not divide by 2; 80x48 has as many and other positions."""

SCHNELL = {
    "cases": {
        name: case(prompt, seed, 48, 64, steps=4, guidance_scale=0.0)
        for name, prompt, seed in (("one", "a red circle", 7), ("two", LONG, 8))
    },
    "batches": [["one", "two"]],
}


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny") / "flux-dev")


@pytest.fixture(scope="session")
def schnell(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny") / "flux-schnell", distilled_guidance=False)


@pytest.fixture(scope="session")
def dev_oracle(dev):
    return oracle_of(load_pipeline(dev), reference, DEV)


def test_dev_equals_diffusers(tmp_path, dev, dev_oracle):
    check_equal(run_plan(tmp_path, dev, DEV), DEV, dev_oracle)


def test_schnell_equals_diffusers(tmp_path, schnell):
    check_equal(run_plan(tmp_path, schnell, SCHNELL), SCHNELL, oracle_of(load_pipeline(schnell), reference, SCHNELL))


@pytest.mark.parametrize(
    ("mutation", "noticed_in"),
    [
        ("transposed_positions", "alone/odd"),
        ("shared_shift", "alone/square"),
        ("exchanged_guidance", "batch/odd"),
        ("exchanged_pooled", "batch/long"),
        ("shared_timestep", "batch/third"),
    ],
)
def test_a_mutation_is_noticed(tmp_path, dev, dev_oracle, mutation, noticed_in):
    check_noticed(tmp_path, dev, DEV, noticed_in, dev_oracle, mutation)


# ---- the card ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_card():
    """FLUX.1-dev by its configs' numbers."""
    transformer = {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 19,
        "num_single_layers": 38,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "guidance_embeds": True,
    }
    index = {"_class_name": "FluxPipeline"}
    return card_for({"model_index": index, "transformer": transformer, "vae": {"block_out_channels": [1, 2, 4, 4]}})


@pytest.fixture(scope="module")
def schnell_card(schnell):
    return card_for(read_configs(schnell))


def ask(**changes):
    return SamplingParams(**{"prompt": "a cat", "seed": 1, **changes})


def test_defaults_are_the_pipelines_own(real_card):
    from diffusers import FluxPipeline

    resolved = real_card.check(ask())
    signature = inspect.signature(FluxPipeline.__call__)
    for name in ("num_inference_steps", "guidance_scale", "true_cfg_scale"):
        assert getattr(resolved, name) == signature.parameters[name].default, name
    assert (resolved.height, resolved.width, resolved.num_frames) == (1024, 1024, 1)
    assert signature.parameters["max_sequence_length"].default == TEXT_TOKENS
    assert real_card.tokens(resolved) == 4096 + 512
    assert real_card.latent_shape(resolved) == (1, 4096, 64)


def test_a_resolved_request_can_be_checked_again(real_card, schnell_card):
    """The SDK resolves before it submits, and so does the mesh."""
    for card in (real_card, schnell_card):
        for wish in (ask(), ask(negative_prompt="b", true_cfg_scale=2.0)):
            resolved = card.check(wish)
            again = SamplingParams(**{name: getattr(resolved, name) for name in resolved.__struct_fields__})
            assert card.check(again) == resolved


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"prompt": " "}, "prompt", "empty"),
        ({"num_frames": 5}, "num_frames", "single pictures"),
        ({"fps": 8}, "fps", "single pictures"),
        ({"height": 1000}, "height", "992 and 1008"),
        ({"width": 8}, "width", "8 is too small; take at least 16"),
        ({"width": 9008}, "width", "at most 8192"),
        ({"seed": -1}, "seed", "0 to 2^63"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 1000"),
        ({"guidance_scale": -1.0}, "guidance_scale", "0 to 100"),
        ({"true_cfg_scale": 101.0, "negative_prompt": "b"}, "true_cfg_scale", "0 to 100"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale", "negative_prompt"),
        ({"negative_prompt": "blurry"}, "negative_prompt", "true_cfg_scale"),
    ],
)
def test_what_cannot_be_made_or_would_do_nothing_is_refused(real_card, changes, field, words):
    with pytest.raises(InvalidInput, match=re.escape(words)) as refusal:
        real_card.check(ask(**changes))
    assert refusal.value.field == field


def test_a_model_without_a_guidance_input_takes_none(schnell_card):
    with pytest.raises(InvalidInput, match="takes no guidance"):
        schnell_card.check(ask(guidance_scale=3.5))
    assert {schnell_card.check(ask(guidance_scale=scale)).guidance_scale for scale in (None, 0.0, 1.0)} == {1.0}


def test_what_may_share_a_forward(real_card):
    def key(**changes):
        return real_card.batch_key(real_card.check(ask(**changes)), 0)

    assert key(guidance_scale=2.0, seed=5, num_inference_steps=4) == key()
    assert key(height=512, width=1024) != key(height=1024, width=512)
    assert key(negative_prompt="", true_cfg_scale=2.0) != key()


def test_flops_are_those_of_the_modules(dev):
    """Against PyTorch's own count of one forward; the card leaves out embedders and modulation."""
    from diffusers import FluxTransformer2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    card = card_for(read_configs(dev))
    config = FluxTransformer2DModel.load_config(dev / "transformer")
    denoiser = FluxTransformer2DModel.from_config(config | {"num_attention_heads": 16, "joint_attention_dim": 8})
    card = dataclasses.replace(card, heads=16)
    rows, columns = card.grid(card.check(ask(height=256, width=256)))
    # The counter does not see into the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        denoiser(
            hidden_states=torch.zeros(1, rows * columns, 16),
            encoder_hidden_states=torch.zeros(1, TEXT_TOKENS, 8),
            pooled_projections=torch.zeros(1, 32),
            timestep=torch.zeros(1),
            guidance=torch.zeros(1),
            img_ids=torch.zeros(rows * columns, 3),
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
        )
    counted = counter.get_total_flops()
    assert card.step_flops(card.check(ask(height=256, width=256))) == pytest.approx(counted, rel=0.03)


def test_videos_are_asked_for_elsewhere(real_card):
    assert ImageCreate(prompt="a cat", size="512x768").to_params(real_card) == SamplingParams(
        prompt="a cat", width=512, height=768, num_frames=1
    )
    with pytest.raises(InvalidInput, match="/v1/images/generations"):
        VideoCreate(prompt="a cat").to_params(real_card)


def test_a_model_that_takes_pictures_is_refused(dev):
    configs = read_configs(dev)
    fill = configs | {"transformer": configs["transformer"] | {"in_channels": 384, "out_channels": 64}}
    with pytest.raises(InvalidInput, match="takes a picture as input"):
        card_for(fill)


def test_tiles_are_the_vaes_own(dev, dev_oracle):
    """64 pixels in tiles of 32, as the pipeline decodes them when it is told to tile."""
    pipeline = load_pipeline(dev)
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 32, 4
    pipeline.vae.enable_tiling()
    tiled = np.asarray(reference(pipeline, DEV["cases"]["square"], "pil")[0])
    assert abs(tiled.astype(int) - dev_oracle["square"][1]).max() > 8
    vae = load_pipeline(dev).vae
    tile(vae, VaeConfig(tile_sample_min_height=32))
    latents = unpack(dev_oracle["square"][0], (4, 4)) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.inference_mode():
        pixels = to_pixels(vae.decode(latents, return_dict=False)[0])
    assert np.abs(pixels[0].numpy().astype(int) - tiled).max() <= 1
    with pytest.raises(InvalidInput, match="square"):
        tile(vae, VaeConfig(tile_sample_min_height=32, tile_sample_min_width=64))


# ---- two encoders, one prompt --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateways_tokenizer(dev):
    """What a gateway makes of the worker's exports."""
    card = card_for(read_configs(dev))
    exports = tuple(
        TokenizerExport(encoder, (dev / name / "tokenizer.json").read_text(), limit)
        for encoder, name, limit in (("text_encoder", "tokenizer", 77), ("text_encoder_2", "tokenizer_2", 512))
    )
    model = ModelInfo("tiny", str(dev), read_configs(dev), exports, "fp32", "fp32", "cpu", Layout(1, 1, 1))
    return card, PromptTokenizer(model, card)


@pytest.mark.parametrize("prompt", ["a red circle", LONG, "A STAR,  over\nthe sea &amp; more", "quux 中文 🎬"])
def test_each_encoder_is_cut_as_the_pipeline_cuts_it(gateways_tokenizer, dev, prompt):
    from transformers import AutoTokenizer

    card, tokenizer = gateways_tokenizer
    params = card.check(ask(prompt=prompt))
    ids = tokenizer.tokenize(params)
    for encoder, name, limit in (("text_encoder", "tokenizer", 77), ("text_encoder_2", "tokenizer_2", 512)):
        oracle = AutoTokenizer.from_pretrained(dev / name)
        assert list(ids[encoder]["prompt"]) == oracle(prompt, truncation=True, max_length=limit).input_ids
    cut = ("prompt: text_encoder reads only its first 77 tokens",) if prompt == LONG else ()
    assert tokenizer.warnings(params) == cut


def test_a_prompt_too_long_for_the_longest_encoder_is_refused(gateways_tokenizer):
    card, tokenizer = gateways_tokenizer
    with pytest.raises(InvalidInput, match="the text encoder takes 512"):
        tokenizer.tokenize(card.check(ask(prompt=LONG * 4)))


# ---- through the whole mesh ----------------------------------------------------------------------------------------


def test_the_generator_makes_the_same_picture(dev, dev_oracle):
    from framemesh import Generator, SamplingParams

    with Generator.from_pretrained(str(dev), num_gpus=1) as generator:
        for name in ("odd", "true"):
            result = generator.generate(SamplingParams(**DEV["cases"][name]))
            shades = result.frames[0].astype(int) - dev_oracle[name][1].astype(int)
            assert abs(shades).max() <= 1, name


def test_run_writes_a_png_that_says_how_it_was_made(dev, dev_oracle, tmp_path, capsys):
    from PIL import Image

    from launch.cli import main

    words = {name.replace("_", "-"): str(value) for name, value in DEV["cases"]["square"].items()}
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    assert main(["run", "--model-path", str(dev), "--output-path", str(tmp_path), "--port", "0", *flags]) == 0
    (path,) = tmp_path.glob("*.png")
    assert f"picture        {path}" in capsys.readouterr().out
    with Image.open(path) as picture:
        shades = np.asarray(picture).astype(int) - dev_oracle["square"][1].astype(int)
        assert json.loads(picture.text["framemesh"])["guidance_scale"] == 4.0
    assert abs(shades).max() <= 1
