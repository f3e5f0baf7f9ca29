"""FLUX.1 against diffusers.FluxPipeline: same seed, fp32, alone and in company, dev-like and schnell-like."""

import json

import numpy as np
import pytest
from still_parity import check_equal, check_noticed, oracle_of, run_plan
from tiny_flux import build_tiny_flux, load_pipeline, reference

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
