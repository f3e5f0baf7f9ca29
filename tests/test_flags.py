"""The table of flags whose feature comes later: complete against the reference product, refused with a reason."""

import json
from pathlib import Path

import pytest
import yaml

from launch.flags import ALIASES, LATER, LATER_VALUES, check_environment, check_later, plain
from launch.options import BOOLEANS, SETTINGS
from runtime.errors import InvalidInput

DATA = Path(__file__).parent / "data"

# Every flag that SGLang Diffusion's command-line, API, attention, profiling and performance pages name; left out are
# those of other programs in their examples (docker, pip, nsys).
FLAGS = """
    --attention-backend --backend --cache-dit-config --config --diffusers-attention-backend --dit-cpu-offload
    --dit-layerwise-offload --dit-offload-prefetch-size --dit-precision --enable-cfg-parallel --enable-svdquant
    --enable-torch-compile --fps --height --help --image-encoder-cpu-offload --lora-nickname --lora-path
    --mask-strategy-file-path --model-path --negative-prompt --num-frames --num-gpus --num-inference-steps
    --num-profiled-timesteps --output-file-name --output-path --perf-dump-path --pin-cpu-memory --pipeline-class-name
    --port --profile --profile-all-stages --prompt --quantization-precision --quantization-rank --return-frames
    --ring-degree --save-output --seed --sp-degree --text-encoder-cpu-offload --tp-size --transformer-weights-path
    --trust-remote-code --ulysses-degree --use-fsdp-inference --vae-cpu-offload --vae-path --vae-precision
    --vae-slicing --vae-tiling --warmup --warmup-resolutions --width
"""

BACKENDS = """
    fa fa3 fa4 torch_sdpa sliding_tile_attn sage_attn sage_attn_3 video_sparse_attn vmoba_attn aiter
    sparse_video_gen_2_attn sla_attn sage_sla_attn
"""


def known(name: str) -> bool:
    name = ALIASES.get(name, name)
    groups = {setting.partition(".")[0] for setting in SETTINGS}
    return name in SETTINGS or name in LATER or name in groups or name in {"config", "help"}


@pytest.mark.parametrize("flag", FLAGS.split())
def test_every_documented_flag_has_an_answer(flag):
    assert known(flag.removeprefix("--").replace("-", "_"))


def test_every_documented_config_key_has_an_answer():
    as_json = json.loads((DATA / "seed_config.json").read_text())
    as_yaml = yaml.safe_load((DATA / "seed_config.yaml").read_text())
    assert as_json == as_yaml
    for key, value in {**as_json, "backend": "diffusers", "diffusers_kwargs": {}}.items():
        assert known(key), key
        for inner in value if isinstance(value, dict) else ():
            assert f"{key}.{inner}" in SETTINGS


@pytest.mark.parametrize("backend", BACKENDS.split())
def test_every_documented_attention_backend_is_taken_or_refused_with_a_reason(backend):
    choices = SETTINGS["attention_backend"].__args__
    assert (backend in choices) != (backend in LATER_VALUES["attention_backend"])


def test_nothing_is_in_two_tables():
    assert not LATER.keys() & SETTINGS.keys()
    assert not ALIASES.keys() & (SETTINGS.keys() | LATER.keys())
    assert set(ALIASES.values()) <= SETTINGS.keys()
    assert LATER_VALUES.keys() <= SETTINGS.keys()


@pytest.mark.parametrize("name", LATER)
def test_a_missing_feature_is_refused_with_a_sentence_and_its_off_values_pass(name):
    later = LATER[name]
    for off in later.off:
        assert check_later(name, off, name)
    with pytest.raises(InvalidInput) as caught:
        check_later(name, "something" if later.takes_value else "maybe", f"--{name}")
    assert caught.value.message == later.reason
    assert caught.value.field == f"--{name}"
    assert caught.value.code == "not_available"
    assert len(later.reason) < 100
    assert later.reason.rstrip(".") == later.reason
    assert later.takes_value == (name not in BOOLEANS)


def test_a_setting_that_exists_is_refused_only_for_its_missing_values():
    assert not check_later("backend", "framemesh", "--backend")
    with pytest.raises(InvalidInput, match="diffusers backend is not available yet"):
        check_later("backend", "diffusers", "--backend")
    assert not check_later("num_gpus", 4, "--num-gpus")


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("False", False), ("1", 1), ("null", None), ("", None), ("fp16", "fp16")]
)
def test_words_become_what_a_file_would_hold(word, value):
    assert plain(word) == value
    assert type(plain(word)) is type(value)


@pytest.mark.parametrize("value", ["true", "1", "True", "yes"])
@pytest.mark.parametrize("prefix", ["SGLANG_", "FRAMEMESH_"])
def test_a_variable_that_switches_on_what_is_missing_is_refused(prefix, value):
    with pytest.raises(InvalidInput, match="Cache-DiT is not available yet") as caught:
        check_environment({f"{prefix}CACHE_DIT_ENABLED": value})
    assert caught.value.field == f"{prefix}CACHE_DIT_ENABLED"


def test_other_variables_of_the_reference_product_share_one_warning():
    environ = {
        "SGLANG_CACHE_DIT_ENABLED": "false",
        "SGLANG_CACHE_DIT_FN": "2",
        "SGLANG_DIFFUSION_ATTENTION_CONFIG": "mask_strategy.json",
        "SGLANG_EMPTY": "",
        "PATH": "/bin",
    }
    (warning,) = check_environment(environ)
    assert warning.startswith("warning: ")
    assert "SGLANG_CACHE_DIT_ENABLED, SGLANG_CACHE_DIT_FN, SGLANG_DIFFUSION_ATTENTION_CONFIG" in warning
    assert "EMPTY" not in warning
    assert check_environment({"PATH": "/bin"}) == []
