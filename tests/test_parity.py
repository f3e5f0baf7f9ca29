"""The oracle: latents and frames on 1, 2 and 4 ranks against diffusers.WanPipeline, same seed, fp32."""

import json

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_wan import DEMO, build_tiny_wan, load_pipeline, reference

BOUND = 1e-4
PROMPT = "a red circle moving right"

DEMO_CASES = {
    f"seed{seed}-{height}x{width}x{frames}": {
        "prompt": PROMPT,
        "seed": seed,
        "height": height,
        "width": width,
        "num_frames": frames,
        "steps": 20,
        "guidance": 3.0,
    }
    for seed in (0, 1, 2)
    for height, width, frames in ((64, 64, 17), (48, 80, 9))
}
"""48x80x9 has 45 tokens: they do not divide by 2."""

TINY_CASES = {
    "even": {"prompt": PROMPT, "seed": 3, "height": 32, "width": 32, "num_frames": 9, "steps": 8, "guidance": 4.0},
    "odd": {"prompt": "a star", "seed": 4, "height": 48, "width": 48, "num_frames": 9, "steps": 8, "guidance": 4.0},
    "still": {"prompt": "a star", "seed": 5, "height": 16, "width": 48, "num_frames": 1, "steps": 8, "guidance": 4.0},
    "unguided": {"prompt": "a box", "seed": 6, "height": 32, "width": 32, "num_frames": 5, "steps": 8, "guidance": 1.0},
    "negative": {
        "prompt": "a box",
        "negative_prompt": "blurry &amp; dull",
        "seed": 7,
        "height": 32,
        "width": 64,
        "num_frames": 5,
        "steps": 8,
        "guidance": 4.0,
    },
}
"""Tokens: 12, 27, 3, 8, 16. Three tokens on four ranks leave one rank without any."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="session")
def oracle(tiny):
    """(model, case) -> (latents, frames uint8) by diffusers, each made once."""
    answers = {}
    for model, folder, cases in (("demo", DEMO, DEMO_CASES), ("tiny", tiny, TINY_CASES)):
        pipeline = load_pipeline(folder)
        for name, case in cases.items():
            latents = reference(pipeline, case)
            pictures = reference(pipeline, case, "pil")[0]
            answers[model, name] = latents, np.stack([np.asarray(picture) for picture in pictures])
    return answers


def generate(tmp_path, num_ranks, folder, cases, mutation="none"):
    """Every rank's tensors."""
    cases_file = tmp_path / "cases.json"
    cases_file.write_text(json.dumps(cases))
    run_ranks(num_ranks, "ranks_generate.py", str(folder), str(cases_file), str(tmp_path), mutation)
    return [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_demo_model_equals_diffusers(tmp_path, oracle, num_ranks):
    ranks = generate(tmp_path, num_ranks, DEMO, DEMO_CASES)
    check(ranks, "demo", DEMO_CASES, oracle)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tiny_model_equals_diffusers(tmp_path, oracle, tiny, num_ranks):
    ranks = generate(tmp_path, num_ranks, tiny, TINY_CASES)
    check(ranks, "tiny", TINY_CASES, oracle)


def check(ranks, model, cases, oracle):
    for name in cases:
        latents, frames = oracle[model, name]
        for tensors in ranks:
            assert torch.equal(tensors[f"{name}/latents"], ranks[0][f"{name}/latents"]), f"ranks differ in {name}"
            difference = (tensors[f"{name}/latents"] - latents).abs().max().item()
            assert difference <= BOUND, f"{name}: latents differ by {difference:.1e}"
            shade = np.abs(tensors[f"{name}/frames"].numpy().astype(int) - frames.astype(int)).max()
            assert shade <= 1, f"{name}: frames differ by {shade}/255"


@pytest.mark.parametrize("mutation", ["heads", "tokens"])
def test_a_wrong_exchange_is_caught(tmp_path, oracle, tiny, mutation):
    cases = {"even": TINY_CASES["even"]}
    broken = generate(tmp_path, 2, tiny, cases, mutation)[0]["even/latents"]
    difference = (broken - oracle["tiny", "even"][0]).abs().max().item()
    assert difference > 100 * BOUND, f"the mutation {mutation} changed the latents by only {difference:.1e}"
