"""Choosing a layout: predictions against numbers worked out by hand, the command, and the profile that serve takes."""

import json
import math
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from tiny_flux import build_tiny_flux
from tiny_wan import DEMO

from bench import parallel
from launch.cli import main
from launch.observe import TUNE, read_mesh_file, sweep_dead_folders
from launch.options import take_in
from launch.process import child_environment
from launch.sizes import read_weights
from launch.tune import write_profile
from runtime import traffic
from runtime.config import Config
from runtime.errors import InvalidInput, StartFailed
from runtime.layout import Layout
from runtime.machine import Machine, load_machine
from runtime.models.card import card_for, read_configs
from runtime.sampling import SamplingParams
from runtime.traffic import Work, step_traffic
from runtime.tune import GIB, Candidate, Tuner, Weights, crossover, crossovers, gib, layouts, why

WORK = Work(tokens=1000, width=64, heads=4, attentions=3, branches=2, latents=4000)
SHAPE = SamplingParams(prompt="a", height=720, width=1280, num_frames=81, guidance_scale=5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A 14-billion Wan without its weights: configs, and safetensors files that end after their headers."""
    place = tmp_path_factory.mktemp("wan14b")
    for part in ("scheduler", "tokenizer", "text_encoder", "transformer", "vae"):
        (place / part).mkdir()
        for file in (DEMO / part).glob("*.json"):
            (place / part / file.name).write_text(file.read_text())
    (place / "model_index.json").write_text((DEMO / "model_index.json").read_text())
    edit(place / "transformer", num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824)
    edit(place / "transformer", in_channels=16, out_channels=16, patch_size=[1, 2, 2])
    edit(place / "vae", base_dim=96, decoder_base_dim=None, patch_size=None)
    edit(place / "vae", scale_factor_spatial=8, scale_factor_temporal=4)
    wide, ffn = [5120, 5120], [13824, 5120]
    denoiser = {f"blocks.{i}.attn{a}.to_{x}.weight": wide for i in range(40) for a in (1, 2) for x in "qkvo"}
    denoiser |= {f"blocks.{i}.ffn.{x}.weight": ffn for i in range(40) for x in (0, 2)}
    write_header(place / "transformer" / "diffusion_pytorch_model.safetensors", denoiser)
    write_header(place / "text_encoder" / "model.safetensors", {"shared.weight": [5_700_000, 1000]})
    write_header(place / "vae" / "diffusion_pytorch_model.safetensors", {"decoder": [127_000_000]})
    return place


def edit(component, **values):
    file = component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write_header(file, shapes):
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    words = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    file.write_bytes(struct.pack("<Q", len(words)) + words)


def tuner(folder, machine):
    configs = read_configs(folder)
    constants = load_machine(machine) if isinstance(machine, str) else machine
    return Tuner(card_for(configs), configs, read_weights(folder, constants.element, {}), constants)


# ---- bytes -------------------------------------------------------------------------------------------------------


def test_sizes_are_read_from_headers(folder):
    weights = read_weights(folder, 2, {})
    assert weights.blocks == 40
    block = 2 * (8 * 5120**2 + 2 * 13824 * 5120)
    assert weights.denoiser == 40 * block
    # The encoder of this folder is all root, and whole while it encodes.
    assert weights.gathered == weights.encoders > 3 * block
    assert weights.encoders == 2 * 5.7e9
    assert weights.vae == 4 * 127e6
    assert weights.row_bytes == {5120: 2 * 40 * 8 * 5120, 13824: 2 * 40 * 2 * 5120}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(1, 1, 1), {}),
        # 3 attentions, 2 branches, 500 tokens, 64 wide, 4 bytes; q, k, v and the output; half of each leaves the rank.
        (Layout(1, 1, 2), {"all_to_all": 4 * 3 * 2 * 500 * 64 * 4 / 2, "all_gather": 2 * 500 * 4 * 4}),
        # Keys and values of a quarter of the tokens, three hops.
        (Layout(1, 4, 1), {"exchange": 2 * 3 * 2 * 250 * 64 * 4 * 3, "all_gather": 2 * 250 * 4 * 4 * 3}),
        # One branch per group; its prediction goes to the other group.
        (Layout(2, 1, 1), {"all_gather": 4000 * 4}),
        (
            Layout(2, 2, 2),
            {
                "all_to_all": 4 * 3 * 250 * 64 * 4 / 2,
                "exchange": 2 * 3 * 250 * 64 * 4,
                "all_gather": 250 * 4 * 4 * 3 + 4000 * 4,
            },
        ),
    ],
)
def test_traffic_by_hand(layout, expected):
    moved = step_traffic(WORK, layout, 4)
    assert {k: getattr(moved, k) for k in ("all_to_all", "exchange", "all_gather", "weights") if getattr(moved, k)} == (
        pytest.approx(expected)
    )
    assert moved.total == pytest.approx(sum(expected.values()))


def test_sharded_weights_travel_once_per_forward():
    whole = 8e6
    assert step_traffic(WORK, Layout(1, 1, 4), 4, weight_bytes=whole, blocks=8).weights == whole * 3 / 4
    long = msgspec.structs.replace(WORK, tokens=traffic.JOINT_TOKENS)
    # Too many tokens for a joint forward: one for each branch, and so are the gathers.
    assert step_traffic(long, Layout(1, 1, 4), 4, weight_bytes=whole, blocks=8).weights == 2 * whole * 3 / 4
    assert step_traffic(long, Layout(2, 1, 2), 4, weight_bytes=whole, blocks=8).weights == whole * 3 / 4
    # A request on every rank: its layout moves nothing, the weights move all the same.
    assert step_traffic(WORK, Layout(), 4, weight_bytes=whole, blocks=8, shards=4).total == whole * 3 / 4


def test_sharded_weights_travel_padded_to_equal_parts(folder):
    on = tuner(folder, "h100-nvlink")
    on = replace(on, weights=msgspec.structs.replace(on.weights, denoiser=100.0, row_bytes={1: 6, 8: 5, 18: 3}))
    filled = {1: 100, 2: 100 + 6, 4: 100 + 3 * 6 + 2 * 3, 8: 100 + 7 * 6 + 6 * 3}
    assert {shards: on.weights.filled_up(shards) for shards in filled} == filled
    sharded = on.predict(Candidate(Layout(1, 1, 4), fsdp=True), on.card.check(replace(SHAPE, num_inference_steps=1)))
    passes = sharded.traffic.calls["weights"] // 41
    assert sharded.traffic.weights == passes * 124 * 3 / 4


# ---- the ranking -------------------------------------------------------------------------------------------------


def test_every_layout_is_listed_once():
    found = layouts(8, WORK)
    assert len(found) == len(set(found))
    assert all(layout.num_ranks == 8 and layout.cfg <= 2 and layout.ulysses <= 4 for layout in found)
    assert {(x.cfg, x.ring, x.ulysses) for x in found} == {
        (1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 4, 1), (2, 2, 2), (2, 1, 4)
    }  # fmt: skip
    assert layouts(2, msgspec.structs.replace(WORK, branches=1)) == [Layout(1, 2, 1), Layout(1, 1, 2)]
    few = msgspec.structs.replace(WORK, tokens=3)
    assert all(layout.sp <= 3 for layout in layouts(4, few))


def test_a_perfect_machine_divides_the_step_by_the_ranks(folder):
    """Without latency and with an endless link only the work is left."""
    machine = Machine("ideal", 4e14, 1e30, 1e30, 1e30, 0.0, 0.0)
    ideal = tuner(folder, machine)
    params = ideal.card.check(SHAPE)
    one = ideal.rank(params, 1)[0]
    assert one.seconds == pytest.approx(ideal.card.step_flops(params) / 4e14, rel=1e-6)
    for prediction in ideal.rank(params, 8):
        assert prediction.seconds == pytest.approx(one.seconds / 8, rel=1e-3), str(prediction.candidate)


def test_a_slow_link_hides_in_ring_and_a_fast_one_favours_ulysses(folder):
    for machine, winner in (("h100-nvlink", "ulysses"), ("h100-pcie", "ring")):
        on = tuner(folder, machine)
        best = on.rank(on.card.check(SHAPE), 8)[0]
        assert best.fits
        assert best.candidate.layout.cfg == 2, "the guidance branches exchange next to nothing"
        assert getattr(best.candidate.layout, winner) == 4
        assert not best.candidate.fsdp


def test_what_does_not_fit_is_last_and_fsdp_makes_it_fit(folder):
    on = tuner(folder, "h100-nvlink")
    params = on.card.check(SHAPE)
    small = Tuner(on.card, on.configs, on.weights, msgspec.structs.replace(on.machine, memory=48 * GIB))
    ranked = small.rank(params, 8)
    assert ranked[0].candidate.fsdp
    assert [p.fits for p in ranked] == sorted((p.fits for p in ranked), reverse=True)
    assert not any(p.fits for p in ranked if not p.candidate.fsdp)
    assert "would be faster but needs" in why(ranked)
    whole = next(p for p in ranked if p.candidate == Candidate(ranked[0].candidate.layout))
    spared = (on.weights.denoiser + on.weights.encoders) * 7 / 8 - on.weights.gathered
    assert whole.memory - ranked[0].memory == pytest.approx(spared)
    tiny = Tuner(on.card, on.configs, on.weights, msgspec.structs.replace(on.machine, memory=4 * GIB))
    assert why(tiny.rank(params, 8)).startswith("nothing fits: the smallest, ")


def test_the_crossover_is_where_the_predictions_cross(folder):
    on = tuner(folder, "h100-pcie")
    shapes = [on.card.check(replace(SHAPE, height=h, width=h)) for h in (128, 256, 512, 768, 1024, 2048)]
    tokens, shape = crossover(on, shapes, 8, lambda x: x.ring > 1, lambda x: x.ring == 1)
    before = shapes[shapes.index(shape) - 1]
    for params, ring_wins in ((before, False), (shape, True)):
        times = {True: math.inf, False: math.inf}
        for p in on.rank(params, 8):
            if not p.candidate.fsdp:
                ring = p.candidate.layout.ring > 1
                times[ring] = min(times[ring], p.seconds)
        assert (times[True] < times[False]) == ring_wins
    assert tokens == on.card.tokens(shape)
    lines = crossovers(on, shapes, shapes[-1], 8)
    assert "layouts with ring beat those without from about" in lines[0]
    assert "FSDP becomes necessary on ranks of less than" in lines[1]


def test_no_crossover_is_told_where_there_is_none():
    demo = tuner(DEMO, "cpu-gloo")
    shape = demo.card.check(SamplingParams(prompt="a"))
    # Seven ranks share four heads in no way.
    only, _ = crossovers(demo, [shape], shape, 7)
    assert only == "layouts with ring are the only ones for 7 ranks and these heads"
    # A block on its way with its buffer is more than half of a model of two blocks.
    small = Tuner(demo.card, demo.configs, Weights(10e6, 8e6, 2, 0, 0), demo.machine)
    _, useless = crossovers(small, [shape], shape, 2)
    assert useless.startswith("FSDP saves no memory here: ")
    # Nor does one of which two figures would look the same.
    small = Tuner(demo.card, demo.configs, Weights(10e6, 4.99e6, 2, 0, 0), demo.machine)
    _, useless = crossovers(small, [shape], shape, 2)
    assert useless.startswith("FSDP saves no memory here: ")


def test_bytes_are_written_with_three_digits_that_tell():
    sizes = (0, 300 << 10, 102.3 * 2**20, 0.2 * GIB, 1000 * 2**20, 1.13 * GIB, 1.09 * GIB, 50.8 * GIB, 1300 * GIB)
    expected = ["0 MiB", "0.293 MiB", "102 MiB", "205 MiB", "1000 MiB", "1.13 GiB", "1.09 GiB", "50.8 GiB", "1300 GiB"]
    assert [gib(size) for size in sizes] == expected


def test_weights_that_are_read_bound_a_small_step(folder):
    """One small picture: the step takes as long as reading the weights once, whatever the FLOPs."""
    on = tuner(folder, "h100-nvlink")
    params = on.card.check(replace(SHAPE, height=64, width=64, num_frames=1))
    assert on.rank(params, 1)[0].seconds == pytest.approx(on.weights.denoiser / on.machine.memory_bandwidth)


BENCH = Path(__file__).parents[1] / "bench" / "results"


def test_the_shipped_constants_of_cpus_predict_what_was_measured_on_two_quiet_cores():
    """Layouts of 2,048 tokens side by side, and a step of the demo model, by the committed results."""
    measured = json.loads((BENCH / "parallel.json").read_text())["layouts"]
    block = 4 * (8 * 384**2 + 2 * 384 * parallel.FFN)
    weights = Weights(denoiser=3 * block, gathered=3 * block, blocks=3, encoders=0, vae=0)
    on = Tuner(parallel.card(), parallel.CONFIGS, weights, load_machine("cpu-gloo"))
    params = on.card.check(replace(SHAPE, height=256, width=256, num_frames=29))
    every = [p for p in on.rank(params, 2) if not p.candidate.fsdp]
    times = [measured[str(p.candidate.layout)]["seconds_per_step"]["median"] for p in every]
    assert len(times) == 3
    assert times[0] == min(times), "the layout that is chosen is the fastest in truth"
    for prediction, seconds in zip(every, times, strict=True):
        assert prediction.seconds / every[0].seconds == pytest.approx(seconds / times[0], rel=0.1)
    units = json.loads((BENCH / "constants_demo_2ranks.json").read_text())["units"]
    demo = tuner(DEMO, "cpu-gloo")
    step = demo.predict(Candidate(Layout(1, 1, 2)), demo.card.check(SamplingParams(prompt="a"))).seconds
    assert step == pytest.approx(units["denoise 64x64x17 branches=2 ranks=2 batch=1"]["seconds"], rel=0.25)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(folder, tmp_path, capsys):
    file = tmp_path / "profile.json"
    shape = ["--height", "720", "--width", "1280", "--num-frames", "81", "--machine", "h100-nvlink"]
    words = ["tune", "--model-path", str(folder), "--num-gpus", "8", *shape, "--dry-run", "--profile-file", str(file)]
    assert main(words) == 0
    return file


def test_a_dry_run_prints_the_table_and_writes_the_profile(tuned, capsys):
    out = " ".join(capsys.readouterr().out.split())
    assert "* cfg2 x ulysses4 4.125 50.8 GiB" in out
    assert "wins with" in out
    assert "FSDP becomes necessary" in out
    profile = json.loads(tuned.read_text())
    assert profile["flags"]["num_gpus"] == 8
    assert (profile["flags"]["cfg_parallel_size"], profile["flags"]["ulysses_degree"]) == (2, 4)
    assert profile["machine"]["name"].startswith("H100 SXM")
    times = [row["predicted_s"] for row in profile["layouts"]]
    assert times == sorted(times)
    assert all(row["measured_s"] is None for row in profile["layouts"])


def settings(*words, environ=None):
    intake = take_in(["serve", *words], environ or {})
    return {name: setting.values[0] for name, setting in intake.settings.items()}, intake.notes


def test_serve_takes_the_profile_and_what_is_said_by_hand_wins(tuned, folder):
    chosen, notes = settings("--profile-file", str(tuned))
    assert notes == []
    assert chosen == {
        "model_path": str(folder),
        "num_gpus": "8",
        "ring_degree": "1",
        "ulysses_degree": "4",
        "enable_cfg_parallel": "True",
        "cfg_parallel_size": "2",
    }
    chosen, notes = settings("--profile-file", str(tuned), "--model-path", "demo")
    assert "model_path" not in chosen
    assert chosen["ulysses_degree"] == "4"
    assert notes == [f"note: model_path: demo by hand wins over {folder} of the profile"]


@pytest.fixture
def edited(tuned):
    """A function that changes flags in the profile."""

    def edit(**flags):
        profile = json.loads(tuned.read_text())
        tuned.write_text(json.dumps(profile | {"flags": profile["flags"] | flags}))
        return str(tuned)

    return edit


def test_half_a_layout_is_not_taken(edited):
    profile = edited(use_fsdp_inference=True)
    chosen, notes = settings("--profile-file", profile, environ={"FRAMEMESH_NUM_GPUS": "4"})
    assert chosen["num_gpus"] == "4"
    assert not {"ulysses_degree", "use_fsdp_inference"} & chosen.keys()
    assert notes[0] == "note: num_gpus: 4 by hand wins over 8 of the profile"
    assert "ulysses_degree, use_fsdp_inference of the profile belong to its own layout and are left out" in notes[1]


def test_weights_may_be_sharded_in_the_layout_of_a_profile(tuned):
    chosen, notes = settings("--profile-file", str(tuned), "--use-fsdp-inference")
    assert (chosen["ulysses_degree"], notes) == ("4", [])


def test_a_revision_goes_with_its_model(edited):
    profile = edited(model_path="someone/else", revision="v2")
    chosen, notes = settings("--profile-file", profile)
    assert (chosen["model_path"], chosen["revision"], notes) == ("someone/else", "v2", [])
    chosen, (_, left_out) = settings("--profile-file", profile, "--model-path", "demo")
    assert "revision" not in chosen
    assert left_out == "note: revision of the profile belong to its own model and are left out"


def test_a_profile_starts_a_server_with_its_layout(tmp_path, monkeypatch, capsys):
    file = tmp_path / "profile.json"
    words = ["tune", "--num-gpus", "2", "--guidance-scale", "1", "--dry-run", "--machine", "h100-nvlink"]
    assert main([*words, "--profile-file", str(file)]) == 0
    capsys.readouterr()
    assert main(["serve", "--profile-file", str(file), "--port", "0", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    best = json.loads(file.read_text())["flags"]
    assert plan["layout"] == {"cfg": 1, "ring": best["ring_degree"], "ulysses": best["ulysses_degree"], "ranks": 2}


@pytest.mark.parametrize(
    ("content", "words"), [("{}", "is no profile"), ("[", "is no profile"), ('{"flags": {"nonsense": 1}}', "nonsense")]
)
def test_a_bad_profile_is_refused(tmp_path, content, words):
    file = tmp_path / "p.json"
    file.write_text(content)
    with pytest.raises(InvalidInput, match=words):
        settings("--profile-file", str(file))
    with pytest.raises(InvalidInput, match="cannot be read"):
        settings("--profile-file", str(tmp_path / "none.json"))


def test_bad_machines_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="none of cpu-gloo, h100-nvlink, h100-pcie"):
        load_machine("h200")
    file = tmp_path / "m.json"
    file.write_text(json.dumps(msgspec.to_builtins(load_machine("cpu-gloo")) | {"link_bandwidth": 0}))
    with pytest.raises(InvalidInput, match="link_bandwidth is 0"):
        load_machine(str(file))
    file.write_text("{}")
    with pytest.raises(InvalidInput, match="missing required field"):
        load_machine(str(file))


def test_what_cannot_fit_exits_with_1_and_writes_nothing(folder, tmp_path, capsys):
    machine = tmp_path / "small.json"
    machine.write_text(json.dumps(msgspec.to_builtins(load_machine("h100-pcie")) | {"memory": 1e9}))
    file = tmp_path / "p.json"
    words = ["tune", "--model-path", str(folder), "--num-gpus", "2", "--dry-run", "--machine", str(machine)]
    assert main([*words, "--profile-file", str(file)]) == 1
    assert "nothing fits" in capsys.readouterr().out
    assert not file.exists()
    assert Weights(0, 0, 0, 0, 0).blocks == 0


def test_a_machine_on_which_nothing_runs_has_no_winner_and_keeps_its_profile(tmp_path, monkeypatch, capsys):
    reasons = iter(["rank 1 [gloo] ran out of memory", *["it took too long"] * 9])

    def refuse(*_):
        raise StartFailed(next(reasons))

    monkeypatch.setattr("launch.tune._seconds_per_step", refuse)
    file = tmp_path / "profile.json"
    file.write_text("of an earlier run")
    words = ["tune", "--num-gpus", "2", "--machine", "cpu-gloo", "--profile-file", str(file)]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "no layout ran: rank 1 [gloo] ran out of memory\n" in out
    assert "refused" in out
    assert not {"*", "wins"} & set(out.split())
    assert file.read_text() == "of an earlier run"


def test_the_only_layout_that_runs_wins(tmp_path, monkeypatch, capsys):
    tried = []

    def only_the_second(_config, _folder, _params, candidate):
        tried.append(candidate)
        if len(tried) != 2:
            raise StartFailed("rank 1 left")
        return 0.5

    monkeypatch.setattr("launch.tune._seconds_per_step", only_the_second)
    file = tmp_path / "profile.json"
    words = ["tune", "--num-gpus", "2", "--machine", "cpu-gloo", "--profile-file", str(file)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"measured: {tried[1]} wins with 0.5 s per step\n" in out
    assert f"predicted: {tried[0]} wins with " in out
    rows = json.loads(file.read_text())["layouts"]
    assert [row["layout"] for row in rows if row["measured_s"] is not None] == [str(tried[1])]


def test_the_measured_winner_is_told_with_what_was_measured(tmp_path, monkeypatch, capsys):
    """Also where it is the predicted one: seconds on paper beside a measured table would contradict it."""
    times = iter([0.5, 0.7])
    monkeypatch.setattr("launch.tune._seconds_per_step", lambda *_: next(times))
    file = tmp_path / "profile.json"
    words = ["tune", "--num-gpus", "2", "--machine", "cpu-gloo", "--measure", "2", "--profile-file", str(file)]
    assert main(words) == 0
    first, second = (row["layout"] for row in json.loads(file.read_text())["layouts"] if row["measured_s"] is not None)
    assert f"measured: {first} wins with 0.5 s per step; {second} takes 40.0% longer\n" in capsys.readouterr().out


def test_a_profile_names_the_revision_that_was_tuned(tmp_path):
    file, demo = tmp_path / "p.json", tuner(DEMO, "cpu-gloo")
    config, params = Config(model_path="a/b", revision="v2", num_gpus=2), demo.card.check(SamplingParams(prompt="a"))
    ranked = demo.rank(params, 2)
    write_profile(file, config, params, demo, ranked, {}, ranked[0])
    assert json.loads(file.read_text())["flags"].items() >= {"model_path": "a/b", "revision": "v2"}.items()


def test_an_image_model_is_tuned_with_and_without_its_guidance_branches(tmp_path, capsys):
    folder, file = build_tiny_flux(tmp_path / "flux"), tmp_path / "p.json"
    words = ["tune", "--model-path", str(folder), "--num-gpus", "2", "--dry-run", "--machine", "h100-nvlink"]
    for scale, branches in (("4", 2), ("1", 1)):
        assert main([*words, "--true-cfg-scale", scale, "--profile-file", str(file)]) == 0
        layouts = {row["layout"] for row in json.loads(file.read_text())["layouts"]}
        assert ("cfg2" in layouts) == (branches == 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_it_measures_leaves_nothing_behind(number, short_tmp):
    """The mesh is stopped and the folder gone; after a SIGKILL the next start sweeps it."""
    program = """
import sys, time, launch.generator
from launch.cli import main
class Mesh:
    def __init__(self, config, folder): pass
    def __enter__(self): return self
    def __exit__(self, *_): print("stopped", flush=True)
    def generate(self, params):
        print("up", flush=True)
        time.sleep(60)
launch.generator.Generator = Mesh
sys.exit(main(["tune", "--machine", "cpu-gloo"]))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, env=child_environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=short_tmp
    ) as process:
        assert process.stdout.readline() == "up\n"
        (place,) = short_tmp.glob("framemesh-*")
        assert read_mesh_file(place).role == TUNE
        assert main(["jobs"]) == 1, "it is no mesh"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    if number == signal.SIGKILL:
        sweep_dead_folders()
    else:
        assert (process.returncode, out) == (130, "stopped\n")
        assert "Traceback" not in err
    assert not place.exists()


@pytest.mark.slow
def test_measuring_times_real_meshes(tmp_path, capsys):
    file = tmp_path / "profile.json"
    words = ["tune", "--num-gpus", "2", "--measure", "1", "--num-frames", "5", "--machine", "cpu-gloo"]
    assert main([*words, "--profile-file", str(file)]) == 0
    (timed,) = [row for row in json.loads(file.read_text())["layouts"] if row["measured_s"] is not None]
    assert 0 < timed["measured_s"] < 10
    assert "s per step" in capsys.readouterr().err
