"""Text encoders whose layers are shared by the ranks give the embeddings of one rank; when that pays is predicted."""

import pytest
import ranks_encoder
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_wan import DEMO

from runtime.errors import InvalidInput
from runtime.folding import EncoderShape, encoder_shapes, resolve_tp
from runtime.machine import load_machine
from runtime.models.card import read_configs
from workers.parallel.encoder import tensor_group

BOUND = 1e-5
UMT5_XXL = {"model_type": "umt5", "num_heads": 64, "num_layers": 24, "d_model": 4096, "d_ff": 10240, "d_kv": 64}
QWEN_7B = {
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("encoders")
    ranks_encoder.build(place)
    return place


def run(tmp_path, num_ranks, folder, mutation="none"):
    run_ranks(num_ranks, "ranks_encoder.py", str(folder), str(tmp_path), mutation)
    return [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(num_ranks)]


def difference(tensors, name, how):
    return (tensors[f"{name}/{how}"] - tensors[f"{name}/whole"]).abs().max().item()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_split_encoders_equal_whole_ones(tmp_path, folder, num_ranks):
    for tensors in run(tmp_path, num_ranks, folder):
        for name in ranks_encoder.ENCODERS:
            assert tensors[f"{name}/whole"].std() > 0.3
            assert difference(tensors, name, "split") <= BOUND, name
            assert difference(tensors, name, "sharded") == 0.0, name
            whole, split, sharded = (tensors[f"{name}/{how}/bytes"].item() for how in ("whole", "split", "sharded"))
            # Embeddings and norms stay whole under tensor parallelism.
            assert split < whole
            assert sharded <= whole / num_ranks * 1.05


@pytest.mark.parametrize(
    ("mutation", "victims"), [("bias", {"umt5", "t5", "t5-plain"}), ("sum", {"umt5", "t5", "t5-plain", "qwen"})]
)
def test_a_wrong_split_is_caught(tmp_path, folder, mutation, victims):
    tensors = run(tmp_path, 2, folder, mutation)[1]
    for name in ranks_encoder.ENCODERS:
        assert (difference(tensors, name, "split") > 100 * BOUND) == (name in victims), name


def test_one_rank_shares_with_nobody():
    assert tensor_group(4, 1, 0) is None


# ---- whether it pays ---------------------------------------------------------------------------------------------


def test_sizes_of_the_encoders_are_read_from_the_configs():
    (umt5,) = encoder_shapes({"text_encoder": UMT5_XXL})
    # 24 layers of four 4096 x 4096 projections and three of the feed-forward.
    assert umt5.weights == 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert umt5.divides == 64
    (qwen,) = encoder_shapes({"text_encoder": {"model_type": "qwen2_5_vl", "text_config": QWEN_7B}})
    assert (qwen.heads, qwen.kv_heads, qwen.head_dim, qwen.divides) == (28, 4, 128, 4)
    assert encoder_shapes({"text_encoder": {"model_type": "clip_text_model"}}) == []


def test_a_tiny_encoder_on_cpus_stays_whole():
    tp, reason = resolve_tp(None, read_configs(DEMO), 2, load_machine("cpu-gloo"))
    assert tp == 1
    assert "1: " in reason
    assert "2: " in reason


def test_a_large_encoder_is_shared_where_the_links_are_fast_and_the_prompt_is_long():
    nvlink, pcie = load_machine("h100-nvlink"), load_machine("h100-pcie")
    t5_xxl = {"text_encoder": UMT5_XXL | {"model_type": "t5"}}
    # FLUX pads to 512 tokens: 12 ms of multiplications. UMT5's short prompts cost less than the launches.
    assert resolve_tp(None, t5_xxl, 8, nvlink)[0] == 4
    assert resolve_tp(None, {"text_encoder": UMT5_XXL}, 8, nvlink)[0] == 1
    (shape,) = encoder_shapes(t5_xxl)
    assert shape.seconds(1, nvlink) == pytest.approx(2 * shape.weights * 512 / nvlink.flops)
    # Two all-reduces per layer of 512 x 4096 values, to and fro.
    reduces = 48 * (pcie.link_latency + 2 * 512 * 4096 * 2 / 2 / pcie.link_bandwidth)
    assert shape.seconds(2, pcie) == pytest.approx(shape.weights * 512 / pcie.flops + reduces)


def test_by_hand_it_must_divide_the_heads_and_the_sp_degree():
    machine = load_machine("cpu-gloo")
    assert resolve_tp(2, {"text_encoder": UMT5_XXL}, 4, machine) == (2, "tp_size 2, settled at the start")
    for degree, sp, reason in (
        (8, 8, "the 28 heads of text_encoder, the 4 key and value heads of text_encoder; take one of [1, 2, 4]"),
        # It divides all but the one that is easily overlooked.
        (7, 7, "the 4 key and value heads of text_encoder, the 18944 hidden units of text_encoder; take one of [1]"),
        (4, 6, "sp(6); take one of [1, 2]"),
    ):
        with pytest.raises(InvalidInput) as error:
            resolve_tp(degree, {"text_encoder": QWEN_7B}, sp, machine)
        assert str(error.value) == f"tp_size: {degree} does not divide {reason}"
    with pytest.raises(InvalidInput, match=r"take one of \[1, 2\]"):
        resolve_tp(4, {"text_encoder": UMT5_XXL}, 2, machine)
    with pytest.raises(InvalidInput, match="no text encoder"):
        resolve_tp(2, {"text_encoder": {"model_type": "clip_text_model"}}, 2, machine)
    assert EncoderShape("x", 1, 8, 6, 4, 4, 2, 64).divides == 2
