"""Wall time of denoise + decode against diffusers.WanPipeline, interleaved A-B-A-B on the same cores, as a ratio.

Predicted on one CPU rank for the demo model: below 1. Both guidance branches share one forward (diffusers runs two),
the control plane costs about 1 ms per item of 100 ms, and the arithmetic is the same otherwise. On two ranks of two
cores, Ulysses: about 1 at 80 tokens, since every layer adds two all-to-alls of a few hundred microseconds to 1 ms of
compute. The layout that a start with nothing set chooses there, one guidance branch on each rank, has one collective a
step: two thirds of the time of one rank, whose joint forward of both branches costs less than two of one.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from bench.report import machine, save, spread
from framemesh import Frames, Generator, SamplingParams
from launch.weights import resolve_model

PROMPT = "a red circle moving right"
MESHES: dict[str, dict[str, Any]] = {
    "one_rank": {"num_gpus": 1},
    "ulysses_2": {"num_gpus": 2, "ulysses_degree": 2},
    "two_ranks_nothing_set": {"num_gpus": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("--model", default="demo", help="diffusers folder, hub id or demo")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=[*MESHES])
    args = parser.parse_args()
    where = machine()
    torch.set_num_threads(1)
    pipeline = load_pipeline(args.model)
    figures = {name: _compare(args.model, MESHES[name], args.pairs, pipeline) for name in args.meshes}
    save("latency", where, figures)


def _compare(model: str, settings: dict[str, Any], pairs: int, pipeline: Any) -> dict[str, Any]:
    with Generator.from_pretrained(model, dit_precision="fp32", **settings) as generator:
        params = generator.check(SamplingParams(prompt=PROMPT, seed=1))
        _ours(generator), _theirs(pipeline, params)
        rows = [(_ours(generator), _theirs(pipeline, params)) for _ in range(pairs)]
    return {
        "ratio_ours_over_diffusers": spread([ours["compute"] / theirs for ours, theirs in rows]),
        "ratio_with_queue_and_transport": spread([ours["total"] / theirs for ours, theirs in rows]),
        "first_frame_over_total": spread([ours["first_frame"] / ours["total"] for ours, _ in rows]),
        "first_frame_over_one_shot": spread([ours["first_frame"] / theirs for ours, theirs in rows]),
        "ours_s": spread([ours["compute"] for ours, _ in rows]),
        "diffusers_s": spread([theirs for _, theirs in rows]),
    }


def _ours(generator: Generator) -> dict[str, float]:
    """Seconds: denoise + decode by the rank's clock, and submit to first frame and to the end by ours."""
    started, first_frame, compute = time.monotonic(), 0.0, 0.0
    for event in generator.stream(SamplingParams(prompt=PROMPT, seed=1)):
        if isinstance(event, Frames):
            first_frame = first_frame or time.monotonic() - started
            compute = event.timings["denoise"] + event.timings["decode"]
    return {"total": time.monotonic() - started, "first_frame": first_frame, "compute": compute}


def _theirs(pipeline: Any, params: Any) -> float:
    """Seconds of the pipeline's call on ready embeddings: denoise + decode."""
    embeddings, negative = pipeline.encode_prompt(params.prompt, max_sequence_length=512)
    started = time.monotonic()
    pipeline(
        prompt_embeds=embeddings,
        negative_prompt_embeds=negative,
        height=params.height,
        width=params.width,
        num_frames=params.num_frames,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(params.seed),
    )
    return time.monotonic() - started


def load_pipeline(model: str) -> Any:
    from diffusers import WanPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = WanPipeline.from_pretrained(resolve_model(model), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
