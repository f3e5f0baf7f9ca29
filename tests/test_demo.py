"""The demo's world, its judge and its training: what is drawn is found again, and every stage goes on where it was."""

import itertools
import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

from workers.demo import evaluate, train
from workers.demo.data import (
    ATTRIBUTES,
    MOTIONS,
    Attributes,
    Scene,
    describe,
    held_out_prompts,
    is_held_out,
    parse,
    render,
    training_scene,
    without_motion,
)
from workers.demo.denoise import CountedText, DenoiserLoss, _sigmas
from workers.demo.evaluate import to_bytes
from workers.demo.judge import judge
from workers.demo.trainer import Schedule, Trainer
from workers.demo.vae import decode_clip, moments, widened

SCENE = Scene("star", "yellow", "blue", "right", "medium", 0.42, 0.5, 0.5, 0.35, 180.0)


def drawn(scene: Scene, frames: int = 17, height: int = 64, width: int = 64) -> torch.Tensor:
    return to_bytes(render([scene], frames, height, width))[0]


def found(scene: Scene, **size: int) -> dict[str, str]:
    verdict = judge(drawn(scene, **size))
    return {name: getattr(verdict, name) for name in ATTRIBUTES}


def asked(scene: Scene) -> dict[str, str]:
    return {name: getattr(scene, name) for name in ATTRIBUTES}


def test_the_same_seed_draws_the_same_clips_with_the_same_words():
    scenes = [training_scene(3, i) for i in range(4)]
    assert scenes == [training_scene(3, i) for i in range(4)]
    assert scenes != [training_scene(4, i) for i in range(4)]
    assert torch.equal(render(scenes, 5, 32, 32), render(scenes, 5, 32, 32))
    assert held_out_prompts(5) == held_out_prompts(5)
    assert held_out_prompts(5) != held_out_prompts(5, seed=1)


def test_held_out_prompts_show_nothing_that_is_trained_on():
    assert all(is_held_out(scene) for _, scene in held_out_prompts(50))
    assert not any(is_held_out(training_scene(0, i)) for i in range(200))


def test_a_prompt_is_understood_in_all_its_wordings():
    rng = random.Random(0)
    for index in range(500):
        scene = training_scene(1, index)
        assert asdict(parse(describe(scene, rng))) == asked(scene)


def test_what_is_not_said_is_still_and_on_black():
    assert parse("A big red ball.") == Attributes("circle", "red", "black", "still")
    with pytest.raises(ValueError, match="no colour"):
        parse("a square")


def test_a_picture_is_asked_for_without_a_motion():
    assert without_motion("A big red ball is moving to the left on a blue background.") == (
        "A big red ball on a blue background."
    )
    rng = random.Random(1)
    for index in range(200):
        scene = training_scene(1, index)
        still = parse(without_motion(describe(scene, rng)))
        assert still == replace(parse(describe(scene, rng)), motion="still")


def test_a_shape_stays_inside_the_frame():
    for index in range(40):
        video = render([training_scene(2, index)], 9, 64, 64)[0]
        background = video[:, :1, :1, :1]
        for edge in (video[:, :, 0], video[:, :, -1], video[..., 0], video[..., -1]):
            assert torch.allclose(edge, background.view(3, 1, 1).expand_as(edge))


def test_antialiasing_keeps_the_area_at_any_size():
    small, large = (render([SCENE], 1, side, side) for side in (64, 256))
    shares = [(video - video[:, :, :, :1, :1]).abs().mean() for video in (small, large)]
    assert shares[0] == pytest.approx(float(shares[1]), rel=0.02)


def test_the_judge_finds_at_least_99_percent_of_what_is_drawn():
    rows = evaluate.judge_drawn(100)
    for attribute in ATTRIBUTES:
        assert sum(row.right(attribute) for row in rows) >= 99, attribute


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("size", [{"height": 96, "width": 96}, {"frames": 33}, {"height": 64, "width": 128}])
def test_the_judge_reads_other_sizes(motion: str, size: dict[str, int]):
    scene = replace(SCENE, motion=motion, travel=0.35)
    assert found(scene, **size) == asked(scene)


def test_one_frame_shows_no_motion_and_so_none_is_wrong():
    verdict = judge(drawn(SCENE, frames=1))
    assert (verdict.shape, verdict.motion) == ("star", "unseen")
    judged = evaluate.Judged("", SCENE, verdict)
    assert judged.all_right
    assert evaluate.table({"still": [judged]}).endswith(
        f"| 100.0 | 100.0 | 100.0 | - | 100.0 | {verdict.outline * 100:.1f} |"
    )


