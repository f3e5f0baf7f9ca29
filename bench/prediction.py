"""How well the cost model predicts: its median absolute percentage error over items, and the ETA of requests.

Wanted: at most 10 % on the demo model. `item_error` is what `framemesh top` shows, over the latest 256 items, once for
each start of the mesh with an empty cost cache: after equal requests one by one, then after many of several shapes at
once, which share batches of sizes that come for the first time.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from bench.report import machine, save, spread
from framemesh import Generator, Progress, SamplingParams
from launch.observe import Observer

AT_ONCE = 8
SHAPES: list[dict[str, Any]] = [
    {"num_frames": 1, "num_inference_steps": 4},
    {"num_frames": 17, "num_inference_steps": 20},
    {"num_frames": 33, "num_inference_steps": 20},
    {"num_frames": 17, "num_inference_steps": 30, "guidance_scale": 1.0},
    {"num_frames": 17, "num_inference_steps": 10, "height": 96, "width": 96},
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prediction", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--starts", type=int, default=3)
    args = parser.parse_args()
    where = machine()
    runs = [_run(args.ranks, args.requests) for _ in range(args.starts)]
    figures: dict[str, Any] = {
        "wanted": 0.1,
        "item_error": spread([run.item_error for run in runs]),
        "mixed_item_error": spread([run.mixed_error for run in runs]),
        "first_eta_error": spread([run.eta_errors[0] for run in runs]),
        "eta_error": spread([error for run in runs for error in run.eta_errors[1:]]),
        "requests": args.requests,
        "ranks": args.ranks,
    }
    save("prediction", where, figures)


@dataclass(frozen=True)
class Run:
    """What one start of the mesh showed."""

    item_error: float
    mixed_error: float
    eta_errors: list[float]
    """By request; the first is that of a mesh that has only warmed up."""


def _run(ranks: int, requests: int) -> Run:
    # An empty cache folder: what is measured is what a first start knows.
    with (
        tempfile.TemporaryDirectory(prefix="framemesh-") as cache,
        Generator.from_pretrained("demo", num_gpus=ranks, ulysses_degree=ranks, cost_cache=cache) as generator,
    ):
        errors = [_eta_error(generator, seed) for seed in range(requests)]
        alone = _item_error(generator)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(generator.generate, _mix(2 * requests)))
        return Run(alone, _item_error(generator), errors)


def _item_error(generator: Generator) -> float:
    with Observer(generator.scheduler_endpoint) as observer:
        error = observer.look().cost_error
    assert error is not None
    return error


def _mix(count: int) -> list[SamplingParams]:
    rng = random.Random(0)
    return [SamplingParams(prompt="a red circle", seed=n, **rng.choice(SHAPES)) for n in range(count)]


def _eta_error(generator: Generator, seed: int) -> float:
    """|promised - real| / real seconds, from the first word to the last frame."""
    started, promised = time.monotonic(), 0.0
    for event in generator.stream(SamplingParams(prompt="a red circle moving right", seed=seed)):
        if isinstance(event, Progress) and not promised:
            promised = event.eta_s
    took = time.monotonic() - started
    return abs(promised - took) / took


if __name__ == "__main__":
    main()
