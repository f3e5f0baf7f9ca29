"""A resume is bitwise what an undisturbed run gives, at every step of every known solver, or it is refused."""

import dataclasses

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from single_rank import STEPS, SingleRank, with_solver
from tiny_wan import build_tiny_wan

from runtime.errors import CheckpointUnusable, NotCheckpointable
from runtime.protocol import Decode, SavedState
from workers import checkpoint
from workers.checkpoint import SOLVER_FIELDS, capture, encode
from workers.state import RequestState

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning"),
]

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CASES = {
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "unipc-3": ("UniPCMultistepScheduler", {**FLOW, "solver_order": 3}),
    "dpm": ("DPMSolverMultistepScheduler", FLOW),
    "dpm-3": ("DPMSolverMultistepScheduler", {**FLOW, "solver_order": 3}),
    "dpm-sde": ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "sde-epsilon": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow-euler-stochastic": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
}
FIELDS = [
    (case, field)
    for case in ("unipc", "dpm", "flow-euler", "euler", "euler-ancestral")
    for field in SOLVER_FIELDS[CASES[case][0]]
]
DRAWING = ("dpm-sde", "sde-epsilon", "flow-euler-stochastic", "euler-ancestral")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


class Undisturbed:
    """One run to its end, with a checkpoint of every step on the way."""

    def __init__(self, rank, folder):
        self.rank, self.request, self.saved, self.late = rank, rank.request(), [], []
        state = rank.encode(self.request)
        for step in range(STEPS + 1):
            snapshot = capture(state, rank.model)
            file = folder / f"{step}.safetensors"
            file.write_bytes(encode(snapshot))
            self.saved.append(SavedState(step, str(file), file.stat().st_size))
            self.late.append(snapshot)
            if step < STEPS:
                rank.denoise(1, self.request.id)
        self.latents = state.latents

    def resumed(self, step):
        """The final latents of a run that goes on from a checkpoint."""
        state = self.rank.encode(self.request, a=self.saved[step])
        assert state.step == step
        self.rank.denoise(STEPS - step, self.request.id)
        return state.latents


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    runs = {}

    def run(case):
        if case not in runs:
            import diffusers

            name, options = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            solver = getattr(diffusers, name)(**options)
            rank = SingleRank(with_solver(tiny, folder / "wan", solver), folder / "spool")
            runs[case] = Undisturbed(rank, folder)
        return runs[case]

    return run


# ---- exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_resume_at_any_step_is_bitwise_the_undisturbed_run(undisturbed, case):
    run = undisturbed(case)
    assert run.latents.isfinite().all()
    for step in range(STEPS + 1):
        assert torch.equal(run.resumed(step), run.latents), f"resumed at step {step}"


@pytest.mark.parametrize("case", CASES)
def test_taking_checkpoints_changes_nothing(undisturbed, case):
    run = undisturbed(case)
    state = run.rank.encode(run.request)
    run.rank.denoise(STEPS, run.request.id)
    assert torch.equal(state.latents, run.latents)


@pytest.mark.parametrize("case", CASES)
def test_a_snapshot_keeps_its_moment_while_the_run_goes_on(undisturbed, case):
    """By reference: were any tensor written in place by a later step, the late bytes would differ."""
    run = undisturbed(case)
    for step, snapshot in enumerate(run.late):
        with open(run.saved[step].path, "rb") as file:
            assert encode(snapshot) == file.read(), f"the snapshot of step {step} changed"


@pytest.mark.parametrize(("case", "field"), FIELDS)
def test_every_field_is_needed(undisturbed, monkeypatch, tmp_path, case, field):
    name = CASES[case][0]
    monkeypatch.setitem(SOLVER_FIELDS, name, tuple(one for one in SOLVER_FIELDS[name] if one != field))
    run = undisturbed(case)
    poorer = Undisturbed(run.rank, tmp_path)
    assert torch.equal(poorer.latents, run.latents)
    harmless = [step for step in range(1, STEPS) if _same(poorer, step, run.latents)]
    assert len(harmless) < STEPS - 1, f"{field} is never read"


def _same(run, step, expected):
    try:
        return torch.equal(run.resumed(step), expected)
    except (AttributeError, TypeError, IndexError, AssertionError):
        return False


@pytest.mark.parametrize("case", DRAWING)
def test_the_rng_is_needed_where_noise_is_drawn(undisturbed, case):
    run = undisturbed(case)
    state = run.rank.encode(run.request, a=run.saved[4])
    state.generator.manual_seed(run.request.params.seed)
    run.rank.denoise(STEPS - 4, run.request.id)
    assert not torch.equal(state.latents, run.latents)


