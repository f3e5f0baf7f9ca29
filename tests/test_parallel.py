"""Attention over ranks, transfers and groups against the same computation on whole tensors, on real gloo ranks."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from ranks_attention import noise, whole
from toy_joint import PLAN, Toy

from bench.parallel import ask, crew, formula, meshes, params_of, random_weights
from runtime.config import Config, check_transport, resolve_backend
from runtime.errors import InvalidInput
from runtime.layout import Layout
from workers.attention.backends import KERNELS, as_bias, choose
from workers.parallel.groups import SOLO
from workers.parallel.ring import merge, ring_attention
from workers.parallel.sequence import SequenceParallel, SequencePlan
from workers.parallel.yunchang_engine import _cannot_take

BOUND = 2e-6
"""Of fp32 attention against fp64; SDPA's own error is 9e-7 here."""
SIZES = [2, 3, 4]
KERNEL = KERNELS["torch_sdpa"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Rank count -> every rank's report; each group of ranks starts once."""
    made = {}

    def of(num_ranks):
        if num_ranks not in made:
            folder = tmp_path_factory.mktemp(f"attention{num_ranks}")
            run_ranks(num_ranks, "ranks_attention.py", str(folder))
            files = [folder / f"attention{rank}.json" for rank in range(num_ranks)]
            made[num_ranks] = [json.loads(file.read_text()) for file in files]
        return made[num_ranks]

    return of


@pytest.mark.parametrize("num_ranks", SIZES)
def test_attention_over_ranks_is_attention_on_whole_tensors(reports, num_ranks):
    for report in reports(num_ranks):
        assert len(report["errors"]) >= 80
        wrong = {name: error for name, error in report["errors"].items() if not error <= BOUND}
        assert not wrong


@pytest.mark.parametrize("num_ranks", SIZES)
def test_every_fault_shows(reports, num_ranks):
    found = set()
    for report in reports(num_ranks):
        for name, error in report["mutations"].items():
            assert not error <= 1e4 * BOUND, name
            found.add(name.split()[0])
    assert found == {"heads", "tokens", "merge", "rotation"}


@pytest.mark.parametrize("num_ranks", SIZES)
def test_bf16_loses_no_more_than_rounding(reports, num_ranks):
    """A ring rounds its result once more; a log-sum-exp in bf16 would cost three times as much."""
    for report in reports(num_ranks):
        for name, (ours, plain) in report["bf16"].items():
            assert ours <= 1.4 * plain, name


@pytest.mark.parametrize("num_ranks", SIZES)
def test_nothing_is_padded(reports, num_ranks):
    """What is sent is what the uneven shares say, to the byte; nothing else is sent."""
    for report in reports(num_ranks):
        for name, rows in report["moved"].items():
            for found, expected in rows:
                assert found == expected, name
                assert expected


@pytest.mark.parametrize("num_ranks", SIZES)
def test_hooks_on_a_joint_denoiser_change_nothing(reports, num_ranks):
    """Both streams split, with and without a mask over the text, shares of any size; the whole output on every rank."""
    for report in reports(num_ranks):
        assert report["hooks"]
        wrong = {name: error for name, error in report["hooks"].items() if not error <= BOUND}
        assert not wrong


@pytest.mark.parametrize("num_ranks", SIZES)
def test_staging_changes_no_bit(reports, num_ranks):
    for report in reports(num_ranks):
        assert report["staged"]
        assert all(report["staged"].values())


@pytest.mark.parametrize("num_ranks", SIZES)
def test_yunchang_agrees_and_leaves_the_rest_to_us(reports, num_ranks):
    for report in reports(num_ranks):
        for name, (error, difference) in report["yunchang"].items():
            assert error <= BOUND, name
            assert difference <= BOUND, name
        for name, errors in report["declined"].items():
            assert max(errors) <= BOUND, name


def test_no_group_waits_longer_than_it_was_told(reports):
    """torch gives a new group half an hour, whatever the process was started with."""
    assert [report["timeout_s"] for report in reports(2)] == [60.0, 60.0]


@pytest.mark.parametrize(("dtype", "dim", "taken"), [(torch.bfloat16, 128, True), (torch.float32, 128, False)])
def test_yunchang_gets_only_what_flash_attention_takes(dtype, dim, taken):
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 64, 4, dim))
    assert (_cannot_take(q, [64], [64], SOLO, None) is None) is taken


def test_a_step_sends_what_the_formula_says():
    """Counted while the executor runs a real step; 64 tokens and 8 heads divide by every degree, FSDP pads a table."""
    args, weights = argparse.Namespace(steps=1, frames=1, size=128), random_weights()
    with crew(args, 4, 1) as ranks:
        for mesh in meshes(4):
            answers, expected = ask(ranks, mesh), formula(mesh, params_of(args), weights)
            assert sum(answer["bytes"] for answer in answers) / len(answers) == expected.total > 0, mesh
            for answer in answers:
                assert answer["weights"] == expected.weights, mesh
                assert answer["gathers"] == expected.calls["weights"], mesh


# ---- the kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dim", [5, 16, 24, 128])
@pytest.mark.parametrize("bias_shape", [None, (2, 1, 1, 9), (1, 3, 7, 9), (2, 3, 1, 9)])
def test_the_log_sum_exp_is_right(dtype, dim, bias_shape):
    q, k, v = (noise(2, 7 if i == 0 else 9, 3, dim, seed=i, dtype=dtype) for i in range(3))
    bias = None if bias_shape is None else noise(*bias_shape, seed=4, dtype=dtype)
    if bias is not None:
        bias[..., 2] = -torch.inf
    out, lse = KERNEL.attend_lse(q, k, v, bias)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / dim**0.5
    right = (scores if bias is None else scores + bias.double()).logsumexp(-1).transpose(1, 2)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), right, atol=2e-6, rtol=0)
    assert torch.equal(out, KERNEL.attend(q, k, v, bias)), "the ring would differ from one rank by the kernel alone"


