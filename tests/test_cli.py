"""The command line: what it means, what it refuses before anything starts, and how it ends."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from launch.cli import COMMANDS, main
from launch.flags import LATER
from launch.generator import Result
from launch.options import BOOLEANS, CONFIG, SAMPLING
from runtime.config import Config
from runtime.errors import StartFailed
from runtime.models.card import FAMILIES
from runtime.protocol import Usage
from runtime.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
DEMO = ROOT / "workers" / "demo" / "model"
EXAMPLES = [DATA / "seed_config.json", DATA / "seed_config.yaml"]
SMALL = ["--model-path", "demo", "--num-frames", "17", "--height", "64", "--width", "64"]


@pytest.fixture(autouse=True)
def clean_place(monkeypatch, tmp_path):
    """An empty working directory, and none of our variables."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("FRAMEMESH_", "SGLANG_")):
            monkeypatch.delenv(name)


@pytest.fixture
def started(monkeypatch):
    """What the command line would have started, in place of starting it."""
    calls = []
    module = types.ModuleType("launch.serve")

    def record(name):
        def start(*arguments):
            calls.append((name, *arguments))
            return 0

        return start

    for name in ("serve", "run_once", "generate_once"):
        setattr(module, name, record(name))
    monkeypatch.setitem(sys.modules, "launch.serve", module)
    return calls


@pytest.fixture
def meaning(started):
    """(Config, SamplingParams) that a `generate` command line stands for."""

    def of(*words):
        started.clear()
        assert main(["generate", *words]) == 0
        ((_, config, _, params, _, _),) = started
        return config, params

    return of


def refusal(capsys, words):
    """The error line of a refused command line; nothing may go to stdout."""
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.endswith(error + "\n")
    return error.removeprefix("error: ")


def shell(*words, **options):
    command = [sys.executable, "-P", "-m", "launch", *words]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False, **options)


# What reaches the commands


def test_serve_gets_the_config_and_the_folder(started):
    assert main(["serve", "--port", "0", "--num-gpus=2", "--ring-degree=2"]) == 0
    assert started == [("serve", Config(port=0, num_gpus=2, ring_degree=2, tp_size=1), DEMO)]


def test_run_gets_the_file_name_and_needs_no_save_output(started):
    assert main(["run", "--port=0", "--prompt", "a fox", "--output-file-name", "A curious fox.mp4"]) == 0
    ((name, config, folder, params, file_name),) = started
    assert (name, config, folder, file_name) == ("run_once", Config(port=0), DEMO, "A curious fox.mp4")
    assert params == SamplingParams(prompt="a fox")


@pytest.mark.parametrize(("words", "save"), [([], False), (["--save-output"], True), (["--no-save-output"], False)])
def test_generate_says_when_nothing_was_saved(started, capsys, words, save):
    assert main(["generate", "--prompt", "a fox", *words]) == 0
    assert started[0][-1] is save
    assert ("nothing was saved" in capsys.readouterr().err) is not save


def test_flags_take_dashes_underscores_and_equals(meaning):
    expected = meaning("--prompt", "a fox", "--num-gpus", "2", "--ulysses-degree", "2")
    assert expected[0] == Config(num_gpus=2, ulysses_degree=2, tp_size=1)
    assert meaning("--prompt=a fox", "--num_gpus=2", "--ulysses_degree=2") == expected
    assert meaning("--prompt", "a fox", "--num_gpus", "2", "--sp-size", "2", "--ulysses-degree=2") == (
        Config(num_gpus=2, ulysses_degree=2, sp_degree=2, tp_size=1),
        expected[1],
    )


def test_aliases_mean_the_setting(meaning):
    config, _ = meaning("--prompt", "a", "--num-gpus", "2", "--sp_size=2", "--precision", "fp16")
    assert (config.sp_degree, config.dit_precision) == (2, "fp16")


