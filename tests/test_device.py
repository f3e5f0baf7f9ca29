"""What CUDA needs and a CPU can check: operators, devices of tensors, waits, copies and budgets."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks_attention import noise
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.gpu_models import TINY, build
from runtime.layout import Layout
from workers import device as device_module
from workers.attention import sdpa as sdpa_module
from workers.attention.sdpa import sdpa_lse
from workers.device import settle, to_host
from workers.models.qwen_image import pad_text
from workers.models.wan import TEXT_TOKENS, FoldedText, folded_scores
from workers.parallel.vae import StripParallel
from workers.setup import STATE_SHARE, memory_budget

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


# ---- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [5, 24, 128, 320])
@pytest.mark.parametrize("bias", [None, (2, 1, 1, 37), (1, 3, 7, 37), (2, 3, 1, 37)])
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_the_cuda_operators_take_what_we_hand_them(monkeypatch, dtype, dim, bias, capability):
    """torch's own shape functions of the private operators, on CUDA tensors without values."""
    monkeypatch.setattr(sdpa_module, "_capability", lambda _: capability)
    with FakeTensorMode():
        q, k = (torch.empty(2, tokens, 3, dim, dtype=dtype, device="cuda") for tokens in (7, 37))
        shift = None if bias is None else torch.empty(bias, dtype=dtype, device="cuda")
        out, lse = sdpa_lse(q, k, k, shift)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)


@pytest.mark.parametrize(
    ("dtype", "dim", "bias", "capability", "kernel"),
    [
        (torch.bfloat16, 128, False, (9, 0), "flash"),
        (torch.float16, 24, False, (8, 0), "flash"),
        (torch.bfloat16, 5, False, (8, 0), "flash"),
        (torch.bfloat16, 128, True, (9, 0), "efficient"),
        (torch.float32, 128, False, (9, 0), "efficient"),
        (torch.bfloat16, 320, False, (9, 0), "efficient"),
        (torch.bfloat16, 128, False, (7, 5), "efficient"),
    ],
)
def test_flash_is_taken_where_it_can_be(monkeypatch, dtype, dim, bias, capability, kernel):
    taken = []

    def stand_in(name, q, *_):
        taken.append((name, q.shape[-1] % sdpa_module.DIM_ALIGNED))
        return q, q[..., 0]

    monkeypatch.setattr(sdpa_module, "_capability", lambda _: capability)
    monkeypatch.setattr(sdpa_module, "_cuda_flash", functools.partial(stand_in, "flash"))
    monkeypatch.setattr(sdpa_module, "_cuda_efficient", functools.partial(stand_in, "efficient"))
    q = torch.zeros(1, 2, 4, dim, dtype=dtype)
    out, _ = sdpa_module._cuda(q, q, q, torch.zeros(1, 1, 1, 4) if bias else None)
    assert taken == [(kernel, 0)]
    assert out.shape == q.shape


def test_zeros_behind_the_head_dim_change_nothing(monkeypatch):
    """What `_cuda` hands the kernels, computed by the CPU's: padded, at the scale of the real head dim."""

    def cpu(q, k, v, bias, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)

    monkeypatch.setattr(sdpa_module, "_cuda_efficient", cpu)
    q, k, v = (noise(2, 3, 7, 5, seed=seed) for seed in range(3))
    out, lse = sdpa_module._cuda(q, k, v, None)
    right, right_lse = sdpa_module._cpu(q, k, v, None)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(lse, right_lse)


# ---- where tensors are -------------------------------------------------------------------------------------------


@pytest.fixture(params=TINY)
def on_meta(request):
    """A family on a device that has no values: a tensor left on the CPU, or one whose values are asked for, raises."""
    model = build(TINY[request.param], CPU, torch.float32)
    state = model.state(4)
    family = model.family
    for module in (family.denoiser, family.vae):
        module.to(META)
    family.device = META
    model.embeddings.update({name: value.to(META) for name, value in model.embeddings.items()})
    state.latents = state.latents.to(META)
    state.solver.timesteps = state.solver.timesteps.to(META)
    return model, state


def test_a_step_and_a_decode_are_all_on_the_device(on_meta):
    model, state = on_meta
    executor = model.executor()
    with torch.inference_mode():
        for _ in range(2):
            executor.step([state], Layout())
        assert state.latents.device == META
        for frames in model.family.decode(state):
            assert (frames.device, frames.dtype) == (META, torch.uint8)