def test_the_latents_are_needed(undisturbed):
    run = undisturbed("unipc")
    fresh = run.rank.encode(run.request).latents
    state = run.rank.encode(run.request, a=run.saved[4])
    state.latents = fresh
    run.rank.denoise(STEPS - 4, run.request.id)
    assert not torch.equal(state.latents, run.latents)


def test_at_the_last_step_only_the_decode_is_left(undisturbed):
    run = undisturbed("unipc")
    frames, chunks = run.rank.frames, len(run.rank.card.decode_chunks(run.request.params))
    decode = Decode(3, (0,), run.request.id, chunks, "")
    run.rank.encode(run.request)
    run.rank.denoise(STEPS, run.request.id)
    run.rank.executor.run(decode)
    expected = torch.cat(frames.chunks)
    frames.chunks.clear()
    run.rank.encode(run.request, a=run.saved[STEPS])
    run.rank.executor.run(decode)
    assert torch.equal(torch.cat(frames.chunks), expected)


def test_a_run_may_be_cut_again_and_again(undisturbed, tmp_path):
    run = undisturbed("unipc")
    saved = run.saved[0]
    for step in range(1, STEPS + 1):
        state = run.rank.encode(run.request, a=saved)
        run.rank.denoise(1, run.request.id)
        file = tmp_path / f"{step}.safetensors"
        file.write_bytes(encode(capture(state, run.rank.model)))
        saved = SavedState(step, str(file), 0)
    assert torch.equal(state.latents, run.latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bits_dtypes_and_memory_formats_survive(undisturbed, tmp_path, dtype):
    run = undisturbed("unipc")
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0]).to(dtype)
    state = run.rank.encode(run.request)
    shape = state.latents.shape
    state.latents = odd.repeat(shape.numel())[: shape.numel()].reshape(shape).to(memory_format=torch.channels_last_3d)
    state.solver.last_sample = state.latents.clone().transpose(3, 4)[:, :, :, :, :]
    state.solver.model_outputs = [None, torch.tensor(-0.125, dtype=dtype)]
    file = tmp_path / "odd.safetensors"
    file.write_bytes(encode(capture(state, run.rank.model)))
    back = run.rank.family.prepare(run.request, state.embeddings, torch.Generator())
    back.generator = torch.Generator()
    back.latents = back.latents.to(dtype)
    checkpoint.restore(back, file, 0, run.rank.model)
    for mine, theirs in (
        (back.latents, state.latents),
        (back.solver.last_sample, state.solver.last_sample),
        (back.solver.model_outputs[1], state.solver.model_outputs[1]),
    ):
        assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(
            mine.contiguous().reshape(-1).view(torch.uint8), theirs.contiguous().reshape(-1).view(torch.uint8)
        )


def test_a_new_field_of_a_request_has_to_be_thought_of():
    """Whoever gives RequestState a field decides here whether a checkpoint has to hold it."""
    in_the_file = {"latents", "solver", "generator", "step"}
    made_again = {"request", "embeddings", "decoder", "frames_sent", "timings"}
    between_two_lines_of_a_step = {"foresight", "foreseen"}
    assert {field.name for field in dataclasses.fields(RequestState)} == (
        in_the_file | made_again | between_two_lines_of_a_step
    )


# ---- or refused --------------------------------------------------------------------------------------------------


def rewrite(file, target, *, drop=(), tensors=(), **changes):
    """The same file with another header."""
    with safe_open(file, "pt") as source:
        header = msgspec.json.decode(source.metadata()["framemesh"])
        kept = {name: source.get_tensor(name) for name in source.keys() if name not in drop}  # noqa: SIM118
    metadata = {"framemesh": msgspec.json.encode(header | changes).decode()}
    save_file(kept | dict(tensors), target, metadata)