@pytest.mark.parametrize("prompt", ["-5 degrees", "--oh no", "true", "", "a = b", "füchse 🦊"])
def test_a_prompt_may_look_like_anything(meaning, prompt):
    _, params = meaning("--prompt", prompt or "x", "--negative-prompt", prompt, "--vae-tiling")
    assert params.negative_prompt == prompt


def test_a_documented_command_line_works_where_its_features_exist(meaning):
    config, params = meaning(
        *("--model-path", "demo", "--num-gpus", "4", "--ulysses-degree=4", "--ring-degree=1", "--tp-size=1"),
        *(
            "--pin-cpu-memory",
            "--dit-layerwise-offload",
            "false",
            "--backend",
            "sglang",
            "--prompt",
            "A curious raccoon",
        ),
        *("--save-output", "--output-path", "outputs", "--output-file-name", "A curious raccoon.mp4"),
    )
    assert config == Config(num_gpus=4, ulysses_degree=4, ring_degree=1, tp_size=1, backend="sglang")
    assert params == SamplingParams(prompt="A curious raccoon")


def test_lists_take_several_words(meaning):
    config, _ = meaning("--text-encoder-precisions", "fp16", "bf16", "--prompt", "a")
    assert config.text_encoder_precisions == ("fp16", "bf16")


def test_weights_are_several_words_and_are_checked(meaning, capsys):
    config, _ = meaning("--key-weights", "alice=2", "bob=0.5", "--prompt", "a")
    assert config.key_weights == ("alice=2", "bob=0.5")
    assert "key_weights: 'alice' is not NAME=WEIGHT" in refusal(capsys, ["serve", "--key-weights", "alice"])


def test_deterministic_is_a_flag_of_sampling(meaning):
    assert meaning("--prompt", "a", "--deterministic")[1].deterministic is True
    assert meaning("--prompt", "a", "--no-deterministic")[1].deterministic is False
    assert meaning("--prompt", "a")[1].deterministic is None


@pytest.mark.parametrize("command", [["serve"], ["mesh"], ["run", "--prompt", "a"], ["generate", "--prompt", "a"]])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ('[{"max_batch_size": 0}]', "rule 1 of rules.json: max_batch_size is 0"),
        ('[{"max_batch_size": 1, "max_cost": 3}]', "has max_cost, which does nothing here"),
        ('[{"max_batch": 1}]', "did you mean max_batch_size?"),
    ],
)
def test_a_wrong_batching_config_is_refused_before_anything_starts(started, capsys, command, text, said):
    if text is not None:
        Path("rules.json").write_text(text)
    error = refusal(capsys, [*command, "--batching-config", "rules.json"])
    assert error.startswith("batching_config: ")
    assert said in error
    assert started == []


def test_a_right_batching_config_reaches_the_config(meaning):
    Path("rules.yaml").write_text("- {max_batch_size: 2, device_memory_gb_min: 24, calibration: by hand}")
    assert meaning("--batching-config", "rules.yaml", "--prompt", "a")[0].batching_config == "rules.yaml"