def test_the_judge_sees_a_wrong_colour_shape_background_and_motion():
    wrong = {"shape": "square", "colour": "white", "background": "black", "motion": "left"}
    for attribute, value in wrong.items():
        seen = found(replace(SCENE, **{attribute: value}))
        assert [name for name in ATTRIBUTES if seen[name] != asked(SCENE)[name]] == [attribute]


def test_a_blob_is_no_star_and_an_empty_frame_is_nothing():
    video = drawn(SCENE).float()
    blurred = torch.nn.functional.avg_pool2d(video.movedim(3, 1), 11, stride=1, padding=5, count_include_pad=False)
    assert judge(blurred.movedim(1, 3).round().byte()).shape != "star"
    assert judge(torch.full((5, 64, 64, 3), 12, dtype=torch.uint8)).colour == "none"


def test_videos_are_judged_by_the_prompt_they_carry(tmp_path: Path):
    prompt = describe(SCENE, random.Random(0), unsaid=0)
    write_video(tmp_path / "a.mp4", drawn(SCENE), {"prompt": prompt})
    rows, videos = evaluate.judge_folder(tmp_path)
    assert rows[0].all_right
    assert videos[0].shape == (17, 64, 64, 3)
    write_video(tmp_path / "b.mp4", drawn(SCENE), {})
    with pytest.raises(ValueError, match=r"b\.mp4: no .*prompt"):
        evaluate.judge_folder(tmp_path)


def test_settings_stand_side_by_side_with_the_same_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report, sheet = tmp_path / "report.md", tmp_path / "sheet.png"
    asked = "a red circle moving right"
    options = ["--ask", asked, "--guidance", "1", "5", "--steps", "1", "2", "--drawn", "1", "--reconstructions", "1"]
    monkeypatch.setattr("sys.argv", ["evaluate", *options, "--output", str(report), "--sheet", str(sheet)])
    evaluate.main()
    lines = report.read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:8]] == [
        f"{steps} steps, guidance {guidance}" for steps in (1, 2) for guidance in (1, 5)
    ]
    strips = torch.from_numpy(np.array(Image.open(sheet))).split(5 * 64, dim=1)
    assert len(strips) == 4
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(strips, 2))
    pipeline = evaluate.load_pipeline(evaluate.SHIPPED, torch.device("cpu"))
    (alone,) = evaluate.generate(pipeline, [asked], evaluate.Setting(steps=2, guidance=5))
    assert torch.equal(torch.cat([*alone[::4]], dim=1), strips[3])


def write_video(path: Path, video: torch.Tensor, about: dict[str, str]) -> None:
    with av.open(path, "w") as container:
        container.metadata["comment"] = json.dumps(about)
        stream = container.add_stream("libx264", rate=8, width=video.shape[2], height=video.shape[1])
        for frame in video.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_a_table_has_a_row_per_kind_of_clip():
    rows = evaluate.judge_drawn(3)
    lines = evaluate.table({"drawn": rows}).splitlines()
    assert lines[0].split("|")[3:7] == [f" {name} " for name in ATTRIBUTES]
    assert lines[2].startswith("| drawn | 3 | 100.0 |")
    assert "taken for" in evaluate.breakdown(rows)


def test_settings_are_compared_prompt_by_prompt():
    right = evaluate.Judged("", SCENE, judge(drawn(SCENE)))
    wrong = evaluate.Judged("", replace(SCENE, colour="red"), right.found)
    base, other = [right, wrong, wrong, right], [right, right, right, wrong]
    assert evaluate.paired({"a": base, "b": other}).splitlines() == [
        "| against a | only here right | only there right |",
        "|---|---|---|",
        "| b | 2 | 1 |",
    ]