def test_the_inputs_of_a_forward_wait_for_no_copy_from_the_host(on_meta, monkeypatch):
    """`torch.tensor(…, device=…)` and a CPU tensor's `.to(device)` stop the host until the device has caught up."""
    model, state = on_meta
    branches = model.recipe.card.branches(state.params, 0)
    model.family.inputs([state], branches)
    make, move = torch.tensor, torch.Tensor.to

    def tensor(*args, device=None, **kwargs):
        assert device in (None, CPU), "made on the host and copied"
        return make(*args, **kwargs)

    def to(self, *args, **kwargs):
        assert self.device == META, "copied from the host"
        return move(self, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    model.family.inputs([state], branches)


def test_the_moments_of_a_strip_wait_for_no_copy_from_the_host(monkeypatch):
    strips = StripParallel(torch.nn.Identity())
    x = noise(1, 2, 12)
    strips._rows = (1, 2)
    strips._group = SimpleNamespace(size=2, all_gather=lambda mine, dim, sizes: torch.cat([mine, mine + 1]))
    mean, variance = strips._frame_moments(x)
    each, spread = x.mean(2), x.var(2, correction=0)
    # Two thirds of the frame are one brighter and vary by one more.
    torch.testing.assert_close(mean[..., 0], each + 2 / 3)
    torch.testing.assert_close(variance[..., 0], spread + 2 / 3 + 2 / 9)
    monkeypatch.setattr(torch, "tensor", None)
    strips._frame_moments(x)


def test_texts_of_different_lengths_are_masked():
    text, mask = pad_text([torch.ones(1, 2, 3), torch.ones(1, 4, 3)])
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert text.sum(dim=(1, 2)).tolist() == [6.0, 12.0]


# ---- folded text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-9), (torch.bfloat16, 5e-4), (torch.float16, 1e-5)])
def test_folded_padding_weighs_what_it_should_in_any_precision(dtype, bound):
    """log(n) alone, rounded to bf16, is off by more than a hundredth."""
    for count in range(1, TEXT_TOKENS + 1):
        scores = folded_scores(count, dtype)
        assert len(scores) == min(count, 2)
        assert all(torch.tensor(score, dtype=dtype).item() == score for score in scores)
        assert abs(sum(map(math.exp, scores)) / count - 1) <= bound
    assert folded_scores(0, dtype) == ()


def test_folded_text_is_the_whole_text_in_bf16():
    """Cross-attention to 512 tokens against the folded ones, in fp64 on the bf16 bias: only the bias is rounded."""
    words = noise(1, 60, 16)
    text = FoldedText()
    folded = text.fold([words.bfloat16()])
    whole = torch.nn.functional.pad(words.bfloat16(), (0, 0, 0, TEXT_TOKENS - 60)).double()
    q = noise(1, 8, 16, seed=1).double()

    def attend(keys, bias):
        # Padding keys are alike, and something: a projection has its own bias.
        k, v = keys.double() + 0.5, keys.double() - 1.0
        return torch.softmax(q @ k.transpose(1, 2) / 4 + bias, dim=-1) @ v

    right = attend(whole, 0.0)
    off = (attend(folded, text.bias[:, 0].double()) - right).norm() / right.norm()
    assert off <= 1e-4


# ---- waits, copies, budgets --------------------------------------------------------------------------------------


def test_on_the_cpu_nothing_is_copied_and_nobody_waits():
    settle(CPU)
    frames = torch.arange(6, dtype=torch.uint8)
    assert np.shares_memory(to_host(frames).wait(), frames.numpy())


def test_a_copy_is_read_only_when_it_is_there(monkeypatch):
    """With an event in CUDA's place: marked after the copy was queued, waited for before the values are read."""
    events = []
    mark = SimpleNamespace(synchronize=lambda: events.append("waited"))
    monkeypatch.setattr(device_module, "_mark", lambda device: events.append(f"marked {device.type}") or mark)
    values = torch.zeros(3)
    copied = device_module.HostCopy(values, device_module._mark(CUDA))
    values += 1
    assert copied.wait().tolist() == [1.0] * 3
    settle(CUDA)
    assert events == ["marked cuda", "waited", "marked cuda", "waited"]


def test_an_item_is_over_when_the_device_has_done_it(monkeypatch):
    """Every kind of item waits before it reads the time: encode, denoise, and each chunk of a decode."""
    from workers import executor as executing

    model = build(TINY["wan"], CPU, torch.float32)
    executor, state, waits = model.executor(), model.state(4), []
    monkeypatch.setattr(executing, "settle", waits.append)
    monkeypatch.setattr(model.family, "encode", lambda requests: [model.embeddings], raising=False)
    executor.run(executing.Encode(1, (0,), (state.request,)))
    assert waits == [CPU]
    executor.run(executing.Denoise(2, (0,), Layout(), (state.request.id,), 4))
    assert waits == [CPU] * 2
    executor.run(executing.Decode(3, (0,), state.request.id, 2, "ipc:///nobody"))
    assert waits == [CPU] * 4


@pytest.mark.parametrize(("ranks", "expected"), [(1, 100 + 30), (2, 50 + 30)])
def test_what_torch_keeps_for_itself_is_free(monkeypatch, ranks, expected):
    """After the warm-up most of a GPU is in torch's cache, of which the driver does not know that it is free."""
    cuda = {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 40}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert memory_budget(CUDA, ranks) == expected * STATE_SHARE
