"""What a layout costs and saves: seconds per step, bytes moved, and efficiency on equal cores, on a random Wan.

N ranks with one thread each against one rank with N threads: the same cores, so an efficiency of 1 means that moving
tensors between processes costs no more than threads cost inside one.

Predicted, for the default model (2,048 tokens, width 384, 3 layers, both guidance branches) on 2 ranks: Ulysses and
ring each send 19.4 MB per rank and step, CFG parallelism 0.5 MB. gloo moves about 1.8 GB/s, so about 10 ms of a step
of more than a second; ring hides its share behind the kernel. Efficiency of at least 0.95 everywhere, above 1 where
threads scale badly.

Measured: guidance groups 1.05, ring 0.99, Ulysses 0.93. A step takes 0.4 s and not more than a second, so the same
bytes weigh more; and of what Ulysses pays, gloo's transfers are the smaller part: q, k, v and the output are copied
once into and once out of the order in which they travel, which are fresh pages each time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from bench.report import machine, save, spread
from runtime.layout import Layout
from runtime.models.wan import WanCard
from runtime.protocol import Request
from runtime.sampling import ResolvedParams, SamplingParams
from runtime.traffic import step_traffic, work_of

HEADS, HEAD_DIM, LAYERS, FFN, CHANNELS = 8, 48, 3, 1536, 16
CONFIGS: dict[str, dict[str, Any]] = {
    "model_index": {},
    "transformer": {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": LAYERS,
        "ffn_dim": FFN,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": (1, 2, 2),
        "text_dim": 64,
        "freq_dim": 64,
    },
    "vae": {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "base_dim": 8},
}
TEXT = 24
"""Tokens of a prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="per measurement")
    parser.add_argument("--frames", type=int, default=29, help="29: 2,048 tokens")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    where = machine()
    save("parallel", where, measure(args))


def card() -> WanCard:
    return WanCard.from_configs(CONFIGS)


def params_of(args: argparse.Namespace) -> ResolvedParams:
    size, frames = args.size, args.frames
    return card().check(
        SamplingParams(prompt="-", seed=0, height=size, width=size, num_frames=frames, num_inference_steps=1000)
    )


def layouts(num_ranks: int) -> list[Layout]:
    """Every mesh of so many ranks, at most two guidance groups."""
    degrees = [d for d in range(1, num_ranks + 1) if num_ranks % d == 0]
    meshes = (Layout(*axes) for axes in itertools.product([d for d in degrees if d <= 2], degrees, degrees))
    return [layout for layout in meshes if layout.num_ranks == num_ranks]


def bytes_per_step(layout: Layout, card: WanCard, params: ResolvedParams, itemsize: int = 4) -> float:
    """What a rank sends in one step of one request, by the formulas that `framemesh tune` predicts with."""
    return step_traffic(work_of(card, CONFIGS, params), layout, itemsize).total


# ---- the parent --------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved: one measurement of the single rank, one of every layout, and again."""
    meshes, one = layouts(args.ranks), Layout()
    seconds: dict[Layout, list[float]] = {layout: [] for layout in (one, *meshes)}
    moved: dict[Layout, float] = {}
    with crew(args, 1, args.ranks) as single, crew(args, args.ranks, 1) as ranks:
        for turn in range(args.pairs + 1):
            for layout in (one, *meshes):
                answers = ask(single if layout == one else ranks, layout)
                if turn:
                    # The first turn warms up.
                    seconds[layout].append(max(answer["seconds"] for answer in answers))
                moved[layout] = sum(answer["bytes"] for answer in answers) / len(answers)
    model, params = card(), params_of(args)
    rows = {
        str(layout): {
            "seconds_per_step": spread(seconds[layout]),
            "efficiency": spread([a / b for a, b in zip(seconds[one], seconds[layout], strict=True)]),
            "bytes_per_rank_and_step": moved[layout],
            "bytes_by_formula": bytes_per_step(layout, model, params),
        }
        for layout in meshes
    }
    return {
        "tokens": model.tokens(params),
        "steps_per_measurement": args.steps,
        f"one_rank_{args.ranks}_threads_seconds_per_step": spread(seconds[one]),
        "layouts": rows,
    }


@contextmanager
def crew(
    args: argparse.Namespace, num_ranks: int, threads: int, module: str = "bench.parallel"
) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks that wait for orders; a waiting one uses no core."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        **{"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"},
    }
    sizes = ["--steps", str(args.steps), "--frames", str(args.frames), "--size", str(args.size)]
    command = [sys.executable, "-m", module, *sizes, "--worker"]
    processes = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            # Closes the pipes and waits.
            process.__exit__(None, None, None)


def ask(processes: list[subprocess.Popen[str]], layout: Layout) -> list[dict[str, float]]:
    return order(processes, [layout.cfg, layout.ring, layout.ulysses])


def order(processes: list[subprocess.Popen[str]], what: Any) -> list[dict[str, float]]:
    """Every rank's answer."""
    for process in processes:
        pipe = cast(IO[str], process.stdin)
        pipe.write(json.dumps(what) + "\n")
        pipe.flush()
    return [json.loads(cast(IO[str], process.stdout).readline()) for process in processes]


# ---- a rank ------------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Answers every layout on stdin with the seconds of a step and the bytes that this rank sent."""
    import torch

    from workers.parallel.groups import AXES, SOLO, init_distributed, make_groups

    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    groups = {Layout(): SOLO}
    if num_ranks > 1:
        init_distributed("gloo", 600, 0)
        groups = make_groups(layouts(num_ranks), rank, "gloo")
    executor, state = prepare(params_of(args), groups)
    for line in sys.stdin:
        layout = Layout(*json.loads(line))
        mine = {id(group): group for group in (getattr(groups[layout], axis) for axis in AXES)}.values()
        for group in mine:
            group.traffic.clear()
        # All ranks begin together: a late one would count as communication.
        groups[layout].replica.all_reduce(torch.zeros(1))
        begun = sum(group.traffic.total_bytes for group in mine)
        started = time.monotonic()
        with torch.inference_mode():
            for _ in range(args.steps):
                executor.step([state], layout)
        seconds = (time.monotonic() - started) / args.steps
        sent = (sum(group.traffic.total_bytes for group in mine) - begun) / args.steps
        print(json.dumps({"seconds": seconds, "bytes": sent}), flush=True)


def prepare(params: ResolvedParams, groups: dict[Layout, Any]) -> tuple[Any, Any]:
    """The product's executor around a random denoiser, and one request that has been encoded."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    from workers.attention.backends import choose
    from workers.executor import Executor
    from workers.models.wan import FoldedText, TextAttention, WanFamily
    from workers.parallel.sequence import SequenceParallel

    torch.manual_seed(0)
    denoiser, text, cpu = WanTransformer3DModel(**CONFIGS["transformer"]).eval(), FoldedText(), torch.device("cpu")
    for block in denoiser.blocks:
        block.attn2.set_processor(TextAttention(text))
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    strips: Any = None
    family = WanFamily(card(), cpu, None, None, denoiser, None, solver, text, strips)
    sequence = SequenceParallel(denoiser, family.sequence_plan, choose("auto"), family.attention_processor)
    executor = Executor(family, family.card, sequence, groups, lambda *_: None)
    embeddings = {branch: torch.randn(1, TEXT, 64) for branch in family.card.branches(params, 0)}
    return executor, family.prepare(Request("bench", params), embeddings, torch.Generator("cpu").manual_seed(0))


if __name__ == "__main__":
    main()