TINY = train.Recipe(
    text={"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1},
    vae={"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1]},
    transformer={"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 32},
    sizes={(5, 16, 16): 0.7, (1, 16, 16): 0.3},
    clips=70,
    text_batch=2,
    pixels=2 * 5 * 16 * 16,
    tokens=4,
    schedules=dict.fromkeys(("text", "vae", "decoder", "transformer"), Schedule(steps=2, lr=1e-3, warmup=1)),
)


def workshop(folder: Path, recipe: train.Recipe = TINY) -> train.Workshop:
    return train.Workshop(folder / "state", folder / "out", recipe, torch.device("cpu"), fast=False)


def test_all_stages_make_a_folder_that_diffusers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shop = workshop(tmp_path)
    for stage in train.STAGES:
        train.MAKE[stage](shop)
    pipeline = WanPipeline.from_pretrained(shop.out, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt, _ in held_out_prompts(2)]
    videos = list(evaluate.generate(pipeline, prompts, evaluate.Setting((5, 16, 16), steps=2)))
    assert [video.shape for video in videos] == [(5, 16, 16, 3)] * 2
    assert json.loads((shop.out / "framemesh.json").read_text())["defaults"]["num_frames"] == 5
    assert not any(str(tmp_path) in path.read_text() for path in shop.out.rglob("*.json"))
    assert {path.name for path in (shop.state / "sheets").iterdir()} == {
        f"{stage}_000002.png" for stage in ("vae", "decoder", "transformer")
    }
    assert "transformer 2/2 total" in capsys.readouterr().out
    other = replace(shop, recipe=replace(TINY, schedules=TINY.schedules | {"vae": Schedule(steps=3, lr=1e-2)}))
    with pytest.raises(ValueError, match="wide decoder already"):
        train.train_vae(other)
    shutil.rmtree(shop.parts / "vae")
    train.train_vae(other)
    with pytest.raises(ValueError, match="another VAE encoder"):
        train.make_latents(other)


def random_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = train._new_vae(TINY).requires_grad_(False)
    for weight in vae.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
    return vae


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_a_clip_in_one_pass_is_the_clip_by_latent_frames(frames: int):
    vae, video = random_vae(), torch.rand(2, 3, frames, 16, 24) * 2 - 1
    latents = vae.encode(video).latent_dist.mean
    torch.testing.assert_close(moments(vae, video).chunk(2, 1)[0], latents)
    torch.testing.assert_close(decode_clip(vae, latents).clamp(-1, 1), vae.decode(latents).sample)


@pytest.mark.parametrize("times", [2, 3])
def test_a_widened_decoder_gives_the_same_and_its_copies_can_learn_to_differ(times: int):
    vae = random_vae()
    latents, wide = torch.randn(1, 4, 3, 2, 3), widened(vae, times)
    assert wide.config.decoder_base_dim == 4 * times
    torch.testing.assert_close(wide.decode(latents).sample, vae.decode(latents).sample)
    weight = wide.decoder.conv_out.weight.chunk(times, 1)
    assert not torch.allclose(weight[0], weight[1])


def test_small_sigmas_are_trained_on_too():
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.cat([_sigmas(32, generator) for _ in range(500)])
    even, shifted = 0.1, 0.1 / (3 - 2 * 0.1)
    assert float((sigmas < 0.1).float().mean()) == pytest.approx(even / 4 + shifted * 3 / 4, rel=0.03)


def test_a_stopped_run_ends_where_an_uninterrupted_one_does(tmp_path: Path):
    ends = [_train_line(tmp_path / "whole", stops=[6]), _train_line(tmp_path / "parts", stops=[2, 5, 6])]
    assert torch.equal(ends[0], ends[1])


def _train_line(path: Path, stops: list[int]) -> torch.Tensor:
    """Stopped as by a kill after a save: the schedule says 6, the loss breaks off."""
    weight = torch.empty(0)
    for stop in stops:
        torch.manual_seed(0)
        line = torch.nn.Linear(16, 16)
        trainer = Trainer(line, path / "line.safetensors", Schedule(steps=6, lr=1e-2, warmup=1), save_seconds=-1)

        def loss(step: int, line: torch.nn.Linear = line, stop: int = stop) -> dict[str, torch.Tensor]:
            if step == stop:
                raise InterruptedError
            inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            return {"total": (line(inputs) - inputs.flip(1)).square().mean()}

        try:
            trainer.run(loss, log=lambda line: None)
        except InterruptedError:
            assert trainer.step == stop
        with trainer.average():
            weight = line.weight.detach().clone()
    return weight


def test_counted_padding_is_the_same_as_the_pipelines_many_zeros(tmp_path: Path):
    shop = workshop(tmp_path)
    for stage in ("tokenizer", "text"):
        train.MAKE[stage](shop)
    torch.manual_seed(0)
    encoder = train.UMT5EncoderModel.from_pretrained(shop.parts / "text_encoder")
    transformer = train.WanTransformer3DModel(
        **TINY.transformer, in_channels=4, out_channels=4, text_dim=32, patch_size=(1, 2, 2)
    )
    latents, sigma = torch.randn(1, 4, 2, 2, 2), torch.tensor([500.0])
    loss = DenoiserLoss(train.load_tokenizer(shop), encoder, transformer)
    with torch.no_grad():
        hidden = loss._embed(["a red star falling"], torch.device("cpu"))
        few = transformer(latents, sigma, hidden, return_dict=False)[0]
        counted = next(iter(transformer.blocks)).attn2.processor
        assert isinstance(counted, CountedText)
        counted.bias = None
        many = torch.cat([hidden, hidden.new_zeros(1, 512 - hidden.shape[1], 32)], dim=1)
        full = transformer(latents, sigma, many, return_dict=False)[0]
    assert torch.allclose(few, full, atol=1e-5)
