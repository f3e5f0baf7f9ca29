"""The Wan card: what it fills in, what it refuses and how, what it counts; and the folders that are no model."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runtime.errors import InvalidInput
from runtime.models.card import card_for, most_branches, read_configs
from runtime.models.wan import FOLDED_TEXT, WanCard
from runtime.sampling import SamplingParams

DEMO = Path(__file__).parent.parent / "workers" / "demo" / "model"
DEMO_DEFAULTS = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "fps": 8,
}


@pytest.fixture(scope="module")
def configs():
    return read_configs(DEMO)


@pytest.fixture(scope="module")
def card(configs):
    """The demo model without its own defaults: Wan 2.1's."""
    return card_for({name: config for name, config in configs.items() if name != "framemesh"})


@pytest.fixture(scope="module")
def pipeline():
    """diffusers' own module, the oracle."""
    from diffusers.pipelines.wan import pipeline_wan

    return pipeline_wan


def ask(**changes):
    return SamplingParams(**{"prompt": "a cat", "seed": 1, **changes})


# ---- check -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_pipelines_own(card, pipeline):
    resolved = card.check(ask())
    signature = inspect.signature(pipeline.WanPipeline.__call__)
    for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale"):
        assert getattr(resolved, name) == signature.parameters[name].default, name
    assert (resolved.fps, resolved.negative_prompt, resolved.prompt) == (16, "", "a cat")


def test_a_folder_brings_its_own_defaults_and_the_user_overrides_them(configs):
    demo = card_for(configs)
    resolved = demo.check(ask())
    assert {name: getattr(resolved, name) for name in DEMO_DEFAULTS} == DEMO_DEFAULTS
    wanted = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 0.0, "fps": 24}
    resolved = demo.check(ask(negative_prompt="blurry", seed=0, **wanted))
    assert {name: getattr(resolved, name) for name in wanted} == wanted
    assert (resolved.negative_prompt, resolved.seed) == ("blurry", 0)