@pytest.mark.parametrize(("queries", "keys", "heads"), [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 2)])
def test_nothing_to_attend_is_no_crash(queries, keys, heads):
    q, k = torch.zeros(1, queries, heads, 8), torch.zeros(1, keys, heads, 8)
    out, lse = KERNEL.attend_lse(q, k, k, None)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert lse.isneginf().all()
    assert KERNEL.attend(q, k, k, None).shape == q.shape


def test_a_query_without_a_key_says_so():
    keep = torch.tensor([[True, False, True], [False, False, False]])
    q, k, v = (noise(2, 3, 2, 8, seed=i) for i in range(3))
    out, lse = KERNEL.attend_lse(q, k, v, as_bias(keep, torch.float32))
    assert lse[0].isfinite().all()
    assert lse[1].isneginf().all()
    assert (out[1] == 0).all()


def test_merged_parts_are_the_whole():
    q, k, v = (noise(2, 12, 3, 16, seed=i) for i in range(3))
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[1, :8] = False
    bias = as_bias(keep, torch.float32)
    merged = None
    for start in range(0, 12, 4):
        cut = slice(start, start + 4)
        merged = merge(merged, KERNEL.attend_lse(q, k[:, cut], v[:, cut], bias[..., cut]))
    assert (merged[0] - whole(q, k, v, bias)).abs().max() <= BOUND


def test_the_next_keys_travel_while_the_kernel_runs():
    events = []

    class Coming:
        def __init__(self, shape):
            self.shape = shape

        def wait(self):
            events.append("wait")
            return torch.zeros(self.shape)

    class Recorder:
        size, rank = 3, 1

        def start_exchange(self, kv, shape):
            events.append("start")
            return Coming(shape)

    def attend(q, k, v, bias):
        events.append(f"attend {k.shape[1]}")
        return KERNEL.attend_lse(q, k, v, bias)

    q = noise(1, 4, 2, 8)
    ring_attention(q, q, q, [3, 4, 5], Recorder(), replace(KERNEL, attend_lse=attend))
    assert events == ["start", "attend 4", "wait", "start", "attend 3", "wait", "attend 5"]


def test_parts_without_a_key_merge_to_nothing():
    nothing = torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), -torch.inf)
    something = torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1)
    out, lse = merge(nothing, nothing)
    assert (out == 0).all()
    assert lse.isneginf().all()
    for pair in ((nothing, something), (something, nothing)):
        assert torch.equal(merge(*pair)[0], something[0])
        assert torch.equal(merge(*pair)[1], something[1])


def test_a_kernel_is_refused_by_name():
    assert choose("auto") is choose("torch_sdpa")
    with pytest.raises(InvalidInput, match="take one of torch_sdpa") as refusal:
        choose("flash")
    assert refusal.value.field == "attention_backend"


# ---- the seam ----------------------------------------------------------------------------------------------------


def test_alone_the_hooks_do_nothing():
    toy = Toy()
    SequenceParallel(toy, PLAN, KERNEL, lambda attend: attend)
    picture, text = noise(1, 6, 8), noise(1, 3, 8, seed=1)
    x = torch.cat([text, picture], dim=1).unflatten(2, (2, -1))
    first = picture + F.scaled_dot_product_attention(*(x.transpose(1, 2),) * 3).transpose(1, 2).flatten(2)[:, 3:]
    assert toy(picture, text).shape == first.shape


@pytest.mark.parametrize("field", ["split_inputs", "split_outputs", "gather_outputs", "attention"])
def test_a_plan_that_names_no_module_is_a_fault(field):
    parts = {name: getattr(PLAN, name) for name in ("split_inputs", "split_outputs", "gather_outputs", "attention")}
    parts[field] = {"blocks.*.nothing": next(iter(parts[field].values()))}
    with pytest.raises(AssertionError, match="no module matches"):
        SequenceParallel(Toy(), SequencePlan(**parts), KERNEL, lambda attend: attend)


def test_a_star_is_one_part_of_a_name():
    parts = {"split_inputs": {}, "split_outputs": {}, "gather_outputs": {}, "attention": {"*": ("picture",)}}
    with pytest.raises(AttributeError, match="set_processor"):
        # tables, blocks and last, not the blocks inside.
        SequenceParallel(Toy(), SequencePlan(**parts), KERNEL, lambda attend: attend)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "device", "backend"),
    [
        ("auto", "cpu", "gloo"),
        ("auto", "cuda", "nccl"),
        ("gloo", "cpu", "gloo"),
        ("nccl", "cuda", "nccl"),
        ("staged", "cuda", "staged"),
    ],
)
def test_the_transport_follows_the_device(wanted, device, backend):
    assert resolve_backend(wanted, device) == backend


@pytest.mark.parametrize(("wanted", "device"), [("nccl", "cpu"), ("staged", "cpu"), ("gloo", "cuda")])
def test_a_transport_that_cannot_move_the_tensors_is_refused(wanted, device):
    with pytest.raises(InvalidInput) as refusal:
        resolve_backend(wanted, device)
    assert refusal.value.field == "dist_backend"


def test_yunchang_is_refused_without_cuda():
    with pytest.raises(InvalidInput, match="needs CUDA and flash-attn") as refusal:
        check_transport(Config(sp_engine="yunchang"), "cpu")
    assert refusal.value.field == "sp_engine"


def test_the_default_config_is_one_rank():
    assert Config().layout == Layout(1, 1, 1)
