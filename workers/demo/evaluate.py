"""Puts a model's adherence to its prompts into a table: what the judge sees against what was asked.

    python -m workers.demo.evaluate --folder workers/demo/model --output table.md
    python -m workers.demo.evaluate --guidance 1 3 5 --sheet guidance.png
    python -m workers.demo.evaluate --size 17 64 64 --size 17 96 96 --size 1 64 64
    python -m workers.demo.evaluate --videos served/

Several values of an option are compared with each other: the same prompts, the same seeds. The judge is measured
first, on drawn clips (it must find at least 99 % right) and on the VAE's reconstructions of them.
MP4s made elsewhere carry their prompt as JSON in the container's comment, as the gateway writes it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from av.video.reformatter import ColorRange, Colorspace
from diffusers import WanPipeline
from PIL import Image

from workers.demo.data import (
    ATTRIBUTES,
    Attributes,
    Scene,
    held_out_prompts,
    parse,
    render,
    sample_scene,
    without_motion,
)
from workers.demo.judge import UNSEEN, Verdict, judge

SHIPPED = Path(__file__).parent / "model"
SIZE = (17, 64, 64)
BATCH = 16
FIRST_SEED = 1000
"""Prompt number i is sampled with seed FIRST_SEED + i, whatever the batch."""


@dataclass(frozen=True)
class Setting:
    """How clips are sampled; size is frames, height, width."""

    size: tuple[int, int, int] = SIZE
    steps: int = 20
    guidance: float = 3.0

    def __str__(self) -> str:
        frames, height, width = self.size
        sampled = f"{self.steps} steps, guidance {self.guidance:g}"
        return sampled if self.size == SIZE else f"{width}x{height}, {frames} frames, {sampled}"


@dataclass(frozen=True)
class Judged:
    """One clip's row: what was asked and what was found."""

    prompt: str
    wanted: Attributes
    found: Verdict

    def right(self, attribute: str) -> bool:
        """One frame cannot show a wrong motion."""
        found = getattr(self.found, attribute)
        return bool(found in (getattr(self.wanted, attribute), UNSEEN))

    @property
    def all_right(self) -> bool:
        return all(self.right(attribute) for attribute in ATTRIBUTES)


def to_bytes(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8."""
    return (video_BCTHW.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 4, 1)


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """In fp32: on a CPU bf16 is no faster for a model of this size."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompts: Sequence[str], setting: Setting) -> Iterator[torch.Tensor]:
    """One video (T, H, W, 3) uint8 per prompt."""
    frames, height, width = setting.size
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        seeds = range(FIRST_SEED + start, FIRST_SEED + start + len(part))
        videos = pipeline(
            prompt=part,
            negative_prompt=[""] * len(part),
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).frames
        yield from (torch.from_numpy(videos) * 255).round().byte()


def judge_drawn(count: int, seed: int = 5) -> list[Judged]:
    """The judge's own mistakes: clips that are right by construction."""
    return [_judged(scene, video) for scene, video in _drawn(count, seed)]


def judge_reconstructed(vae: Any, count: int, seed: int = 5) -> tuple[list[Judged], torch.Tensor]:
    """What the VAE alone costs; with the PSNR of each clip in dB."""
    rows, noise = [], []
    for scene, video in _drawn(count, seed):
        pixels = (video[None].to(vae.device).permute(0, 4, 1, 2, 3) / 127.5 - 1).to(vae.dtype)
        with torch.no_grad():
            again = to_bytes(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)[0].cpu()
        rows.append(_judged(scene, again))
        noise.append(psnr(again, video))
    return rows, torch.tensor(noise)


def psnr(video: torch.Tensor, original: torch.Tensor) -> float:
    error = (video.float() - original.float()).square().mean().clamp(min=1e-3)
    return float(10 * (255**2 / error).log10())


def judge_folder(folder: Path) -> tuple[list[Judged], list[torch.Tensor]]:
    """Every MP4 in a folder against the prompt that it carries.

    Raises:
        ValueError: a file without a prompt, or with one that names no shape or colour of this world.
    """
    videos = {path: read_video(path) for path in sorted(folder.glob("*.mp4"))}
    rows = [Judged(prompt, parse(prompt), judge(video)) for prompt, video in videos.values()]
    return rows, [video for _, video in videos.values()]


def read_video(path: Path) -> tuple[str, torch.Tensor]:
    """An MP4's prompt and its frames (T, H, W, 3) uint8."""
    with av.open(path) as container:
        about = json.loads(container.metadata.get("comment") or "{}")
        if "prompt" not in about:
            raise ValueError(f'{path}: no {{"prompt": …}} in the container\'s comment')
        frames = [
            torch.from_numpy(
                frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709, src_color_range=ColorRange.MPEG)
            )
            for frame in container.decode(video=0)
        ]
    return about["prompt"], torch.stack(frames)


