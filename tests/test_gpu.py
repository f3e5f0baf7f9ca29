"""On a GPU only: kernels, transfers, waits and whole models. Elsewhere all of it is left out, and one line says so."""

import threading

import numpy as np
import pytest
import torch
from single_rank import ALONE, SingleRank
from tiny_wan import DEMO

from bench import gpu_ranks
from bench.gpu import distance
from bench.gpu_models import TINY, build, cast, twin
from bench.gpu_ranks import BF16_RATIO, judge
from runtime.layout import Layout
from runtime.protocol import Decode, Denoise, FramesChunk
from workers.attention.backends import KERNELS
from workers.checkpoint import capture, encode, restore
from workers.device import to_host
from workers.frames import FrameSender
from workers.setup import memory_budget
from workers.worker import failure_code

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    # Once for the whole module: a line per test would be read by nobody.
    pytest.skip("no CUDA device", allow_module_level=True)

CUDA = torch.device("cuda", 0)
KERNEL = KERNELS["torch_sdpa"]
STEPS, SEEDS = 4, 5
GIB = 1 << 30


@pytest.fixture(autouse=True)
def exact_convolutions():
    """fp32 means fp32: they are in TF32 otherwise, and no CPU would agree with them."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def busy():
    """Half a second and more of work, queued."""
    x = torch.randn(8192, 8192, device=CUDA)
    for _ in range(20):
        x = x @ x / 90
    return x


# ---- kernels and ranks -------------------------------------------------------------------------------------------


def test_kernels_and_their_log_sum_exp_are_right():
    """Flash, memory-efficient and cuDNN against fp64: masks, queries that see no key, head dims and lengths at odds."""
    rows = [*gpu_ranks.kernel_rows(CUDA)]
    assert {"kernel", "cudnn"} <= {row.case.split()[0] for row in rows}
    assert judge(rows) == []


@pytest.mark.parametrize(("queries", "keys", "heads"), [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 2)])
def test_nothing_to_attend_is_no_crash(queries, keys, heads):
    q, k = (torch.zeros(1, tokens, heads, 8, device=CUDA, dtype=torch.bfloat16) for tokens in (queries, keys))
    out, lse = KERNEL.attend_lse(q, k, k, None)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert lse.isneginf().all()
    assert KERNEL.attend(q, k, k, None).shape == q.shape


def test_two_staged_ranks_do_what_one_does():
    assert gpu_ranks.check("cuda")["out_of_bounds"] == []


# ---- models ------------------------------------------------------------------------------------------------------


def our_latents(model, seed=0):
    executor, state = model.executor(), model.state(STEPS, seed)
    with torch.inference_mode():
        for _ in range(STEPS):
            executor.step([state], Layout())
    return state.latents


def their_latents(model, denoiser, seed=0):
    return model.stock(denoiser)(**model.words(STEPS, seed), return_dict=False)[0]


@pytest.mark.parametrize("name", TINY)
def test_the_executor_does_what_diffusers_does(name):
    model = build(TINY[name], CUDA, torch.float32)
    right = their_latents(model, twin(model))
    assert (our_latents(model) - right).abs().max() <= 1e-4 * right.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_bf16_costs_no_more_than_it_costs_diffusers(name):
    model = build(TINY[name], CUDA, torch.float32)
    half, stock, stock_half = cast(model, torch.bfloat16), twin(model), twin(model, torch.bfloat16)
    right = torch.cat([their_latents(model, stock, seed) for seed in range(SEEDS)])
    theirs = torch.cat([their_latents(half, stock_half, seed) for seed in range(SEEDS)])
    ours = torch.cat([our_latents(half, seed) for seed in range(SEEDS)])
    assert distance(ours, right) <= BF16_RATIO * distance(theirs, right)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model on the GPU, in fp32."""
    return SingleRank(DEMO, tmp_path_factory.mktemp("spool"), device="cuda", dit_precision="fp32")


def frames_of(rank):
    request = rank.request("whole", height=64, width=64, num_frames=17, seed=5)
    rank.encode(request)
    rank.denoise(request.params.num_inference_steps, "whole")
    chunks = len(rank.card.decode_chunks(request.params))
    rank.executor.run(Decode(3, (0,), "whole", chunks, "ipc:///nobody"))
    return torch.cat([chunk.cpu() for chunk in rank.frames.chunks])


def test_the_demo_model_makes_the_same_frames_as_on_the_cpu(demo, tmp_path):
    ours, right = frames_of(demo), frames_of(SingleRank(DEMO, tmp_path))
    assert ours.shape == right.shape == (17, 64, 64, 3)
    assert right.float().std() > 5
    assert (ours.int() - right.int()).abs().max() <= 1


def test_a_checkpoint_is_resumed_to_the_bit(demo, tmp_path):
    request = demo.request("saved")
    state = demo.encode(request)
    demo.denoise(3, "saved")
    file = tmp_path / "saved.safetensors"
    file.write_bytes(encode(capture(state, demo.model)))
    demo.denoise(2, "saved")
    fresh = demo.encode(demo.request("saved"))
    restore(fresh, file, 3, demo.model)
    demo.denoise(2, "saved")
    assert torch.equal(fresh.latents, state.latents)
    assert fresh.latents.is_cuda


# ---- waits and copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_the_inputs_of_a_forward_wait_for_nothing(name):
    model = build(TINY[name], CUDA, torch.float32)
    state = model.state(STEPS)
    branches = model.recipe.card.branches(state.params, 0)
    model.family.inputs([state], branches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.family.inputs([state], branches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_item_is_over_when_the_gpu_has_done_it(demo):
    """What was queued before it counts too: the stream is in order."""
    demo.encode(demo.request("timed"))
    busy()
    demo.executor.run(Denoise(2, (0,), ALONE, ("timed",), 1))
    assert torch.cuda.current_stream(CUDA).query()


def test_frames_are_copied_in_order_and_into_pinned_memory():
    """What is queued after the copy overwrites them, and does not show."""
    sent, arrived = [], threading.Event()
    sender = FrameSender(b"worker0")
    sender._deliver = lambda endpoint, header, draw: (sent.append(draw()), arrived.set())
    frames = torch.full((2, 8, 8, 3), 7, dtype=torch.uint8, device=CUDA)
    busy()
    sender.send("ipc:///nobody", FramesChunk("a", 0, 0, 2, 2, 8, 8), frames)
    frames.zero_()
    assert arrived.wait(60)
    sender.close()
    assert (sent[0] == 7).all()
    assert sent[0].dtype == np.uint8
    assert to_host(frames)._values.is_pinned()


def test_the_warm_up_takes_nothing_from_the_budget():
    torch.cuda.empty_cache()
    before = memory_budget(CUDA, 1)
    held = torch.empty(4 * GIB, dtype=torch.uint8, device=CUDA)
    assert memory_budget(CUDA, 1) < before - GIB
    del held
    assert torch.cuda.memory_reserved(CUDA) >= 4 * GIB
    assert abs(memory_budget(CUDA, 1) - before) < GIB / 4


def test_out_of_memory_is_told_from_a_lost_gpu():
    with pytest.raises(torch.OutOfMemoryError) as refusal:
        torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)
    assert failure_code(refusal.value) == "out_of_memory"
    assert not isinstance(refusal.value, torch.AcceleratorError)
