"""The oracle: latents and frames on 1, 2, 4 and 8 ranks against diffusers' own pipeline, same seed, fp32."""

import functools
import itertools

import numpy as np
import pytest
import torch
from mutations import FAULTS
from parity import (
    AIM,
    BOUND,
    FAULT,
    HALF_BOUND,
    MESHES,
    MODES,
    Cell,
    Matrix,
    Mesh,
    cells,
    distance,
    generate,
    halves,
    shades,
)
from parity_families import FAMILIES
from tiny_wan import DEMO, load_pipeline, reference

from runtime.layout import Layout

SIZES = sorted({mesh.num_ranks for mesh in MESHES})

DEMO_CASES = {
    f"seed{seed}-{height}x{width}x{frames}": {
        "prompt": "a red circle moving right",
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


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def outcomes(matrix):
    """Rank count -> outcomes of the covering part, of fp32 and of bf16; every group of ranks starts once."""
    return functools.cache(lambda num_ranks: matrix.run(cells(full=False), halves(full=False), num_ranks))


@pytest.mark.parametrize("num_ranks", SIZES)
def test_every_cell_equals_diffusers(outcomes, num_ranks):
    for outcome in outcomes(num_ranks)[0]:
        assert outcome.ranks_equal, f"ranks differ in {outcome.cell}"
        assert outcome.difference <= BOUND, f"{outcome.cell}: latents differ by {outcome.difference:.1e}"
        assert (outcome.shades or 0) <= 1, f"{outcome.cell}: frames differ by {outcome.shades}/255"


@pytest.mark.parametrize("num_ranks", SIZES)
def test_every_cell_notices_its_fault(outcomes, num_ranks):
    for outcome in outcomes(num_ranks)[0]:
        shown = outcome.fault_difference
        assert shown > FAULT, f"{outcome.cell}: the fault {outcome.fault} changed the latents by only {shown:.1e}"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bf16_loses_no_more_than_in_diffusers(outcomes, num_ranks):
    assert outcomes(num_ranks)[1]
    for outcome in outcomes(num_ranks)[1]:
        assert outcome.ratio <= HALF_BOUND, f"{outcome.row}: {outcome.ratio:.2f} times the error of diffusers"
        assert outcome.noticed, f"{outcome.row}: with the fault {outcome.fault} only {outcome.fault_ratio:.2f} times"


def test_most_cells_reach_the_aim(outcomes):
    everything = [outcome.difference for num_ranks in SIZES for outcome in outcomes(num_ranks)[0]]
    assert np.median(everything) <= AIM


def test_the_covering_part_covers():
    some, every = cells(full=False), cells()
    for part in ("family", "mesh", "heads", "shape", "mode", "fault"):
        assert {getattr(c, part) for c in some} == {getattr(c, part) for c in every}, part
    assert {c.fault for c in every} == set(FAULTS)
    assert {c.mesh for c in every if c.shape == "odd" and c.heads == 3} == set(MESHES)
    assert len({c.name for c in every}) == len(every)


@pytest.mark.parametrize(
    ("num_ranks", "families", "inside"), [(2, list(FAMILIES), [(1, 1)]), (4, ["wan"], [(1, 2), (2, 1)])]
)
def test_cfg_parallel_is_sequential_guidance_to_the_bit(matrix, tmp_path, num_ranks, families, inside):
    """The same SP layout inside, one branch after another; alone and batched."""
    models, runs, pairs = {}, [], []
    for family, sp, mode in itertools.product(families, inside, MODES):
        cell = Cell(family, 4, Mesh(Layout(2, *sp)), "odd", mode, "none")
        models[cell.folder] = {"folder": str(matrix.folder_of(cell))}
        run = {"model": cell.folder, "requests": cell.requests, "mutation": "none"}
        runs.append(run | {"name": f"parallel/{cell.name}", "layout": [2, *sp]})
        runs.append(run | {"name": f"sequential/{cell.name}", "layout": [1, *sp], "joint": False})
        pairs += [(f"parallel/{cell.name}/{i}", f"sequential/{cell.name}/{i}") for i in range(len(cell.requests))]
    for tensors in generate(tmp_path, num_ranks, models, runs):
        for parallel, sequential in pairs:
            assert torch.equal(tensors[f"{parallel}/latents"], tensors[f"{sequential}/latents"]), parallel


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_demo_model_equals_diffusers(tmp_path, num_ranks):
    pipeline = load_pipeline(DEMO)
    run = {"model": "demo", "layout": [1, 1, num_ranks], "mutation": "none"}
    runs = [run | {"name": name, "requests": [case]} for name, case in DEMO_CASES.items()]
    ranks = generate(tmp_path, num_ranks, {"demo": {"folder": str(DEMO)}}, runs)
    for name, case in DEMO_CASES.items():
        latents = reference(pipeline, case)
        frames = np.stack([np.asarray(picture) for picture in reference(pipeline, case, "pil")[0]])
        for tensors in ranks:
            assert torch.equal(tensors[f"{name}/0/latents"], ranks[0][f"{name}/0/latents"]), f"ranks differ in {name}"
            assert distance(tensors[f"{name}/0/latents"], latents) <= BOUND, name
            assert shades(tensors[f"{name}/0/frames"], frames) <= 1, name