def field(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


CONFIG_BOOLEANS = sorted(BOOLEANS & CONFIG.keys() - {"vae_config.load_decoder"})


@pytest.mark.parametrize("name", CONFIG_BOOLEANS)
@pytest.mark.parametrize("underscores", [False, True])
def test_every_boolean_works_in_every_spelling(meaning, name, underscores):
    word = name if underscores else name.replace("_", "-")
    yes = [[f"--{word}"], [f"--{word}", "true"], [f"--{word}=true"], [f"--{word}=True"], [f"--no-{word}=false"]]
    no = [[f"--no-{word}"], [f"--{word}", "false"], [f"--{word}=false"], [f"--{word}", "FALSE"]]
    for words, expected in [*((w, True) for w in yes), *((w, False) for w in no)]:
        for line in ([*words, "--prompt", "a fox"], ["--prompt", "a fox", *words]):
            config, params = meaning(*line, "--num-gpus", "2")
            assert field(config, name) is expected, line
            assert params.prompt == "a fox"


def test_the_remaining_booleans_work_in_every_spelling(capsys):
    rest = BOOLEANS - set(CONFIG_BOOLEANS) - LATER.keys()
    assert rest == {"vae_config.load_decoder", "deterministic", "save_output", "return_frames", "dry_run"}
    base = ["generate", "--prompt", "a", "--dry-run"]
    assert main([*base, "--vae-config.load-decoder", "true", "--save-output=true", "--return-frames", "false"]) == 0
    assert main([*base, "--no-return-frames", "--vae-config.load-decoder=true", "--no-save-output"]) == 0
    assert "load_decoder" in refusal(capsys, [*base, "--no-vae-config.load-decoder"])
    assert "return_frames" in refusal(capsys, [*base, "--return-frames", "--save-output"])
    assert '"maybe"' in refusal(capsys, [*base, "--no-vae-sp=maybe"])


@pytest.mark.parametrize("name", [name for name, later in LATER.items() if not later.takes_value])
def test_every_boolean_of_a_missing_feature_works_in_every_spelling(started, capsys, name):
    word = name.replace("_", "-")
    line = ["generate", "--prompt", "a"]
    for words in ([f"--no-{word}"], [f"--{word}", "false"], [f"--{word}=false"], [f"--{name}=False"]):
        assert main([*line, *words, "--seed", "1"]) == 0
    for words in ([f"--{word}"], [f"--{word}", "true"], [f"--{name}=true"]):
        if name == "pin_cpu_memory":
            assert main([*line, *words, "--seed", "1"]) == 0
        else:
            assert LATER[name].reason in refusal(capsys, [*line, *words, "--seed", "1"])


# Where a value comes from


def test_precedence_is_flag_environment_file_default(meaning, monkeypatch, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nfps: 1\nheight: 16\nvae_config:\n  tile_sample_min_height: 128\n")
    monkeypatch.setenv("FRAMEMESH_SEED", "2")
    monkeypatch.setenv("FRAMEMESH_FPS", "2")
    monkeypatch.setenv("FRAMEMESH_VAE_CONFIG_TILE_SAMPLE_MIN_WIDTH", "256")
    monkeypatch.setenv("FRAMEMESH_TEXT_ENCODER_PRECISIONS", "fp16,bf16")
    monkeypatch.setenv("FRAMEMESH_SP_SIZE", "1")
    monkeypatch.setenv("FRAMEMESH_OUTPUT_PATH", "")
    config, params = meaning("--config", str(file), "--prompt", "a", "--seed", "3", "--vae-config.load-encoder")
    assert (params.seed, params.fps, params.height, params.width) == (3, 2, 16, None)
    assert dataclasses.astuple(config.vae_config) == (True, True, 128, 256)
    assert config.text_encoder_precisions == ("fp16", "bf16")
    assert (config.sp_degree, config.output_path) == (1, "outputs")


def test_the_documented_examples_load_unchanged_and_mean_the_same(meaning, capsys):
    by_json, by_yaml = (meaning("--config", str(path), *SMALL) for path in EXAMPLES)
    assert by_json == by_yaml
    config, params = by_json
    assert (config.num_gpus, config.sp_degree, config.dit_precision, config.vae_precision) == (2, 2, "bf16", "fp16")
    assert config.text_encoder_precisions == ("fp16", "fp16")
    assert dataclasses.astuple(config.vae_config) == (False, True, 256, 256)
    assert (config.vae_tiling, config.vae_sp, config.output_path) == (True, True, "outputs/")
    assert (params.prompt[:17], params.seed, params.num_inference_steps) == ("A beautiful woman", 1024, 6)
    assert (params.num_frames, params.fps) == (17, 24)
    assert capsys.readouterr().err.count("strips of rows, which need no tiles") == 2


@pytest.mark.parametrize("path", EXAMPLES)
def test_one_file_serves_serve_too(started, capsys, path):
    assert main(["serve", "--config", str(path), "--model-path=demo", "--port=0"]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "no effect on serve" in line]
    assert "prompt, seed, width" in note
    assert "output_path" not in note


def test_generate_says_that_http_settings_have_no_effect(meaning, capsys, tmp_path):
    (tmp_path / "c.json").write_text('{"host": "nowhere.invalid"}')
    meaning("--prompt", "a", "--port", "1", "--config", "c.json")
    notes = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert notes == ["note: no effect on generate: host, port (it starts no HTTP server)"]


def test_what_is_refused_is_not_noted_first(started, capsys):
    assert main(["generate", "--prompt", "a", "--port", "99999"]) == 2
    assert capsys.readouterr().err == "error: port: 99999 is not a port; take 0 (any free one) to 65535\n"


def test_unused_variables_are_named_in_one_line(started, capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_A", "1")
    monkeypatch.setenv("SGLANG_DIFFUSION_ATTENTION_CONFIG", "x.json")
    monkeypatch.setenv("FRAMEMESH_NUM_GPU", "2")
    monkeypatch.setenv("FRAMEMESH_TOKEN", "2")
    assert main(["serve", "--port=0"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: set, but without effect here: SGLANG_A, SGLANG_DIFFUSION_ATTENTION_CONFIG",
        "warning: FRAMEMESH_NUM_GPU is no setting; did you mean FRAMEMESH_NUM_GPUS?",
        "warning: FRAMEMESH_TOKEN is no setting",
    ]


# What is refused


def broken_folder(tmp_path, break_it):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    break_it(folder)
    return ["generate", "--prompt", "a", "--model-path", str(folder)]


BAD_LINES = [
    ("generate --num-gps 2", "--num-gps: is no flag of generate", "; did you mean --num-gpus?"),
    ("generate --num_gps=2", "--num-gps: is no flag of generate", "; did you mean --num-gpus?"),
    ("serve extra", "extra: is too much; `framemesh serve --help`", ""),
    ("cancel a b", "b: is too much; `framemesh cancel --help`", ""),
    ("serve --prompt fox", "--prompt", "no flag of serve"),
    ("genrate", '"genrate"', 'Did you mean "generate"?'),
    ("generate stray", "stray", ""),
    ("generate --prompt a curious fox", "--prompt", "'curious' is too many"),
    ("generate --seed", "--seed", "requires an argument"),
    ("generate --lora-path", "--lora-path", "needs a value"),
    ("serve --served-model-name", "--served-model-name", "needs a value"),
    ("serve --served-model-name --port 0", "--served-model-name", "needs a value"),
    ("serve --served-model-name= --port 0", "served_model_name", "holds an empty name"),
    ("generate --seed 1 --seed 2", "--seed", "multiple times"),
    ("generate --num-gpus 2.5", "--num-gpus", "no whole number"),
    ("generate --num-gpus two", "--num-gpus", "two"),
    ("generate --guidance-scale nan", "--guidance-scale", "finite"),
    ("generate --dit-precision fp8", "--dit-precision", '"fp16", "bf16", "fp32"'),
    ("generate --prompt a --num-gpus 4 --ulysses-degree=3", "ulysses_degree", "= 3 ranks != 4 (num_gpus)"),
    ("generate --prompt a --num-gpus 4 --sp-degree 2", "sp_degree", "= 2 ranks != 4"),
    ("generate --prompt a --num-gpus 0", "num_gpus", "1 or more"),
    ("generate --prompt a --num-gpus 6 --ulysses-degree 6", "ulysses_degree", "ulysses(6) > 4 attention heads"),
    ("generate --prompt a --enable-cfg-parallel", "enable_cfg_parallel", "cfg(2) does not divide 1 rank (num_gpus)"),
    ("serve --port 0 --dist-backend nccl", "dist_backend", "take gloo on the CPU"),
    ("serve --port 0 --num-gpus 2 --dist-backend staged", "dist_backend", "CPU tensors go over gloo"),
    ("serve --port 0 --num-gpus 2 --ulysses-degree 2 --sp-engine yunchang", "sp_engine", "take native on the CPU"),
    ("serve --port 0 --curve-dir nowhere", "curve_dir", "see framemesh keygen"),
    ("generate --prompt a --curve-dir nowhere", "curve_dir", "see framemesh keygen"),
    ("serve --port 0 --webhook-secret-file nowhere", "webhook_secret_file", "cannot be read"),
    ("serve --port 0 --num-gpus 3 --cfg-parallel-size 3", "cfg_parallel_size", "cfg(3) > 2 guidance branches"),
    ("generate --prompt a --num-gpus 4 --cfg-parallel-size 3", "cfg_parallel_size", "cfg(3) does not divide 4 ranks"),
    ("generate --prompt a --num-gpus 2 --tp-size 0", "tp_size", "1 or more"),
    ("generate --prompt a --num-gpus 70000", "num_gpus", "take at most 65536"),
    ("tune --dry-run --num-gpus 97", "num_gpus", "97 ranks cannot share 80 tokens and 4 heads"),
    ("serve --num-gpus 2 --enable-cfg-parallel --cfg-parallel-size 1", "cfg_parallel_size", "take 2 or more"),
    ("serve --num-gpus 2 --device cpu --sp-engine yunchang", "sp_engine", "take native on the CPU"),
    ("serve --sp-engine yunchang", "sp_engine", "nothing to do on one rank"),
    ("serve --device cpu --dist-backend nccl", "dist_backend", "take gloo on the CPU"),
    ("serve --sp-engine xdit", "--sp-engine", '"native", "yunchang"'),
    ("generate --prompt a --height 65", "height", "the nearest are 64 and 80"),
    ("generate --prompt a --num-frames 16", "num_frames", "the nearest are 13 and 17"),
    ("generate --prompt a --num-inference-steps 0", "num_inference_steps", "take 1 to"),
    ("generate --prompt a --fps -1", "fps", "take 1 to"),
    ("generate", "prompt", "is empty"),
    ("generate --prompt a --output-file-name a/b.mp4", "output_file_name", "--output-path"),
    ("generate --prompt a --output-file-name a.gif", "output_file_name", ".mp4"),
    ("generate --prompt a --output-file-name a", "output_file_name", ".mp4"),
    ("generate --prompt a --output-file-name .mp4", "output_file_name", ".mp4"),
    (f"generate --prompt a --output-file-name {'x' * 250}.mp4", "output_file_name", "255 bytes"),
    ("generate --prompt a --return-frames", "return_frames", "Python SDK"),
    ("run --prompt a --no-save-output", "save_output", "always saves"),
    ("generate --prompt a --model-path ./nowhere", "model_path", "no folder ./nowhere"),
    ("generate --prompt a --output-path /dev/null/x", "output_path", "cannot be written"),
    ("serve --port 0 --spool-dir /proc/x", "spool_dir", "/proc/x cannot be written"),
    ("mesh --spool-dir /dev/null/x", "spool_dir", "/dev/null/x cannot be written"),
    ("serve --port 70000", "port", "0 (any free one) to 65535"),
    ("serve --host nowhere.invalid", "host", "nowhere.invalid"),
    ("serve --config nowhere.json", "--config", "cannot be read: No such file"),
    ("generate --lora-path me/style", "--lora-path", "LoRA adapters are not available yet"),
    ("generate --prompt a --tp-size 2", "tp_size", "take one of [1]"),
    ("generate --backend diffusers", "--backend", "diffusers backend is not available yet"),
    ("generate --attention-backend sage_attn", "--attention-backend", "take torch_sdpa"),
    ("serve --warmup-resolutions 256x256 720x720", "--warmup-resolutions", "warm-up"),
    ("serve --text-encoder-cpu-offload --pin-cpu-memory --num-gpus 4", "--text-encoder-cpu-offload", "offloading"),
]


@pytest.mark.parametrize(("line", "name", "hint"), BAD_LINES, ids=[line for line, _, _ in BAD_LINES])
def test_bad_lines_end_before_anything_starts(started, capsys, line, name, hint):
    error = refusal(capsys, line.split())
    assert name in error
    assert hint in error
    assert not started
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["serve", "--bogus"], "--bogus: is no flag of serve"),
        (["serve", "--no-bogus", "3"], "--no-bogus: is no flag of serve"),
        (["gateway", "--num-gps", "3"], "--num-gps: is no flag of gateway"),
    ],
)
def test_only_what_is_near_and_of_use_is_suggested(capsys, words, refused):
    assert refusal(capsys, words) == refused


BAD_FILES = [
    ("c.json", '{"num_gps": 2}', "num_gps (c.json): is no setting; did you mean num_gpus?"),
    ("c.json", '{"vae_config": {"load_encode": true}}', "did you mean vae_config.load_encoder?"),
    ("c.json", '{"vae_config": 3}', "vae_config: 3 is no mapping"),
    ("c.json", '{"enable_torch_compile": true}', "enable_torch_compile (c.json): torch.compile is not available yet"),
    ("c.json", '{"diffusers_kwargs": {"a": 1}}', "diffusers_kwargs (c.json): the diffusers backend"),
    ("c.json", '{"backend": "diffusers"}', "backend (c.json): diffusers: the diffusers backend"),
    ("c.json", '{"num_gpus": [1, 2]}', "takes one value"),
    ("c.json", '{"num_gpus": "x"}', 'num_gpus (c.json): unable to convert "x"'),
    ("c.json", '{"num_gpus": true}', "num_gpus (c.json)"),
    ("c.json", '{"sp_size": 1, "sp_degree": 2}', "sp_degree (c.json): contradicts sp_size (c.json)"),
    ("c.json", "{", "cannot be read as JSON"),
    ("c.yaml", "prompt: no", "prompt (c.yaml): False is not text; put it in quotes"),
    ("c.yaml", "a: [", "cannot be read as YAML"),
    ("c.yaml", "- a", "holds no mapping"),
    ("c.yaml", "fps: 1.5", "fps (c.yaml): 1.5 is no whole number"),
    ("c.yaml", "config: other.yaml", "config (c.yaml): is no setting"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES, ids=[text for _, text, _ in BAD_FILES])
def test_bad_files_are_refused(started, capsys, name, text, message):
    Path(name).write_text(text)
    assert message in refusal(capsys, ["generate", "--prompt", "a", "--config", name])
    assert not started


def test_bad_variables_are_refused(started, capsys, monkeypatch):
    monkeypatch.setenv("FRAMEMESH_LORA_PATH", "me/style")
    assert refusal(capsys, ["serve"]) == "FRAMEMESH_LORA_PATH: LoRA adapters are not available yet"
    monkeypatch.setenv("FRAMEMESH_LORA_PATH", "")
    monkeypatch.setenv("FRAMEMESH_PORT", "tcp://10.0.0.1:80")
    assert "FRAMEMESH_PORT" in refusal(capsys, ["serve"])
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", "true")
    assert "SGLANG_CACHE_DIT_ENABLED: Cache-DiT" in refusal(capsys, ["serve"])
    assert not started


def test_bad_folders_are_refused(started, capsys, tmp_path):
    def only_pickle(folder):
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))

    assert "pickle" in refusal(capsys, broken_folder(tmp_path, only_pickle))
    shutil.rmtree(tmp_path / "model")
    assert "no diffusers pipeline" in refusal(
        capsys, broken_folder(tmp_path, lambda folder: (folder / "model_index.json").unlink())
    )
    assert not started


