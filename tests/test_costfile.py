"""Measured costs on disk: what shares a file and what must not, and what becomes of files that cannot be used."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import structlog
from fake_mesh import demo_model
from simulation import CARD

from runtime.config import Config, VaeConfig
from runtime.cost import Constants, CostModel
from runtime.costfile import COSTLY, cost_path, load_constants, save_constants
from runtime.layout import Layout
from runtime.sampling import SamplingParams

CONFIGS = demo_model().configs
LAYOUT = Layout(1, 1, 2)
PARAMS = CARD.check(SamplingParams(prompt="a cat", seed=1))
BASE = Config(num_gpus=4, cost_cache="costs")

CHANGED = {
    "sp_degree": (4, {"ring_degree": 2}),
    "ulysses_degree": (2, {}),
    "ring_degree": (2, {}),
    "num_gpus": (2, {}),
    "enable_cfg_parallel": (True, {}),
    "cfg_parallel_size": (2, {}),
    "device": ("cuda", {}),
    "dist_backend": ("gloo", {}),
    "sp_engine": ("yunchang", {}),
    # There is one kernel so far; any other word will do.
    "attention_backend": ("flash", {}),
    "dit_precision": ("bf16", {}),
    "text_encoder_precisions": (("bf16",), {}),
    "tp_size": (2, {}),
    "use_fsdp_inference": (True, {}),
    "vae_precision": ("bf16", {}),
    "vae_tiling": (True, {}),
    "vae_config": (VaeConfig(tile_sample_min_height=128), {}),
    "vae_sp": (True, {}),
    "replicas": (2, {}),
}
"""Setting -> another value than `BASE` has, with what else has to be set for it to be one."""

FREE = {
    *("model_path", "revision", "served_model_name", "allow_any_model", "backend", "bind", "mesh", "frames_bind"),
    *("dist_timeout", "vae_slicing", "host", "port", "public_url", "output_path", "output_store", "output_redirect"),
    *("metadata", "keep_results_hours", "webhook_url", "webhook_secret_file", "database_url", "job_lease"),
    *("batching_delay_ms", "batching_max_size", "batching_config", "scheduling_policy", "key_weights", "max_active"),
    *("cost_cache", "max_prompt_chars", "allow_private_urls", "api_keys_file", "api_keys", "protect_metrics"),
    *("rate_limit", "max_concurrent_per_key", "max_queue", "max_pixels", "lenient", "checkpoint_every_steps"),
    *("spool_dir", "checkpoint_max_bytes", "drain_timeout", "crash_limit", "start_timeout", "curve_dir"),
    *("log_level", "enable_metrics", "trace_path"),
}
"""Settings that change no item's length. The model is known by its configs, wherever it lies."""


def test_every_setting_is_known_to_change_costs_or_not():
    assert CHANGED.keys() | FREE == {field.name for field in dataclasses.fields(Config)}
    assert not CHANGED.keys() & FREE
    assert CHANGED.keys() >= set(COSTLY)


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_an_items_length_has_a_file_of_its_own(name):
    value, beside = CHANGED[name]
    other = dataclasses.replace(BASE, **{name: value}, **beside)
    assert cost_path(other, CONFIGS) != cost_path(BASE, CONFIGS)
    assert cost_path(other, CONFIGS) == cost_path(dataclasses.replace(other), CONFIGS)


def test_what_changes_nothing_shares_the_file():
    other = dataclasses.replace(BASE, port=1, scheduling_policy="fifo", model_path="elsewhere", batching_max_size=2)
    assert cost_path(other, CONFIGS) == cost_path(BASE, CONFIGS)


def test_another_model_and_another_machine_have_files_of_their_own(monkeypatch):
    wider = msgspec.json.decode(msgspec.json.encode(CONFIGS))
    wider["transformer"]["num_layers"] += 1
    paths = {cost_path(BASE, CONFIGS), cost_path(BASE, wider)}
    monkeypatch.setattr("platform.node", lambda: "another host")
    paths.add(cost_path(BASE, CONFIGS))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    paths.add(cost_path(BASE, CONFIGS))
    assert len(paths) == 4


def test_the_order_of_the_configs_keys_does_not_matter():
    turned = {name: dict(reversed(part.items())) for name, part in reversed(CONFIGS.items())}
    assert cost_path(BASE, turned) == cost_path(BASE, CONFIGS)


def test_files_lie_in_the_users_cache_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_path(Config(), CONFIGS).parent == tmp_path / "framemesh" / "cost"
    assert cost_path(Config(cost_cache=str(tmp_path / "here")), CONFIGS).parent == tmp_path / "here"


def test_what_was_learnt_survives_the_disk(tmp_path):
    path = cost_path(Config(cost_cache=str(tmp_path / "not" / "there")), CONFIGS)
    cost = CostModel(CARD)
    for seconds in (1.0, 1.2, 0.9):
        cost.observe("denoise", PARAMS, LAYOUT, 3, seconds)
        cost.observe("decode", PARAMS, LAYOUT, 2, 4 * seconds)
    save_constants(cost.constants, path)
    again = CostModel(CARD, load_constants(path))
    for kind in ("encode", "denoise", "first_decode", "decode"):
        for batch in (1, 4):
            expected = cost.predict(kind, PARAMS, LAYOUT, batch)
            assert again.predict(kind, PARAMS, LAYOUT, batch) == pytest.approx(expected)
    assert again.predict("denoise", PARAMS, LAYOUT) != CostModel(CARD).predict("denoise", PARAMS, LAYOUT)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_without_a_file_it_begins_with_the_first_guess(tmp_path):
    assert load_constants(tmp_path / "none.json") == Constants.first_guess()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"lines": {"denoise": {"fixed": "much", "slope": 1}}}'])
def test_a_file_that_cannot_be_used_is_said_and_replaced(tmp_path, content):
    path = tmp_path / "costs.json"
    path.write_bytes(content)
    with structlog.testing.capture_logs() as logs:
        assert load_constants(path) == Constants.first_guess()
    assert [line["path"] for line in logs if line["log_level"] == "warning"] == [str(path)]
    save_constants(Constants.first_guess(), path)
    assert load_constants(path) == Constants.first_guess()


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with structlog.testing.capture_logs() as logs:
        save_constants(Constants.first_guess(), tmp_path / "file" / "costs.json")
    assert any(line["log_level"] == "warning" for line in logs)
