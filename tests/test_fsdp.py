"""Sharded weights: the same bytes out, 1/N of the bytes held, and never more than a share and a few blocks."""

import json

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from structlog.testing import capture_logs
from tiny_wan import build_tiny_wan, randomise
from torch import nn

from workers.parallel.fsdp import shard_mesh, warn_of_kept

MIB = 1 << 20
BLOCKS = 8
SLACK = 12 * MIB
"""Of the process: threads, code and buffers that come to life with the first collective and the first forward."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """A denoiser of 217 MiB."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("heavy")
    denoiser = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=4608,
        num_layers=BLOCKS,
    )
    randomise(denoiser, 0)
    denoiser.save_pretrained(folder / "transformer")
    return folder


def run(tmp_path, num_ranks, case, folder, mutation="none"):
    run_ranks(num_ranks, "ranks_fsdp.py", case, str(folder), str(tmp_path), mutation)
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def largest_difference(tmp_path, num_ranks):
    """Over all ranks and tensors, sharded against whole."""
    most = 0.0
    for rank in range(num_ranks):
        tensors = load_file(tmp_path / f"rank{rank}.safetensors")
        for name, tensor in tensors.items():
            if "/sharded/" in name:
                whole = tensors[name.replace("/sharded/", "/whole/")]
                most = max(most, (tensor.float() - whole.float()).abs().max().item())
    return most


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_is_bitwise_whole_and_a_share_is_held(tmp_path, tiny, num_ranks):
    reports = run(tmp_path, num_ranks, "parity", tiny)
    assert largest_difference(tmp_path, num_ranks) == 0.0
    for report in reports:
        for precision in ("fp32", "bf16"):
            whole, sharded = report[f"{precision}/whole"], report[f"{precision}/sharded"]
            for name in ("denoiser", "text_encoder"):
                assert sharded[name]["dtypes"] == whole[name]["dtypes"], "not loaded as from_pretrained does"
                assert sharded[name]["whole"] == whole[name]["loaded"]
                # In bf16 what diffusers keeps in fp32 stays whole.
                spared = {"fp32": 0.01, "bf16": 0.1}[precision]
                most = (1 / num_ranks + spared) * whole[name]["loaded"]
                assert sharded[name]["loaded"] <= most
                assert sharded[name]["after"] <= most, f"{name} stayed gathered after its forwards"


def test_a_wrong_slice_is_caught(tmp_path, tiny):
    run(tmp_path, 2, "parity", tiny, "slices")
    assert largest_difference(tmp_path, 2) > 1e-2


@pytest.fixture(scope="module", params=[2, 4])
def heavy_reports(request, heavy, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # glibc keeps freed blocks of this size for itself; so what is freed goes back at once and can be seen.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        return run(tmp_path_factory.mktemp("memory"), request.param, "memory", heavy)


def test_no_rank_ever_holds_more_than_its_share_and_a_few_blocks(heavy_reports):
    for report in heavy_reports:
        share = report["whole"] / len(heavy_reports)
        assert report["whole"] > 200 * MIB
        assert report["read"] <= 1.02 * share, "read more than its slices"
        assert report["load_peak"] <= share + SLACK
        assert report["resident"] <= 1.02 * share
        # The block that computes, the next one, and the buffer that it comes in.
        assert report["run_peak"] <= 3 * report["block"] + SLACK


def test_the_next_block_is_gathered_before_this_one_computed(heavy_reports):
    for report in heavy_reports:
        order = [tuple(event) for event in report["order"]]
        assert len(order) == 3 * 2 * BLOCKS
        for number in range(BLOCKS - 1):
            assert order.index(("gather", number + 1)) < order.index(("computed", number))


@pytest.mark.parametrize(("name", "warned"), [("wo", True), ("norm", False)])
def test_much_that_every_rank_has_to_keep_is_said(name, warned):
    layers = nn.ModuleDict({"wi": nn.Linear(64, 128), "wo": nn.Linear(128, 64), "norm": nn.LayerNorm(64)}).half()
    layers[name].float()
    with capture_logs() as logs:
        warn_of_kept(layers, set(layers[name].parameters()))
    assert bool(logs) is warned


def test_one_rank_has_nobody_to_share_with():
    assert shard_mesh(1, torch.device("cpu")) is None


@pytest.mark.slow
def test_a_mesh_with_everything_spread_makes_the_same_video(mesh):
    """Weights sharded, encoder layers shared, decodes in strips: through every process, from prompt to frames."""
    from framemesh import Generator

    asked = {"seed": 3, "num_inference_steps": 4}
    spread = {"use_fsdp_inference": True, "tp_size": 2, "vae_sp": True}
    with Generator.from_pretrained("demo", num_gpus=2, device="cpu", **spread) as generator:
        # The second one after the first: nothing stays gathered or half decoded.
        made = [generator.generate(prompt, **asked).frames.astype(int) for prompt in ("a red circle", "a blue square")]
    for frames, prompt in zip(made, ("a red circle", "a blue square"), strict=True):
        expected = mesh.generate(prompt, **asked).frames.astype(int)
        assert abs(frames - expected).max() <= 1
        assert (frames != expected).mean() < 1e-3
