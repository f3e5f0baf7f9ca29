"""What a mesh gets when nobody asks for a layout: the prediction's best, with what was said beside it, and why."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from tiny_wan import DEMO, load_pipeline, reference

from launch import sizes
from launch.cli import main
from launch.sizes import read_weights, settle_layout, tuner_for
from runtime.choice import choose
from runtime.config import Config, fit_layout, load_frozen, save_frozen
from runtime.errors import InvalidInput
from runtime.layout import Layout
from runtime.machine import load_machine
from runtime.models.card import card_for, most_branches, read_configs, usual_request
from runtime.sampling import SamplingParams
from runtime.traffic import work_of
from runtime.tune import GIB, Candidate, Tuner, Weights, layouts

WAN = {
    "model_index": {"_class_name": "WanPipeline"},
    "transformer": {
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "num_layers": 40,
        "ffn_dim": 13824,
        "text_dim": 4096,
        "in_channels": 16,
        "patch_size": [1, 2, 2],
    },
    "vae": {"base_dim": 96},
}
FLUX = {
    "model_index": {"_class_name": "FluxPipeline"},
    "transformer": {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 19,
        "num_single_layers": 38,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "guidance_embeds": True,
    },
    "vae": {"block_out_channels": [128, 256, 512, 512]},
}
QWEN = {
    "model_index": {"_class_name": "QwenImagePipeline"},
    "transformer": {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 60,
        "in_channels": 64,
        "joint_attention_dim": 3584,
    },
    "vae": {"temperal_downsample": [False, True, True]},
}
FAMILIES = {
    "wan": (WAN, Weights(denoiser=28e9, gathered=2.1e9, blocks=40, encoders=11e9, vae=0.5e9)),
    "flux": (FLUX, Weights(denoiser=24e9, gathered=1.8e9, blocks=57, encoders=10e9, vae=0.3e9)),
    "qwen": (QWEN, Weights(denoiser=41e9, gathered=2.1e9, blocks=60, encoders=16e9, vae=0.5e9)),
}
"""Of real sizes, in bf16."""


def tuner(family, machine="h100-nvlink", **constants):
    configs, weights = FAMILIES[family]
    on = msgspec.structs.replace(load_machine(machine), **constants)
    return Tuner(card_for(configs), configs, weights, on)


def chosen(on, **config):
    """(configuration, lines) of a choice for a usual request."""
    return choose(Config(**config), on, on.card.check(usual_request()))


# ---- the choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["h100-nvlink", "h100-pcie", "cpu-gloo"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_layout_is_predicted_to_be_faster(family, num_ranks, machine):
    on = tuner(family, machine, memory=1000 * GIB)
    config, (line,) = chosen(on, num_gpus=num_ranks)
    params = on.card.check(usual_request())
    taken = on.predict(Candidate(config.layout), params)
    every = [on.predict(Candidate(x), params) for x in layouts(num_ranks, work_of(on.card, on.configs, params))]
    assert taken.seconds == min(p.seconds for p in every)
    assert len(every) > 1
    assert not config.use_fsdp_inference, "weights that fit are not sent around"
    assert not config.layout_is_open
    assert f"{taken.candidate} wins with {taken.seconds:.3g} s per step" in line
    assert on.machine.name in line
    # What was chosen is what the family's own refusals let pass.
    assert fit_layout(config, on.card, most_branches(on.card)) == config


@pytest.mark.parametrize(
    ("family", "cfg"),
    # FLUX.1's guidance is an input of the model; Qwen-Image's and Wan's are branches.
    [("wan", 2), ("flux", 1), ("qwen", 2)],
)
def test_guidance_branches_go_apart_where_a_usual_request_has_them(family, cfg):
    config, _ = chosen(tuner(family), num_gpus=2)
    assert (config.layout.cfg, config.layout.sp) == (cfg, 2 // cfg)


def test_a_model_that_is_not_guided_gets_no_guidance_groups():
    on = tuner("wan")
    quiet = {**on.configs, "framemesh": {"defaults": {"guidance_scale": 1.0}}}
    on = replace(on, configs=quiet, card=card_for(quiet))
    for num_ranks in (2, 4, 8):
        assert chosen(on, num_gpus=num_ranks)[0].layout.cfg == 1


def test_slow_links_change_the_choice():
    fast, _ = chosen(tuner("wan"), num_gpus=8)
    slow, (line,) = chosen(tuner("wan", link_bandwidth=5e10), num_gpus=8)
    assert fast.layout == Layout(2, 1, 4)
    assert slow.layout == Layout(2, 4, 1), "a hop of ring hides behind the kernel"
    assert "mostly for ulysses" in line


def test_weights_are_sharded_only_where_nothing_else_fits():
    on = tuner("wan", memory=80 * GIB)
    params = on.card.check(usual_request())
    whole = min(on.memory(c, params) for c in on.candidates(params, 8) if not c.fsdp)
    sharded = min(on.memory(c, params) for c in on.candidates(params, 8) if c.fsdp)
    assert not chosen(on, num_gpus=8)[0].use_fsdp_inference
    small = tuner("wan", memory=(whole + sharded) / 2)
    config, (line,) = chosen(small, num_gpus=8)
    assert config.use_fsdp_inference
    assert "would be faster but needs" in line
    # The same with staged transfers, which cannot gather shards.
    config, (_, warning) = chosen(small, num_gpus=8, dist_backend="staged")
    assert not config.use_fsdp_inference
    assert warning.startswith("warning: ")


def test_where_nothing_fits_the_least_is_taken_with_a_warning_that_says_what_would():
    on = tuner("wan", memory=16 * GIB)
    params = on.card.check(usual_request())
    config, (line, warning) = chosen(on, num_gpus=2)
    least = min(on.rank(params, 2), key=lambda p: p.memory)
    assert Candidate(config.layout, config.use_fsdp_inference) == least.candidate
    assert "nothing fits: the smallest, " in line
    assert warning.startswith(f"warning: a rank has 16.0 GiB, so {least.candidate} may run out of memory; ")
    enough = int(warning.partition("; ")[2].split()[0])
    assert on.rank(params, enough)[0].fits
    assert not on.rank(params, enough // 2)[0].fits
    _, (_, warning) = chosen(tuner("wan", memory=1 * GIB), num_gpus=2)
    assert "a smaller model would do" in warning


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ({"tp_size": 2}, lambda layout: layout.sp % 2 == 0),
        ({"sp_engine": "yunchang"}, lambda layout: layout.sp > 1),
    ],
)
def test_what_was_said_beside_the_layout_keeps_something_to_do(said, holds):
    for num_ranks in (2, 4):
        config, _ = chosen(tuner("wan"), num_gpus=num_ranks, **said)
        assert holds(config.layout)
        assert not config.layout_is_open
    assert chosen(tuner("wan"), num_gpus=2)[0].layout.sp == 1


def test_what_no_layout_can_do_is_left_to_its_own_refusal():
    assert chosen(tuner("wan"), num_gpus=2, tp_size=3) == (Config(num_gpus=2, tp_size=3), ())


def test_more_ranks_than_anything_to_share_are_told_of():
    on = Tuner(card_for(read_configs(DEMO)), read_configs(DEMO), Weights(1, 1, 1, 1, 1), load_machine("cpu-gloo"))
    config, (warning,) = chosen(on, num_gpus=97)
    assert config == Config(num_gpus=97)
    assert warning.startswith("warning: no layout chosen for 64x64, 17 frames: 97 ranks cannot share 80 tokens")


# ---- what was asked for ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return card_for(read_configs(DEMO))


@pytest.mark.parametrize(
    ("said", "layout"),
    [
        ({"ulysses_degree": 2}, Layout(1, 2, 2)),
        ({"ring_degree": 4}, Layout(1, 4, 1)),
        ({"sp_degree": 4}, Layout(1, 1, 4)),
        ({"enable_cfg_parallel": True}, Layout(2, 1, 2)),
        ({"enable_cfg_parallel": False}, Layout(1, 1, 4)),
        ({"cfg_parallel_size": 1}, Layout(1, 1, 4)),
        ({"use_fsdp_inference": True}, Layout(1, 1, 4)),
        ({"use_fsdp_inference": False}, Layout(1, 1, 4)),
    ],
)
def test_what_was_asked_for_wins_and_the_rest_is_derived(demo, said, layout):
    config, why = settle_layout(Config(num_gpus=4, **said), DEMO, demo)
    assert config.layout == layout
    assert all(line.startswith("text encoders: ") for line in why), "nobody chose the layout"
    assert config.use_fsdp_inference is said.get("use_fsdp_inference")


def test_sharded_weights_need_equally_many_forwards_on_every_rank(demo):
    config = Config(num_gpus=2, cfg_parallel_size=2, use_fsdp_inference=True)
    assert fit_layout(config, demo, 2).layout == Layout(2, 1, 1)
    with pytest.raises(InvalidInput, match=r"3 guidance branches on cfg\(2\) groups are unequal numbers of forwards"):
        fit_layout(config, demo, 3)


def test_the_launcher_decides_how_many_ranks_share_the_text_encoders(demo, monkeypatch):
    """A prompt on these links costs nothing to share; where SP has one rank there is nobody to share it with."""
    machine = msgspec.structs.replace(load_machine("h100-nvlink"), link_bandwidth=1e15, link_latency=0.0, launch=0.0)
    monkeypatch.setattr(sizes, "this_machine", lambda config: machine)
    config, (line,) = settle_layout(Config(num_gpus=2, ulysses_degree=2), DEMO, demo)
    assert config.tp_size == 2
    assert line.startswith("text encoders: tp_size 2 by prediction")
    assert settle_layout(Config(num_gpus=2, enable_cfg_parallel=True), DEMO, demo)[0].tp_size == 1
    assert settle_layout(Config(num_gpus=2, ulysses_degree=2, tp_size=1), DEMO, demo)[0].tp_size == 1
    sharded = settle_layout(Config(num_gpus=2, use_fsdp_inference=True), DEMO, demo)[0]
    assert sharded.tp_size is None


def test_one_rank_has_nothing_to_choose(demo):
    assert settle_layout(Config(), DEMO, demo) == (Config(), ())


def test_every_process_gets_the_integers_that_were_chosen(demo, tmp_path):
    config, _ = settle_layout(Config(num_gpus=4), DEMO, demo)
    save_frozen(config, tmp_path / "config.json")
    loaded = load_frozen(tmp_path / "config.json")
    assert loaded.layout == config.layout
    assert not loaded.layout_is_open
    # What scheduler and ranks do with it, and a second launcher's half.
    assert fit_layout(loaded, demo, most_branches(demo)) == loaded
    assert settle_layout(loaded, DEMO, demo) == (loaded, ())


def test_by_hand_scheduler_and_ranks_derive_the_same(demo):
    """Nobody chooses under bare torchrun: both read the configuration as it was written."""
    assert fit_layout(Config(num_gpus=8), demo, most_branches(demo)).layout == Layout(1, 2, 4)


def test_memory_is_shared_by_all_ranks_of_the_host(demo):
    alone, beside = (tuner_for(Config(num_gpus=2, replicas=n, device="cpu"), DEMO, demo).machine for n in (1, 3))
    assert beside.memory == pytest.approx(alone.memory / 3)
    assert tuner_for(Config(num_gpus=2, device="cpu", dit_precision="bf16"), DEMO, demo).machine.element == 2


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", b"\xff" * 64, b"\2\0\0\0\0\0\0\0[]"])
def test_weights_that_are_none_are_refused_by_name(tmp_path, content):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"model\.safetensors cannot be read as safetensors") as caught:
        read_weights(tmp_path, 4, {})
    assert caught.value.field == "model_path"


# ---- the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["serve", "--port", "0"], ["mesh"], ["generate", "--prompt", "a"]])
def test_a_start_says_why(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--num-gpus", "2", "--device", "cpu", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["layout"] == {"cfg": 2, "ring": 1, "ulysses": 1, "ranks": 2}
    assert plan["why"][0] in err.splitlines()
    assert plan["why"][0].startswith("chosen for 64x64, 17 frames on one CPU core per rank")
    assert main([*words, "--num-gpus", "2", "--device", "cpu", "--dry-run", "--ulysses-degree", "2"]) == 0
    out, err = capsys.readouterr()
    (line,) = json.loads(out)["why"]
    assert line.startswith("text encoders: tp_size 1 by prediction"), "the two ranks could share them"
    assert line in err.splitlines()
    assert "chosen for" not in err


def test_tune_and_a_start_choose_alike(tmp_path, monkeypatch, capsys, demo):
    """With these constants: links so slow that any layout but guidance groups loses."""
    machine = msgspec.structs.replace(load_machine("cpu-gloo"), link_bandwidth=1e6, link_latency=0.0)
    monkeypatch.setattr(sizes, "this_machine", lambda config: machine)
    for num_ranks in (2, 3, 4):
        file = tmp_path / f"{num_ranks}.json"
        words = ["tune", "--num-gpus", str(num_ranks), "--dry-run", "--profile-file", str(file)]
        assert main(words) == 0
        said = capsys.readouterr().out
        config, (line, *_) = settle_layout(Config(num_gpus=num_ranks), DEMO, demo)
        flags = json.loads(file.read_text())["flags"]
        assert {name: getattr(config, name) for name in flags} == flags
        assert line.partition(": ")[2] in said


@pytest.mark.slow
def test_a_mesh_with_nothing_set_makes_what_diffusers_makes(capfd):
    """Guided and not: the ranks of the guidance groups join for a request that has one branch."""
    from framemesh import Generator

    case = {"prompt": "a red circle", "seed": 3, "height": 64, "width": 64, "num_frames": 5, "steps": 4}
    pipeline = load_pipeline(DEMO)
    with Generator.from_pretrained("demo", num_gpus=2, device="cpu") as generator:
        assert generator.config.layout == Layout(2, 1, 1)
        for guidance in (3.0, 1.0):
            params = SamplingParams(
                prompt=case["prompt"], seed=3, num_frames=5, num_inference_steps=4, guidance_scale=guidance
            )
            frames = generator.generate(params).frames.astype(int)
            pictures = reference(pipeline, case | {"guidance": guidance}, "pil")[0]
            expected = np.stack([np.asarray(picture) for picture in pictures]).astype(int)
            assert abs(frames - expected).max() <= 1, guidance
    said = capfd.readouterr().err
    assert "layout cfg(2) * ring(1) * ulysses(1) = 2 ranks" in said
    assert "cfg2 wins with" in said