def test_an_unset_seed_is_drawn(card):
    seeds = {card.check(ask(seed=None)).seed for _ in range(5)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \n\t"}, "prompt", "empty"),
        ({"height": 100}, "height", "100 is not a multiple of 16; the nearest are 96 and 112"),
        ({"width": 65}, "width", "the nearest are 64 and 80"),
        ({"height": 0}, "height", "0 is too small; take at least 16"),
        ({"width": -16}, "width", "-16 is too small; take at least 16"),
        ({"width": 8191}, "width", "the nearest are 8176 and 8192"),
        ({"width": 8200}, "width", "8200 is too large; take at most 8192"),
        ({"height": 8208}, "height", "8208 is too large"),
        ({"num_frames": 0}, "num_frames", "0 is too few; take 4k + 1"),
        ({"num_frames": -4}, "num_frames", "-4 is too few"),
        ({"num_frames": 16}, "num_frames", "16 is not 4k + 1; the nearest are 13 and 17"),
        ({"num_frames": 2}, "num_frames", "the nearest are 1 and 5"),
        ({"num_frames": 4092}, "num_frames", "the nearest are 4089 and 4093"),
        ({"num_frames": 4094}, "num_frames", "4094 is too many; take at most 4093"),
        ({"num_frames": 4097}, "num_frames", "4097 is too many"),
        ({"num_inference_steps": 0}, "num_inference_steps", "take 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "1001 is out of range"),
        ({"guidance_scale": -0.1}, "guidance_scale", "take 0 to 100"),
        ({"guidance_scale": 100.5}, "guidance_scale", "take 0 to 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "take 0 to 100"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "take 0 to 100"),
        ({"seed": -1}, "seed", "take 0 to 2^63 - 1"),
        ({"seed": 2**63}, "seed", "take 0 to 2^63 - 1"),
        ({"fps": 0}, "fps", "take 1 to 240"),
        ({"fps": 241}, "fps", "take 1 to 240"),
    ],
)
def test_a_refusal_names_the_field_and_what_would_do(card, changes, field, words):
    with pytest.raises(InvalidInput, match=re.escape(words)) as refusal:
        card.check(ask(**changes))
    assert refusal.value.field == field


def refusal_of(card, **changes):
    try:
        card.check(ask(**changes))
    except InvalidInput as refusal:
        return refusal.message
    return None


@pytest.mark.parametrize("field", ["height", "width", "num_frames"])
def test_what_a_refusal_proposes_is_accepted(card, field):
    refusals = [message for value in range(-3, 9000, 97) if (message := refusal_of(card, **{field: value}))]
    assert len(refusals) > 60
    for message in refusals:
        found = re.search(r"nearest are (\d+) and (\d+)|at (?:most|least) (\d+)|e\.g\. (\d+)", message)
        assert found is not None, message
        for proposal in filter(None, found.groups()):
            assert refusal_of(card, **{field: int(proposal)}) is None, message


@pytest.mark.parametrize(
    "limit",
    [
        {"num_frames": 4093},
        {"num_frames": 1},
        {"height": 16, "width": 8192},
        {"num_inference_steps": 1000},
        {"seed": 2**63 - 1},
        {"guidance_scale": 100},
        {"fps": 240},
    ],
)
def test_limits_themselves_are_allowed(card, limit):
    resolved = card.check(ask(**limit))
    assert {name: getattr(resolved, name) for name in limit} == limit


def test_what_a_layout_needs_to_know(card):
    assert card.heads == 4
    assert most_branches(card) == 2


@dataclass(frozen=True)
class Unguided:
    """A card of a family whose requests may not ask for guidance."""

    card: WanCard

    def check(self, params):
        if (params.guidance_scale or 1.0) > 1 or params.true_cfg_scale is not None:
            raise InvalidInput("guidance_scale", "this model takes none")
        return self.card.check(replace(params, guidance_scale=1.0))

    def branches(self, params, step):
        return self.card.branches(params, step)


def test_most_branches_are_those_of_requests_that_the_family_takes(card):
    assert most_branches(Unguided(card)) == 1


# ---- counting ----------------------------------------------------------------------------------------------------


def test_frames_for_is_the_nearest_valid_count(card):
    for fps in (8, 16, 24):
        for tenths in range(0, 101, 3):
            frames = card.frames_for(tenths / 10, fps)
            assert frames % 4 == 1
            assert frames == 1 or abs(frames - tenths / 10 * fps) <= 2
    assert card.frames_for(5, 16) == 81
    assert card.frames_for(0, 16) == 1


def test_chunks_are_the_first_frame_and_then_fours(card):
    assert card.decode_chunks(card.check(ask(num_frames=17))) == (1, 4, 4, 4, 4)
    for frames in (1, 5, 33, 81):
        params = card.check(ask(num_frames=frames))
        assert sum(card.decode_chunks(params)) == frames
        assert len(card.decode_chunks(params)) == card.latent_shape(params)[2]


def test_shapes_and_tokens(card):
    params = card.check(ask(height=480, width=832, num_frames=81))
    assert card.latent_shape(params) == (1, 16, 21, 60, 104)
    assert card.tokens(params) == 21 * 30 * 52


@pytest.mark.parametrize(("guidance", "branches"), [(5.0, 2), (1.001, 2), (1.0, 1), (0.0, 1)])
def test_step_flops_by_hand(card, guidance, branches):
    """Every matrix product of a small config, written down: (rows, inner, columns)."""
    small = replace(card, heads=2, head_dim=8, layers=3, ffn_dim=40)
    params = small.check(ask(height=32, width=32, num_frames=5, guidance_scale=guidance))
    tokens, width, text = 8, 16, FOLDED_TEXT
    products = [
        *[(tokens, width, width)] * 4,  # self-attention: q k v out
        (tokens, width, tokens),  # scores, both heads
        (tokens, tokens, width),
        *[(tokens, width, width)] * 2,  # cross-attention: q out
        *[(text, width, width)] * 2,  # k v
        (tokens, width, text),
        (tokens, text, width),
        (tokens, width, 40),
        (tokens, 40, width),
    ]
    by_hand = sum(2 * rows * inner * columns for rows, inner, columns in products)
    assert small.step_flops(params) == by_hand * 3 * branches
    assert len(small.branches(params, 0)) == branches


def test_only_equal_shapes_and_branches_share_a_batch(card):
    key = card.batch_key(card.check(ask()), 0)
    assert key == card.batch_key(card.check(ask(prompt="a dog", seed=9, guidance_scale=7.0)), 3)
    others = [{"height": 464}, {"width": 848}, {"num_frames": 77}, {"guidance_scale": 1.0}]
    assert all(card.batch_key(card.check(ask(**other)), 0) != key for other in others)


NASTY = [
    "a cat",
    "  leading and trailing\t\n",
    "two\n\nlines  and\u3000wide\u00a0spaces\x85",
    "&lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot;",
    "&amp;lt;twice&amp;gt; &amp;amp;amp; thrice",
    "<i> keeps ftfy from unescaping: &amp;lt;twice&amp;gt; &amp;amp;amp; thrice",
    "&nbsp;&#8203;&#x1F600;&bogus;&copy",
    "schÃ¶n, dÃ©jÃ  vu, â€œquotesâ€\x9d",
    "l’humanitÃ©… ﬁ ligature ｆｕｌｌ width",
    "emoji 🎬👩‍🚀 e\u0301 nfd 中文提示詞",
    "\x00\x07control\x1b[31mred\x1b[0m",
    "&nbsp;",
    "",
]


@pytest.mark.parametrize("text", NASTY)
def test_prompts_are_cleaned_as_the_pipeline_does(card, pipeline, text):
    assert card.clean_prompt(text) == pipeline.prompt_clean(text)


def test_the_nasty_prompts_need_every_part_of_the_cleaning(card):
    assert card.clean_prompt("&amp;lt;  &amp;gt;\n") == "< >"
    assert card.clean_prompt("schÃ¶n") == "schön"


# ---- folders -----------------------------------------------------------------------------------------------------

INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "expand_timesteps": False,
    "transformer_2": [None, None],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}


