"""Runs the cases of an image model on one rank and holds them against the family's own pipeline."""

import json

import numpy as np
from ranks import run_ranks
from safetensors.torch import load_file

BOUND = 1e-4


def oracle_of(pipeline, reference, plan):
    """Case -> (latents, uint8 picture) by diffusers."""
    answers = {}
    for name, case in plan["cases"].items():
        picture = np.asarray(reference(pipeline, case, "pil")[0])
        answers[name] = reference(pipeline, case), picture
    return answers


def run_plan(tmp_path, folder, plan, mutation="none"):
    """Latents and frames of all that the plan names."""
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(json.dumps(plan))
    run_ranks(1, "ranks_stills.py", str(folder), str(plan_file), str(tmp_path), mutation)
    return load_file(tmp_path / "rank0.safetensors")


def ids_of(plan):
    """(request, case) of everything that a plan runs."""
    yield from ((f"alone/{name}", name) for name in plan.get("alone", plan["cases"]))
    yield from ((f"batch/{name}", name) for names in plan.get("batches", []) for name in names)


def difference(tensors, request_id, oracle, name):
    """Largest difference of the latents."""
    return (tensors[f"{request_id}/latents"] - oracle[name][0]).abs().max().item()


def check_equal(tensors, plan, oracle):
    for request_id, name in ids_of(plan):
        far = difference(tensors, request_id, oracle, name)
        assert far <= BOUND, f"{request_id}: latents differ by {far:.1e}"
        frames = tensors[f"{request_id}/frames"].numpy()
        assert frames.shape == (1, *oracle[name][1].shape)
        shade = np.abs(frames[0].astype(int) - oracle[name][1].astype(int)).max()
        assert shade <= 1, f"{request_id}: pixels differ by {shade}/255"


def only(plan, request_id):
    """As much of a plan as makes one request."""
    where, _, name = request_id.partition("/")
    batches = [names for names in plan["batches"] if name in names and where == "batch"]
    return plan | {"alone": [name] if where == "alone" else [], "batches": batches}


def check_noticed(tmp_path, folder, plan, request_id, oracle, mutation):
    """A mutation is far outside of the bound."""
    tensors = run_plan(tmp_path, folder, only(plan, request_id), mutation)
    far = difference(tensors, request_id, oracle, request_id.partition("/")[2])
    assert far > 100 * BOUND, f"the mutation changed {request_id} by only {far:.1e}"
