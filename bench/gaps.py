"""Control-plane cost: the gap between the end of one item's compute and the start of the next, on the rank's own clock.

Predicted: two ZMQ hops of 40 us, one plan() and two msgpack round trips, about 0.5 ms of Python in two processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from bench.report import machine, save, spread
from framemesh import Generator
from runtime.trace import TraceLine, read_trace


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gaps", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory(prefix="framemesh-") as folder:
        trace = Path(folder) / "trace.jsonl"
        with Generator.from_pretrained(
            "demo", num_gpus=args.ranks, ulysses_degree=args.ranks, trace_path=str(trace)
        ) as generator:
            generator.generate("a red circle moving right", seed=1)
            generator.generate("a red circle moving right", seed=1, num_inference_steps=args.steps)
        items = read_trace(trace)
    gaps = _gaps_ms(items)
    save("gaps", where, {"wanted_ms": 2.0, "gap_ms": spread(gaps), "items": len(items), "ranks": args.ranks})


def _gaps_ms(items: list[TraceLine]) -> list[float]:
    """Milliseconds between neighbouring items of each rank; pauses over 100 ms lie between requests."""
    by_rank: dict[int, list[TraceLine]] = defaultdict(list)
    for item in items:
        by_rank[item.rank].append(item)
    gaps = []
    for rows in by_rank.values():
        rows.sort(key=lambda row: row.seq)
        for before, after in pairwise(rows):
            # Ranks other than the decoding one sit out its items: only direct neighbours count.
            if after.seq == before.seq + 1:
                gaps.append(1000 * (after.started - before.finished))
    return [gap for gap in gaps if gap < 100]


if __name__ == "__main__":
    main()