def table(rows: dict[str, list[Judged]]) -> str:
    """Markdown: percent right per attribute ("-" where nothing can show it), mean overlap with the ideal outline."""
    head = ("", "clips", *ATTRIBUTES, "all four", "outline")
    lines = [head, ("---",) * len(head)]
    for name, judged in rows.items():
        right = [_share(judged, attribute) for attribute in ATTRIBUTES]
        outline = sum(row.found.outline for row in judged) / max(len(judged), 1)
        lines.append(
            (name, str(len(judged)), *right, _percent([row.all_right for row in judged]), f"{outline * 100:.1f}")
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _share(judged: list[Judged], attribute: str) -> str:
    shown = [row.right(attribute) for row in judged if getattr(row.found, attribute) != UNSEEN]
    return _percent(shown) if shown else "-"


def paired(rows: dict[str, list[Judged]]) -> str:
    """Markdown: on how many of the same prompts a row is wholly right where the first row is not, and the reverse."""
    (first, base), *others = rows.items()
    lines = [f"| against {first} | only here right | only there right |", "|---|---|---|"]
    for name, judged in others:
        both = [(row.all_right, other.all_right) for row, other in zip(judged, base, strict=True)]
        lines.append(f"| {name} | {both.count((True, False))} | {both.count((False, True))} |")
    return "\n".join(lines)


def breakdown(judged: list[Judged]) -> str:
    """Markdown: right ones of each kind of shape and motion, and what the wrong ones were taken for."""
    lines = ["| asked | right | taken for |", "|---|---|---|"]
    for attribute in ("shape", "motion"):
        shown = [row for row in judged if getattr(row.found, attribute) != UNSEEN]
        for name in sorted({getattr(row.wanted, attribute) for row in shown}):
            found = [getattr(row.found, attribute) for row in shown if getattr(row.wanted, attribute) == name]
            wrong = sorted({other for other in found if other != name}, key=lambda other: -found.count(other))
            taken = ", ".join(f"{found.count(other)} {other}" for other in wrong)
            lines.append(f"| {name} | {found.count(name)}/{len(found)} | {taken} |")
    return "\n".join(lines)


def contact_sheet(videos: Sequence[torch.Tensor], path: Path, frames: int = 5, columns: int = 3) -> None:
    """A PNG with some frames of each video side by side, several videos a row."""
    strips = []
    for video in videos:
        picked = torch.linspace(0, len(video) - 1, min(frames, len(video))).round().long()
        strips.append(torch.cat([*video[picked]], dim=1))
    strips += [torch.zeros_like(strips[0])] * (-len(strips) % columns)
    rows = [torch.cat(strips[i : i + columns], dim=1) for i in range(0, len(strips), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def animation(videos: Sequence[torch.Tensor], path: Path, columns: int = 4, scale: int = 2, fps: int = 8) -> None:
    """A looping GIF of videos of one size, side by side."""
    blank = [torch.zeros_like(videos[0])] * (-len(videos) % columns)
    tiles = [*videos, *blank]
    rows = [torch.cat(tiles[i : i + columns], dim=2) for i in range(0, len(tiles), columns)]
    wall = torch.cat(rows, dim=1).repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    colours = Image.fromarray(wall.flatten(0, 1).numpy()).quantize(40)
    frames = [Image.fromarray(frame.numpy()).quantize(palette=colours, dither=Image.Dither.NONE) for frame in wall]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0, optimize=True)


def _drawn(count: int, seed: int) -> Iterator[tuple[Scene, torch.Tensor]]:
    rng = random.Random(f"drawn {seed}")
    for _ in range(count):
        scene = sample_scene(rng, held_out=True)
        yield scene, to_bytes(render([scene], *SIZE))[0]


def _judged(wanted: Attributes, video: torch.Tensor) -> Judged:
    return Judged("", wanted, judge(video))


def _percent(right: list[bool]) -> str:
    return f"{100 * sum(right) / max(len(right), 1):.1f}"


def _report(args: argparse.Namespace, say: Callable[[str], None]) -> list[list[torch.Tensor]]:
    """The videos of each setting."""
    drawn = judge_drawn(args.drawn)
    if sum(row.all_right for row in drawn) < 0.99 * len(drawn):
        raise SystemExit(f"the judge itself is wrong about drawn clips:\n\n{breakdown(drawn)}")
    rows = {"drawn (the judge's own mistakes)": drawn}
    if args.videos:
        served, videos = judge_folder(args.videos)
        say(table(rows | {f"{args.videos.name}/": served}))
        say(breakdown(served))
        return [videos]
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(args.folder, device)
    rows["VAE reconstructions"], noise = judge_reconstructed(pipeline.vae, args.reconstructions)
    asked: list[tuple[str, Attributes]] = [(prompt, parse(prompt)) for prompt in args.ask or ()]
    asked = asked or [*held_out_prompts(args.prompts, args.seed)]
    settings = [
        Setting(tuple(s), *how) for s, *how in itertools.product(args.size or [SIZE], args.steps, args.guidance)
    ]
    began = time.monotonic()
    made = [_sampled(pipeline, asked, setting) for setting in settings]
    seconds = (time.monotonic() - began) / sum(len(videos) for _, videos in made)
    compared = {str(setting): judged for setting, (judged, _) in zip(settings, made, strict=True)}
    say(table(rows | compared))
    if len(compared) > 1:
        say(paired(compared))
    say(
        f"VAE: {noise.mean():.1f} dB PSNR on average, {noise.min():.1f} dB at worst ({len(noise)} clips). "
        f"{seconds:.2f} s per clip in batches of {BATCH}."
    )
    for name, judged in compared.items():
        say(f"{name}:\n\n{breakdown(judged)}")
    return [videos for _, videos in made]


def _sampled(
    pipeline: Any, asked: list[tuple[str, Attributes]], setting: Setting
) -> tuple[list[Judged], list[torch.Tensor]]:
    """One frame is asked for without a motion."""
    still = setting.size[0] == 1
    prompts = [without_motion(prompt) if still else prompt for prompt, _ in asked]
    videos = list(generate(pipeline, prompts, setting))
    judged = [Judged(p, scene, judge(v)) for p, (_, scene), v in zip(prompts, asked, videos, strict=True)]
    return judged, videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=SHIPPED, help="a WanPipeline folder; the shipped one if not said"
    )
    parser.add_argument("--videos", type=Path, help="judge the MP4s in this folder instead of making any")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument(
        "--size",
        type=int,
        nargs=3,
        action="append",
        metavar=("FRAMES", "HEIGHT", "WIDTH"),
        help="may be said several times; one frame is asked for without a motion",
    )
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--seed", type=int, default=77, help="of the list of held-out prompts")
    parser.add_argument("--ask", action="append", metavar="PROMPT", help="your own instead; may be said several times")
    parser.add_argument("--drawn", type=int, default=200, help="drawn clips that the judge itself is measured on")
    parser.add_argument("--reconstructions", type=int, default=96)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the report into this file, too")
    parser.add_argument("--sheet", type=Path, help="a contact sheet (PNG) of the first clips; settings are columns")
    parser.add_argument("--gif", type=Path, help="write the first 8 clips as one looping GIF")
    args = parser.parse_args()
    if (args.sheet or args.gif) and len(args.size or ()) > 1:
        parser.error("--sheet and --gif show clips of one --size")
    report: list[str] = []
    videos = _report(args, report.append)
    text = "\n\n".join(report) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)
    # zip, then chain: the clips of one prompt stand side by side.
    shown = list(itertools.chain(*zip(*videos, strict=True)))
    columns = len(videos) if len(videos) > 1 else 3
    if args.sheet:
        contact_sheet(shown[: 20 * columns], args.sheet, columns=columns)
    if args.gif:
        animation(shown[:8], args.gif)


if __name__ == "__main__":
    main()