BREAKAGES = {
    "format": lambda file, to: rewrite(file, to, format=2),
    "request": lambda file, to: rewrite(file, to, request_id="b"),
    "step": lambda file, to: rewrite(file, to, step=5),
    "params": lambda file, to: rewrite(file, to, params="0" * 64),
    "model": lambda file, to: rewrite(file, to, model="0" * 64),
    "solver": lambda file, to: rewrite(file, to, solver="DDIMScheduler 0.42.0"),
    "fields": lambda file, to: rewrite(file, to, fields={"_step_index": 4}),
    "rng": lambda file, to: rewrite(file, to, generator={"name": "latents", "device": "cpu", "strides": [1]}),
    "no-tensor": lambda file, to: rewrite(file, to, drop=("solver.last_sample",)),
    "no-latents": lambda file, to: rewrite(file, to, drop=("latents",)),
    "shape": lambda file, to: rewrite(file, to, tensors={"latents": torch.zeros(1, 4, 2, 4, 8)}.items()),
    "history-shape": lambda file, to: rewrite(
        file, to, tensors={"solver.last_sample": torch.zeros(1, 4, 2, 4, 8)}.items()
    ),
    "dimensions": lambda file, to: rewrite(file, to, tensors={"latents": torch.zeros(4)}.items()),
    "dtype": lambda file, to: rewrite(file, to, tensors={"latents": torch.zeros(1, 4, 2, 4, 4).half()}.items()),
    "no-header": lambda file, to: save_file({"latents": torch.zeros(1)}, to),
    "cut": lambda file, to: to.write_bytes(file.read_bytes()[:-1]),
    "cut-early": lambda file, to: to.write_bytes(file.read_bytes()[:5]),
    "empty": lambda file, to: to.write_bytes(b""),
    "noise": lambda file, to: to.write_bytes(bytes(range(256)) * 40),
    "missing": lambda file, to: None,
    "folder": lambda file, to: to.mkdir(),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(undisturbed, tmp_path, breakage):
    run = undisturbed("unipc")
    broken = tmp_path / "broken.safetensors"
    good = checkpoint.Path(run.saved[4].path)
    BREAKAGES[breakage](good, broken)
    run.rank.executor.states.clear()
    other = run.rank.request("other")
    with pytest.raises(CheckpointUnusable) as caught:
        run.rank.encode(other, run.request, a=SavedState(4, str(broken), 0))
    assert run.rank.executor.states == {}
    assert str(tmp_path) not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_broken_rng_state_is_refused_before_anything_changes(undisturbed, tmp_path):
    run, file = undisturbed("euler-ancestral"), tmp_path / "broken.safetensors"
    rewrite(checkpoint.Path(run.saved[4].path), file, tensors={"generator": torch.zeros(7).byte()}.items())
    state = run.rank.encode(run.request)
    latents, generator = state.latents, state.generator
    with pytest.raises(CheckpointUnusable, match="RNG"):
        checkpoint.restore(state, file, 4, run.rank.model)
    assert state.latents is latents
    assert (state.generator, state.step, state.solver._step_index) == (generator, 0, None)


def test_other_parameters_are_refused(undisturbed):
    run = undisturbed("unipc")
    for asked in ({"seed": 4}, {"prompt": "a box"}, {"num_inference_steps": 9}, {"width": 48}, {"guidance_scale": 4.5}):
        with pytest.raises(CheckpointUnusable, match="params"):
            run.rank.encode(run.rank.request(**asked), a=run.saved[4])


def test_a_refused_state_is_untouched(undisturbed):
    run = undisturbed("unipc")
    state = run.rank.encode(run.request)
    latents = state.latents
    with pytest.raises(CheckpointUnusable):
        checkpoint.restore(state, checkpoint.Path(run.saved[4].path), 4, "another model")
    assert (state.step, state.solver._step_index, state.solver.last_sample) == (0, None, None)
    assert state.latents is latents


def test_another_solver_is_refused(undisturbed, tiny, tmp_path):
    run, other = undisturbed("unipc"), undisturbed("dpm")
    with pytest.raises(CheckpointUnusable):
        other.rank.encode(other.request, a=run.saved[4])


def test_an_unknown_solver_is_not_checkpointable(undisturbed):
    from diffusers import PNDMScheduler, UniPCMultistepScheduler

    run = undisturbed("unipc")
    state = run.rank.encode(run.request)
    state.solver = PNDMScheduler()
    with pytest.raises(NotCheckpointable, match="PNDMScheduler"):
        capture(state, run.rank.model)
    state.solver = UniPCMultistepScheduler(**FLOW, solver_p=PNDMScheduler())
    with pytest.raises(NotCheckpointable, match="solver_p"):
        capture(state, run.rank.model)


def test_a_field_that_a_solver_has_lost_is_not_passed_over(undisturbed):
    """A new diffusers that renames its history must not be saved without it."""
    run = undisturbed("unipc")
    state = run.rank.encode(run.request, a=run.saved[4])
    del state.solver.last_sample
    with pytest.raises(NotCheckpointable, match="last_sample"):
        capture(state, run.rank.model)
