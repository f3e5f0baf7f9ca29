"""Qwen-Image against diffusers.QwenImagePipeline: same seed, fp32, alone and in company of other lengths of text."""

import pytest
from still_parity import check_equal, check_noticed, oracle_of, run_plan
from tiny_qwen_image import build_tiny_qwen_image, load_pipeline, reference

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