def test_a_taken_port_is_refused_by_those_who_need_it(started, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for line in (["serve"], ["run", "--prompt", "a"]):
            assert f"port: {port} on 127.0.0.1 is taken" in refusal(capsys, [*line, "--port", port])
        assert not started
        assert main(["generate", "--prompt", "a", "--port", port]) == 0


def test_the_trial_of_the_output_folder_leaves_no_trace(started, tmp_path):
    assert main(["generate", "--prompt", "a", "--output-path", "new/deep"]) == 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "new").mkdir()
    assert main(["generate", "--prompt", "a", "--output-path", "new/deep", "--spool-dir", "new/spool"]) == 0
    assert not list((tmp_path / "new").iterdir())


# The other commands


LAYOUT_LINES = [
    ("--num-gpus 8 --enable-cfg-parallel --ulysses-degree 4", (2, 1, 4)),
    ("--num-gpus 8 --enable-cfg-parallel", (2, 1, 4)),
    ("--num-gpus 4 --enable-cfg-parallel --ulysses-degree=2", (2, 1, 2)),
    ("--num-gpus 4 --ulysses-degree=4 --ring-degree=1", (1, 1, 4)),
    ("--num-gpus 8 --cfg-parallel-size 2 --ring-degree 2", (2, 2, 2)),
    ("--num-gpus 8 --cfg-parallel-size 1", (1, 2, 4)),
    ("--num-gpus 3 --cfg-parallel-size 1", (1, 3, 1)),
    ("--num-gpus 3 --ulysses-degree 3", (1, 1, 3)),
    ("--num-gpus 6 --sp-degree 6", (1, 3, 2)),
]
"""On the demo model, which has 4 heads."""


