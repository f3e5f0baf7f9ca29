"""bench/gpu.py at its tiny scale on the CPU: the very code that a GPU runs, what it compares, and when it objects."""

import argparse
import json
from dataclasses import replace
from importlib.metadata import packages_distributions, version

import pytest
import torch
from packaging.utils import canonicalize_name
from test_architecture import REPO, imports_of, modules_of, tree_of

from bench import gpu, gpu_ranks, gpu_wheels
from bench.gpu_models import REAL, TINY, build, cast, twin, unfilled
from bench.gpu_ranks import Row, judge
from runtime.errors import InvalidInput
from workers.models.loading import slots

CPU = torch.device("cpu")
H200_FLOPS = 790e12
ARGS = argparse.Namespace(scale="tiny", only=[*TINY], rounds=1, steps=2, decodes=1, compiler="eager")


@pytest.fixture(scope="module")
def figures():
    *_, whole = gpu.measure(ARGS, CPU)
    return whole


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TINY)
def test_everybody_does_the_same_work(figures, name):
    """From the same noise to the same latents; a contender that skips something ends elsewhere."""
    found = figures["models"][name]["contenders"]
    joint = {"framemesh, a forward per branch"} if name != "flux" else set()
    assert set(found) == {"framemesh", gpu.EAGER, "diffusers compiled"} | joint
    for contender, row in found.items():
        assert row["difference_to_eager"] <= 1e-5, contender
        assert row["seconds_per_step"]["n"] == ARGS.rounds * ARGS.steps
        assert row["peak_bytes"] > 0
    assert found[gpu.EAGER]["against_eager"]["max"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_shares_are_of_the_measured_ceiling(figures):
    ceiling = figures["ceiling_flops"]["median"]
    for name, found in figures["models"].items():
        ours = found["contenders"]["framemesh"]
        flops = TINY[name].card.step_flops(TINY[name].params(1))
        assert ours["share_of_ceiling"]["max"] == pytest.approx(flops / ours["seconds_per_step"]["min"] / ceiling)
        assert found["predicted_seconds_per_step"] == pytest.approx(flops / ceiling / gpu.PREDICTED_SHARE)
        decode = found["decode"]
        assert 0 < decode["first_chunk_seconds"]["median"] <= decode["whole_seconds"]["median"]


@pytest.mark.parametrize("name", REAL)
def test_the_predictions_are_the_cards(name):
    """Every number of the docstring's table, and the sizes that the models are published with."""
    recipe = REAL[name]
    params = recipe.params(50)
    flops = recipe.card.step_flops(params)
    row = next(line for line in gpu.__doc__.splitlines() if line.strip().startswith(TITLES[name]))
    assert f"{recipe.card.tokens(params):,} tokens" in row
    assert f"{flops:.2e} FLOPs" in row
    assert f"{flops / H200_FLOPS / gpu.PREDICTED_SHARE:.3g} s per step" in row


TITLES = {"wan": "Wan2.1-T2V-1.3B", "flux": "FLUX.1-dev", "qwen_image": "Qwen-Image"}
BILLIONS = {"wan": 1.42, "flux": 11.90, "qwen_image": 20.43}


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_their_published_size(name):
    count = sum(slot.parameter.numel() for slot in slots(unfilled(REAL[name], torch.bfloat16)))
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_a_twin_shares_the_memory_and_a_cast_does_not():
    model = build(TINY["wan"], CPU, torch.float32)
    mine, stock = dict(model.family.denoiser.named_parameters()), twin(model)
    assert all(p.data_ptr() == mine[name].data_ptr() for name, p in stock.named_parameters())
    half = cast(model, torch.bfloat16)
    assert half.family.dtype == torch.bfloat16
    kept = {name for name, p in half.family.denoiser.named_parameters() if p.dtype == torch.float32}
    assert kept
    assert all("norm" in name or "time" in name or "scale_shift" in name for name in kept)


def test_without_a_gpu_it_says_what_would_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="--device cpu --scale tiny") as refusal:
        gpu.pick("cuda")
    assert refusal.value.field == "device"


def test_the_cpu_leaves_no_result(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "save", None)
    gpu.publish("", {"cpu": "a"}, {"figure": 1}, CPU)
    assert json.loads(capsys.readouterr().out)["figure"] == 1


# ---- two ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_do_what_one_does():
    """Every kernel case, every layout, every family and its decode; on a GPU the same rows come from CUDA kernels."""
    found = gpu_ranks.check("cpu")
    assert found["out_of_bounds"] == []
    words = {word for case in found["rows"] for word in case.split()}
    assert {"kernel", "attention", "decode", *TINY, "masked", "biased", "blind", "bfloat16", "float32"} <= words
    assert found["comparisons"] == len(found["rows"]) > 150


def test_what_is_out_of_bounds_is_named():
    rows = [Row("good", 1e-5, 1e-4), Row("bad", 2e-4, 1e-4), Row("no number", float("nan"), 1e-4)]
    assert [row.case for row in judge(rows)] == ["bad", "no number"]


def test_a_rank_that_fails_fails_the_check(monkeypatch):
    monkeypatch.setattr(gpu_ranks, "RANKS", 1)
    with pytest.raises(RuntimeError, match="rank 0 ended with"):
        gpu_ranks.check("no device")


@pytest.mark.parametrize("fault", ["output", "log-sum-exp"])
def test_a_wrong_kernel_is_out_of_bounds(monkeypatch, fault):
    kernel = gpu_ranks.KERNELS["torch_sdpa"]

    def wrong(q, k, v, bias):
        out, lse = kernel.attend_lse(q, k, v, bias)
        return (out * 1.02, lse) if fault == "output" else (out, lse + 0.2)

    monkeypatch.setitem(gpu_ranks.KERNELS, "torch_sdpa", replace(kernel, attend_lse=wrong))
    named = {row.case.split(": ")[1] for row in judge([*gpu_ranks.kernel_rows(CPU)])}
    assert named == {fault}


# ---- wheels ------------------------------------------------------------------------------------------------------


def test_the_wheels_are_all_that_is_imported():
    """A module that begins to import another package fails here, and not on a machine where nothing can be fetched."""
    # The demo is trained where it is at home.
    files = [file for file in modules_of("runtime", "workers") if file.parent.name != "demo"]
    files += [*(REPO / "bench").glob("gpu*.py"), REPO / "bench" / "report.py"]
    files += [REPO / "tests" / name for name in ("test_gpu.py", "single_rank.py", "conftest.py")]
    owners = packages_distributions()
    packages = {name.split(".")[0] for file in files for name in imports_of(tree_of(file))}
    needed = {canonicalize_name(owners[package][0]) for package in packages if package in owners}
    wheels = gpu_wheels.closure(gpu_wheels.ROOTS)
    assert {"diffusers", "pyzmq", "pytest"} <= needed
    assert needed - wheels.keys() - gpu_wheels.LEFT_OUT - LATER == set()
    assert wheels["diffusers"] == version("diffusers")
    assert not wheels.keys() & gpu_wheels.LEFT_OUT


LATER = {"yunchang", "framemesh"}
"""An extra that is imported when it is asked for, and ourselves."""
