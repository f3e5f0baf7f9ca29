"""Pictures of unfinished requests: what solvers predict, the colours of latents, and that nobody's latents change."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from fake_mesh import MODEL_FOLDER
from PIL import Image
from simulation import Simulation
from single_rank import ALONE, STEPS, SingleRank
from tiny_wan import build_tiny_wan

from runtime.protocol import Denoise, PreviewTo, Request
from runtime.sampling import preview_steps
from workers.foresight import foresight_of
from workers.previews import LatentColours, Previews
from workers.state import RequestState

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
KNOWN = {
    "unipc flow": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "euler flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler": EulerDiscreteScheduler,
    "ddim": lambda: DDIMScheduler(clip_sample=False),
}


def truth(case, state, clean, noise):
    """What a denoiser that knows the clean latents predicts."""
    if "flow" in case:
        return noise - clean
    if case == "euler":
        return (state.latents - clean) / state.solver.sigmas[state.step]
    alpha = state.solver.alphas_cumprod[int(state.timestep)]
    return (state.latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("case", KNOWN)
def test_the_clean_latents_are_foreseen_after_every_step(case):
    solver = KNOWN[case]()
    clean, noise = torch.randn((2, 1, 4, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    solver.set_timesteps(6)
    first = solver.sigmas[0] if "flow" in case else 0.0
    latents = (1 - first) * clean + first * noise if first else noise * solver.init_noise_sigma
    state = RequestState(Request("a", None), latents, solver, {})
    state.foresight = foresight_of(solver)
    while state.step < 6:
        if case == "euler":
            solver.scale_model_input(state.latents, state.timestep)
        state.advance(truth(case, state, clean, noise))
        assert torch.allclose(state.foreseen, clean, atol=2e-4), state.step


def test_a_solver_that_nobody_knows_foresees_nothing():
    assert foresight_of(LCMScheduler()) is None
    assert foresight_of(UniPCMultistepScheduler(predict_x0=False)) is None


# ---- on a rank ---------------------------------------------------------------------------------------------------


class Sender:
    """Does at once what the thread would do later."""

    def __init__(self):
        self.headers, self.draws = [], []

    def send(self, endpoint, header, pixels):
        pass

    def offer(self, endpoint, header, draw):
        self.headers.append(header)
        self.draws.append(draw)

    def later(self, work):
        work()


def a_rank(folder, spool):
    """(rank, its sender)."""
    sender = Sender()
    rank = SingleRank(folder, spool, sender=sender)
    rank.executor.previews = Previews(rank.family, rank.card, sender)
    return rank, sender


def denoise(rank, request, previews):
    """To the end of its denoising, shown after some steps; its latents."""
    state = rank.encode(request)
    steps = [0, *preview_steps(request.params.num_inference_steps, previews), request.params.num_inference_steps]
    for begin, end in pairwise(steps):
        shown = (PreviewTo(request.id, "ipc:///nowhere", 2),) if end < steps[-1] else ()
        rank.executor.run(Denoise(2, (0,), ALONE, (request.id,), end - begin, shown))
    return state.latents


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


def test_previews_change_no_bit_of_the_latents(tiny, tmp_path):
    rank, sender = a_rank(tiny, tmp_path)
    plain, shown = (denoise(rank, rank.request(name), count) for name, count in (("a", 0), ("b", 3)))
    assert torch.equal(plain, shown)
    assert [(h.request_id, h.attempt, h.kind, h.step) for h in sender.headers] == [
        ("b", 2, "preview", step) for step in preview_steps(STEPS, 3)
    ]
    assert [draw().shape for draw in sender.draws] == [(h.height, h.width, 3) for h in sender.headers]
    state = rank.executor.states["b"]
    assert state.foresight is None
    assert state.foreseen is None


def correlation(picture, frame):
    """Of the picture with the frame in its size."""
    height, width, _ = picture.shape
    small = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))
    return np.corrcoef(picture.ravel().astype(float), small.ravel().astype(float))[0, 1]


PROMPTS = (
    *("a red circle moving right", "a blue square on a yellow background"),
    *("a large green star", "a white triangle moving up on a blue background"),
)
OTHERS = (
    *("a purple circle growing", "an orange square on a gray background"),
    *("a yellow triangle, still", "a small red star moving down on a green background"),
)


def made(rank, sender, prompt, seed, times=1):
    """(what draws the last preview of a video, its middle frame); the rank has learnt from it so many times."""
    wanted = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 3.0}
    request = rank.request("demo", prompt=prompt, seed=seed, **wanted)
    denoise(rank, request, 5)
    assert sender.headers[-1].step == 17, "in the last third"
    state, draw = rank.executor.states.pop(request.id), sender.draws[-1]
    chunks = list(rank.family.decode(state))
    for chunk, frames in times * list(enumerate(chunks)):
        rank.executor.previews.learn(state, chunk, frames)
    return draw, torch.cat(chunks)[8].numpy()


def test_late_previews_look_like_the_video(tmp_path):
    """The demo model: the colours of the warm-up are rough, with those of four videos they fit four others.

    Twenty times the same colours unlearn no other ones.
    """
    rank, sender = a_rank(MODEL_FOLDER, tmp_path)
    previews, few = rank.executor.previews, rank.request(num_frames=9, height=64, width=64).params
    previews.warm_up(few)
    rough = copy.deepcopy(previews.colours)
    for seed, prompt in enumerate(PROMPTS):
        made(rank, sender, prompt, seed)
    taught, previews.colours = previews.colours, copy.deepcopy(rough)
    made(rank, sender, PROMPTS[0], 0, times=20)
    monotonous, previews.learn = previews.colours, lambda *_: None
    videos = [made(rank, sender, prompt, seed) for seed, prompt in enumerate(OTHERS, 4)]

    def likeness(colours):
        previews.colours = colours
        return float(np.mean([correlation(draw(), frame) for draw, frame in videos]))

    assert likeness(taught) > 0.8
    assert likeness(taught) > likeness(rough) > 0.6, likeness(rough)
    assert likeness(monotonous) > 0.6, likeness(monotonous)


# ---- colours -----------------------------------------------------------------------------------------------------


def test_a_linear_decoder_is_learnt_exactly():
    random = np.random.default_rng(0)
    colours, latents = LatentColours(), random.normal(size=(4, 8, 8)).astype(np.float32)
    assert (colours.picture(latents) == 128).all()
    truth = random.normal(scale=20, size=(4, 3))

    def decoded(latents):
        pixels = (np.einsum("chw,cr->hwr", latents, truth) + 128).clip(0, 255).round().astype(np.uint8)
        return pixels.repeat(8, axis=0).repeat(8, axis=1)

    for _ in range(3):
        sample = random.normal(size=(4, 8, 8)).astype(np.float32) * 0.5
        colours.learn(sample, decoded(sample))
    tried = latents * 0.5
    apart = np.abs(colours.picture(tried).astype(int) - decoded(tried)[::8, ::8])
    assert apart.mean() < 1.0


def test_what_is_not_finite_teaches_nothing_and_shows_something():
    colours, latents = LatentColours(), np.full((4, 2, 2), np.nan, np.float32)
    colours.learn(latents, np.zeros((16, 16, 3), np.uint8))
    assert colours.samples == 0
    assert colours.picture(latents).shape == (2, 2, 3)


# ---- in the plan -------------------------------------------------------------------------------------------------


def test_items_end_where_previews_are_due():
    mesh = Simulation(num_ranks=1)
    mesh.join()
    items = []
    plan = mesh.scheduler.plan
    mesh.scheduler.plan = lambda now: [items.append(item) or item for item in plan(now)]
    mesh.submit("a", steps=20, previews=3)
    mesh.run(until=lambda: "a" in mesh.ends)
    done, shown = 0, []
    for item in items:
        if isinstance(item, Denoise):
            done += item.steps
            shown += [done for to in item.previews if to.request_id == "a"]
    assert shown == list(preview_steps(20, 3))