@pytest.mark.parametrize(("line", "layout"), LAYOUT_LINES, ids=[line for line, _ in LAYOUT_LINES])
def test_the_layout_fits_the_model_and_is_printed(started, capsys, line, layout):
    assert main(["generate", "--prompt", "a", *line.split()]) == 0
    ((_, config, _, _, _, _),) = started
    assert (config.layout.cfg, config.layout.ring, config.layout.ulysses) == layout
    lines = capsys.readouterr().err.splitlines()
    assert f"note: layout {config.layout}" in lines
    assert sum(line.startswith("  rank ") for line in lines) == config.num_gpus


def test_dry_run_prints_the_plan_and_starts_nothing(started, capsys):
    line = ["generate", "--dry-run", "--prompt", "a", "--num-gpus", "2", "--ulysses-degree", "2", "--seed", "7"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["layout"] == {"cfg": 1, "ring": 1, "ulysses": 2, "ranks": 2}
    assert plan["model"] == {
        "folder": str(DEMO),
        "family": "wan",
        "pipeline_class": "WanPipeline",
        "task_type": "T2V",
    }
    assert plan["config"].keys() == {name.partition(".")[0] for name in CONFIG}
    assert plan["params"].keys() == SAMPLING.keys()
    assert (plan["params"]["seed"], plan["params"]["num_frames"]) == (7, 17)
    assert "layout cfg(1) * ring(1) * ulysses(2) = 2 ranks" in err
    assert main(["serve", "--dry-run", "--port", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] is None
    assert not started


def test_models_lists_every_family_and_describes_one_folder(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for pipeline_class in FAMILIES:
        assert pipeline_class in out
    assert "per latent frame" in out
    assert main(["models", "--model-path", str(DEMO)]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["family", "wan"] in rows
    assert ["default", "num_frames           17"] in rows
    assert "no folder" in refusal(capsys, ["models", "--model-path", "./nowhere"])


def test_env_prints_the_rows_of_the_machine(monkeypatch, capsys):
    module = types.ModuleType("launch.devices")
    module.describe_machine = lambda: [("gpu", "none"), ("memory", "8 GiB")]
    monkeypatch.setitem(sys.modules, "launch.devices", module)
    assert main(["env"]) == 0
    assert capsys.readouterr().out == "gpu     none\nmemory  8 GiB\n"


# What --help says


@pytest.fixture
def help_of(monkeypatch, capsys):
    """What a command's --help says on a wide terminal, as one line without its frame."""
    monkeypatch.setenv("COLUMNS", "500")

    def of(*words):
        assert main([*words, "--help"]) == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    return of


def test_help_joins_the_lines_of_a_text_and_shows_no_empty_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    for command in ("serve", "generate"):
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "the others are aliases. Unset: the model path. " in out
        assert "default: ()" not in out
        assert 'default: ""' not in out
        assert "[default: 30000]" in out
        assert "Usage: framemesh" in out


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_speaks_of_keys_and_variables_where_there_are_some(help_of, command):
    said = "also a key of the --config file" in help_of(command)
    assert said == (command in {"serve", "mesh", "gateway", "generate", "run", "doctor"})


def test_help_names_both_kinds_of_models(help_of):
    assert "Serve diffusion image and video models" in help_of()


# How it ends


def test_a_failed_run_is_exit_code_1(started, monkeypatch, capsys):
    def fail(*_):
        raise StartFailed("worker 0 died")

    monkeypatch.setattr(sys.modules["launch.serve"], "generate_once", fail)
    assert main(["generate", "--prompt", "a"]) == 1
    assert capsys.readouterr().err == "error: worker 0 died\n"


def test_an_exit_code_from_below_is_passed_on(started, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["launch.serve"], "generate_once", lambda *_: 3)
    assert main(["generate", "--prompt", "a"]) == 3
    assert capsys.readouterr().err == ""


def test_a_picture_and_the_contact_sheet_of_a_video_of_the_same_name_do_not_meet(tmp_path, monkeypatch, capsys):
    class Mesh:
        card = types.SimpleNamespace(task_type="T2V")

        def __init__(self, config, folder, *, on_state):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def generate(self, params, *, on_event):
            frames = np.zeros((params.num_frames, 64, 64, 3), np.uint8)
            return Result(frames, {"seed": 1, "fps": 16, "timings": {}}, Usage())

    monkeypatch.setattr("launch.serve.Generator", Mesh)
    line = ["generate", "--prompt", "a", "--save-output", "--output-path", str(tmp_path)]
    for frames, name in ((17, "star.mp4"), (1, "star.png")):
        assert main([*line, "--num-frames", str(frames), "--output-file-name", name]) == 0
    capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == {"star.mp4", "star.sheet.png", "star.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--num-gps", "2"], "did you mean --num-gpus?"),
        (["generate", "--prompt", "a", "--model-path", "./nowhere"], "no folder ./nowhere"),
        (["generate", "--prompt", "a", "--num-gpus", "4", "--ring-degree", "3"], "!= 4 (num_gpus)"),
    ],
)
def test_a_real_process_refuses_without_a_traceback(words, message):
    done = shell(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["models"],
        ["doctor", "--model-path", "./nowhere"],
        ["tune", "--dry-run", "--machine", "cpu-gloo"],
    ],
    ids=lambda words: words[0],
)
def test_nobody_reads_and_it_ends_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "launch", *words]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environ, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_help_and_version_import_nothing_heavy():
    program = """
import sys
from launch.cli import COMMANDS, main
codes = [main(words) for words in (["--help"], ["--version"], ["generate", "--help"], ["serve", "-h"], [])]
heavy = {"torch", "diffusers", "transformers", "fastapi", "numpy", "av", "huggingface_hub", "zmq", "sqlalchemy"}
print(codes, sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=True)
    assert done.stderr.splitlines() == ["[0, 0, 0, 0, 0] []"]
    assert "--ulysses-degree" in done.stdout


@pytest.mark.slow
def test_ctrl_c_during_the_imports_ends_with_130():
    program = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "cyclopts":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["framemesh", "serve", "--port", "0"]
runpy.run_module("launch", run_name="__main__")
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
def test_ctrl_c_ends_quickly_with_130(tmp_path):
    program = """
import sys, time, types
module = types.ModuleType("launch.serve")
def serve(config, folder):
    print("up", flush=True)
    time.sleep(60)
module.serve = serve
sys.modules["launch.serve"] = module
from launch.cli import COMMANDS, main
sys.exit(main(["serve", "--port", "0"]))
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stdout.readline() == "up\n"
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - begin < 5
    assert "Traceback" not in err
