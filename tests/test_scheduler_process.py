"""From a configuration to the scheduler that the process runs: what the operator said reaches the policy."""

from __future__ import annotations

import dataclasses
import json

import pytest
from simulation import CARD, KnownCost

from runtime.__main__ import make_scheduler
from runtime.apikeys import parse_weights
from runtime.config import Config, check_config
from runtime.errors import InvalidInput
from runtime.protocol import Denoise, Request
from runtime.sampling import SamplingParams

GATEWAY = b"gateway"
NO_BATCHES = Config(batching_max_size=1, checkpoint_every_steps=0)


def scheduler(config):
    made = make_scheduler(config, CARD, KnownCost())
    made.gateway_joined(GATEWAY, "ipc://frames", 1000)
    made.group_ready()
    return made


def request(request_id, key):
    return Request(request_id, CARD.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=1000)), key=key)


def steps_by_key(config, items=200):
    """Denoising steps that each key of two was given, both with endless work."""
    made, now = scheduler(config), 0.0
    made.submit(GATEWAY, tuple(request(key, key) for key in ("alice", "bob")), now)
    given = {"alice": 0, "bob": 0}
    for _ in range(items):
        for item in made.plan(now):
            now += 0.1
            if isinstance(item, Denoise):
                given[item.request_ids[0]] += item.steps
            for rank in getattr(item, "ranks", ()):
                made.completed(rank, item.seq, 0.1, now)
    return given


@pytest.mark.parametrize(("weights", "share"), [((), 1.0), (("alice=2",), 2.0), (("alice=1.5", "bob=0.5"), 3.0)])
def test_service_follows_the_weights_of_the_flag(weights, share):
    given = steps_by_key(dataclasses.replace(NO_BATCHES, key_weights=weights))
    assert sum(given.values()) > 400
    assert given["alice"] / given["bob"] == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(
    "words", [("alice",), ("alice=",), ("=2",), ("alice=0",), ("alice=-1",), ("alice=nan",), ("alice=1e3",), ("a b=2",)]
)
def test_a_weight_that_is_none_is_refused_by_its_word(words):
    with pytest.raises(InvalidInput) as refused:
        check_config(Config(key_weights=("carol=3", *words)))
    assert refused.value.field == "key_weights"
    assert repr(words[0]) in str(refused.value)


def test_a_key_has_one_weight():
    with pytest.raises(InvalidInput, match="two weights"):
        parse_weights("key_weights", ("alice=1", "bob=1", "alice=2"))
    assert parse_weights("key_weights", ("alice=1", "bob=0.25")) == {"alice": 1.0, "bob": 0.25}


def test_rules_of_the_file_bound_batches_under_every_name_of_the_model(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([{"model": "pretty", "max_batch_size": 3}, {"model": "some/path", "max_batch_size": 5}]))
    params = request("r1", "").params
    named = Config(model_path="some/path", served_model_name=("nice", "pretty"), batching_config=str(path))
    assert scheduler(named).limits.of(params) == 3
    assert scheduler(dataclasses.replace(named, served_model_name=())).limits.of(params) == 5
    assert scheduler(dataclasses.replace(named, model_path="other", served_model_name=())).limits.of(params) == 16
