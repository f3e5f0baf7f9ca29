"""How well the cost model predicts: its median absolute percentage error over items, and the ETA of requests.

Wanted: at most 10 % on the demo model. `error` is what `framemesh top` shows: over the latest 256 items.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"

from bench.report import machine, save, spread
from framemesh import Generator, Progress, SamplingParams
from launch.observe import Observer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prediction", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=30)
    args = parser.parse_args()
    where = machine()
    # An empty cache folder: what is measured is what a first start knows.
    with (
        tempfile.TemporaryDirectory(prefix="framemesh-") as cache,
        Generator.from_pretrained(
            "demo", num_gpus=args.ranks, ulysses_degree=args.ranks, cost_cache=cache
        ) as generator,
    ):
        first = _eta_error(generator, 0)
        etas = [_eta_error(generator, seed) for seed in range(1, args.requests)]
        with Observer(generator.scheduler_endpoint) as observer:
            error = observer.look().cost_error
    save(
        "prediction",
        where,
        {"wanted": 0.1, "item_error": error, "first_eta_error": first, "eta_error": spread(etas), "ranks": args.ranks},
    )


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