@pytest.fixture
def folder(tmp_path):
    """The smallest folder that read_configs takes: one component in two shards and one without weights."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 3.0}')
    (tmp_path / "transformer" / "config.json").write_text('{"num_layers": 2}')
    shards = {"a.weight": "model-1-of-2.safetensors", "b.weight": "model-2-of-2.safetensors"}
    (tmp_path / "transformer" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for shard in shards.values():
        (tmp_path / "transformer" / shard).touch()
    return tmp_path


def test_a_whole_folder_is_read(folder):
    configs = read_configs(folder)
    assert set(configs) == {"model_index", "transformer", "scheduler"}
    assert (configs["transformer"], configs["scheduler"]) == ({"num_layers": 2}, {"flow_shift": 3.0})
    (folder / "framemesh.json").write_text('{"defaults": {"fps": 3}}')
    assert read_configs(folder)["framemesh"] == {"defaults": {"fps": 3}}


def pickles_only(folder):
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").touch()


def no_weights(folder):
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()


def write_index(**changes):
    return lambda folder: (folder / "model_index.json").write_text(json.dumps(INDEX | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "is no folder"),
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text('{"a": '), "cannot be read as JSON"),
        (lambda folder: (folder / "model_index.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "holds no JSON object"),
        (write_index(vae=["diffusers", "AutoencoderKLWan"]), "lists the component vae but has no vae/config.json"),
        (write_index(transformer=["diffusers"]), "transformer is ['diffusers'], not [library, class]"),
        (lambda folder: (folder / "transformer" / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "framemesh.json").write_text("nope"), "cannot be read as JSON"),
        (pickles_only, "only as a pickle (diffusion_pytorch_model.bin)"),
        (no_weights, "has no *.safetensors weights"),
        (
            lambda folder: (folder / "transformer" / "model-2-of-2.safetensors").unlink(),
            "lacks model-2-of-2.safetensors (1 of 2 shards)",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused(folder, damage, words):
    damage(folder)
    with pytest.raises(InvalidInput, match=re.escape(words)) as refusal:
        read_configs(folder)
    assert refusal.value.field == "model_path"


def test_a_pickle_beside_safetensors_is_ignored(folder):
    (folder / "transformer" / "pytorch_model.bin").touch()
    read_configs(folder)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "model_index",
            {"_class_name": "StableDiffusionPipeline"},
            "no native family runs StableDiffusionPipeline; there are: FluxPipeline, QwenImagePipeline, WanPipeline",
        ),
        ("model_index", {"_class_name": None}, "no native family runs None"),
        ("model_index", {"_class_name": ["code", "MyPipeline"]}, "no native family runs ['code', 'MyPipeline']"),
        (
            "model_index",
            {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]},
            "its FlowMatchHeunDiscreteScheduler evaluates the model several times a step",
        ),
        ("model_index", {"boundary_ratio": 0.9}, "two-expert Wan 2.2"),
        ("model_index", {"expand_timesteps": True}, "Wan 2.2 TI2V"),
        ("transformer", {"image_dim": 1280}, "image-to-video"),
        ("transformer", {"added_kv_proj_dim": 128}, "image-to-video"),
    ],
)
def test_models_that_no_family_runs_are_refused(configs, part, change, words):
    with pytest.raises(InvalidInput, match=re.escape(words)):
        card_for(configs | {part: configs[part] | change})


@pytest.mark.parametrize(("part", "key"), [("transformer", "num_layers"), ("transformer", None), ("vae", None)])
def test_an_incomplete_config_is_the_callers_fault(configs, part, key):
    kept = {name: config for name, config in configs.items() if name != part}
    if key is not None:
        kept[part] = {name: value for name, value in configs[part].items() if name != key}
    with pytest.raises(InvalidInput, match=f"lack '{key or part}'"):
        card_for(kept)


def test_every_family_is_a_card(card):
    assert isinstance(card, WanCard)
    assert (card.family, card.pipeline_class, card.task_type) == ("wan", "WanPipeline", "T2V")
