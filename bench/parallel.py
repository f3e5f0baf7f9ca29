"""What a layout costs and saves: seconds per step, bytes moved, and efficiency on equal cores, on a random Wan.

N ranks with one thread each against one rank with N threads (no more than there are cores): the same cores, so an
efficiency of 1 means that moving tensors between processes costs no more than threads cost inside one. Sharded weights
run twice: with a request on every rank, where N steps count in the time of one, and with one on all of them. More ranks
than cores are there for their bytes, which have to be those of the formula; their seconds say little.

Predicted, for the default model (2,048 tokens, width 384, 3 layers, both guidance branches) on 2 ranks: Ulysses and
ring each send 19.4 MB per rank and step, CFG parallelism 0.5 MB. gloo moves about 1.8 GB/s, so about 10 ms of a step
of more than a second; ring hides its share behind the kernel. Efficiency of at least 0.95 everywhere, above 1 where
threads scale badly.

Measured: guidance groups 1.11, ring 1.03, Ulysses 0.99 (a day before 1.05, 0.99, 0.93: two threads in one process were
the faster then). A step takes 0.4 s and not more than a second, so the same bytes weigh more; and of what Ulysses pays,
gloo's transfers are the smaller part: q, k, v and the output are copied once into and once out of the order in which
they travel, which are fresh pages each time.

Predicted, for weights sharded over the 2 ranks: they send 16.8 MB per rank and step in 4 gathers (3 blocks and the
root), 0.1 % of it padding, whatever the tokens. The cost model leaves 15 ms of it unhidden: efficiency 0.90 with
Ulysses (0.93 without sharding), 1.03 with a request on each rank (1.05 on guidance groups, which hardly talk either).

Predicted, for 4 ranks: Ulysses 14.9 MB, USP 2 x 2 19.7 MB, ring 29.1 MB, two guidance groups of either 10.2 MB, sharded
weights 25.2 MB. On two cores a step takes as long as on 2 ranks and a little more, so 0.7 to 0.9.

Measured: sharded 0.99 with a request on each rank, 0.88 with Ulysses; the bytes are those of the formula everywhere.
4 ranks on two cores: Ulysses 0.89, USP 2 x 2 0.86, ring 0.84, two guidance groups of either 0.93 and 0.95, sharded with
a request on each rank 0.96 and with Ulysses 0.75.
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
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, cast

from bench.report import machine, save, spread
from launch.sizes import read_weights
from runtime.layout import Layout
from runtime.log import setup_logging
from runtime.models.wan import WanCard
from runtime.protocol import Request
from runtime.sampling import ResolvedParams, SamplingParams
from runtime.traffic import Traffic, step_traffic, work_of
from runtime.tune import Weights

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
ELEMENT = 4
"""Bytes of a value."""


class Mesh(NamedTuple):
    """How ranks run a request, and over how many of them the weights are sharded."""

    layout: Layout
    shards: int = 1

    @property
    def requests(self) -> int:
        """That its ranks run at once: as many as the layout fits in."""
        return max(self.shards // self.layout.num_ranks, 1)

    def __str__(self) -> str:
        return str(self.layout) + (f", fsdp({self.shards})" if self.shards > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    add_arguments(parser, pairs=5)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    where = machine()
    save("parallel", where, measure(args), variant="" if args.ranks == 2 else f"{args.ranks}ranks")


def add_arguments(parser: argparse.ArgumentParser, pairs: int) -> None:
    """What `crew` and `params_of` need."""
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--steps", type=int, default=2, help="per measurement")
    parser.add_argument("--frames", type=int, default=29, help="29: 2,048 tokens")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


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
    found = (Layout(*axes) for axes in itertools.product([d for d in degrees if d <= 2], degrees, degrees))
    return [layout for layout in found if layout.num_ranks == num_ranks]


def meshes(num_ranks: int) -> list[Mesh]:
    """Every layout with whole weights; with sharded ones, a request on each rank and one on all of them."""
    sharded = [Mesh(layout, num_ranks) for layout in (Layout(), Layout(ulysses=num_ranks))]
    return [*map(Mesh, layouts(num_ranks)), *sharded]


def formula(mesh: Mesh, params: ResolvedParams, weights: Weights) -> Traffic:
    """What a rank sends in one step of one request, by the formulas that `framemesh tune` predicts with."""
    work, shards = work_of(card(), CONFIGS, params), mesh.shards
    if shards == 1:
        return step_traffic(work, mesh.layout, ELEMENT)
    filled = weights.filled_up(shards)
    return step_traffic(work, mesh.layout, ELEMENT, weight_bytes=filled, blocks=weights.blocks, shards=shards)


def random_weights() -> Weights:
    """Sizes of the random denoiser as the launcher reads them, from files."""
    with TemporaryDirectory() as folder:
        random_denoiser().save_pretrained(Path(folder, "transformer"))
        return read_weights(Path(folder), ELEMENT, {})


# ---- the parent --------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved: one measurement of the single rank, one of every mesh, and again."""
    every, one, threads = meshes(args.ranks), Mesh(Layout()), min(args.ranks, os.cpu_count() or 1)
    seconds: dict[Mesh, list[float]] = {mesh: [] for mesh in (one, *every)}
    sent: dict[Mesh, dict[str, float]] = {}
    weights = random_weights()
    with crew(args, 1, threads) as single, crew(args, args.ranks, 1) as ranks:
        for turn in range(args.pairs + 1):
            for mesh in (one, *every):
                answers = ask(single if mesh == one else ranks, mesh)
                if turn:
                    # The first turn warms up.
                    seconds[mesh].append(max(answer["seconds"] for answer in answers))
                sent[mesh] = {kind: sum(answer[kind] for answer in answers) / len(answers) for kind in answers[0]}
    params = params_of(args)
    rows = {
        str(mesh): {
            "seconds_per_step": spread(seconds[mesh]),
            "efficiency": spread([mesh.requests * a / b for a, b in zip(seconds[one], seconds[mesh], strict=True)]),
            **compared(sent[mesh], formula(mesh, params, weights)),
        }
        for mesh in every
    }
    return {
        "tokens": card().tokens(params),
        "steps_per_measurement": args.steps,
        f"one_rank_{threads}_threads_seconds_per_step": spread(seconds[one]),
        "layouts": rows,
    }


def compared(sent: dict[str, float], expected: Traffic) -> dict[str, float]:
    """What was counted beside the formula; of sharded weights also their part of it."""
    both = {"bytes_per_rank_and_step": sent["bytes"], "bytes_by_formula": expected.total}
    if not expected.weights:
        return both
    return both | {
        "weight_bytes_per_rank_and_step": sent["weights"],
        "weight_bytes_by_formula": expected.weights,
        "gathers_per_step": sent["gathers"],
        "gathers_by_formula": expected.calls["weights"],
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


def ask(processes: list[subprocess.Popen[str]], mesh: Mesh) -> list[dict[str, float]]:
    return order(processes, [mesh.layout.cfg, mesh.layout.ring, mesh.layout.ulysses, mesh.shards])


def order(processes: list[subprocess.Popen[str]], what: Any) -> list[dict[str, float]]:
    """Every rank's answer."""
    for process in processes:
        pipe = cast(IO[str], process.stdin)
        pipe.write(json.dumps(what) + "\n")
        pipe.flush()
    return [json.loads(cast(IO[str], process.stdout).readline()) for process in processes]


# ---- a rank ------------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Answers every mesh on stdin with the seconds of a step, the bytes that this rank sent, and those of weights."""
    import torch

    from workers.parallel.fsdp import shard_mesh
    from workers.parallel.groups import AXES, SOLO, init_distributed, make_groups

    rank, num_ranks, params = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), params_of(args)
    # To stderr: stdout has the answers.
    setup_logging(f"rank{rank}", "warning")
    groups, everyone = {Layout(): SOLO}, SOLO.replica
    if num_ranks > 1:
        init_distributed("gloo", 600, 0)
        groups |= make_groups(layouts(num_ranks), rank, "gloo")
        everyone = groups[Layout(ulysses=num_ranks)].replica
    prepared = {1: prepare(params, groups)}
    if shared := shard_mesh(num_ranks, torch.device("cpu")):
        prepared[num_ranks] = prepare(params, groups, shared)
    weights = count_weights()
    for line in sys.stdin:
        *degrees, shards = json.loads(line)
        layout = Layout(*degrees)
        executor, state = prepared[shards]
        # All ranks begin together: a late one would count as communication.
        everyone.all_reduce(torch.zeros(1))
        counts = {id(group): group.traffic for group in (getattr(groups[layout], axis) for axis in AXES)}.values()
        for traffic in (*counts, weights):
            traffic.clear()
        started = time.monotonic()
        with torch.inference_mode():
            for _ in range(args.steps):
                executor.step([state], layout)
        seconds = (time.monotonic() - started) / args.steps
        answer = {
            "seconds": seconds,
            "bytes": (sum(traffic.total_bytes for traffic in counts) + weights.total_bytes) / args.steps,
            "weights": weights.total_bytes / args.steps,
            "gathers": weights.calls.total() / args.steps,
        }
        print(json.dumps(answer), flush=True)


def count_weights() -> Any:
    """What FSDP's all-gathers send from here on, which pass no `Group`: this rank's part, to every other one."""
    import torch.distributed as dist

    from workers.parallel.comm import Traffic

    traffic, real = Traffic(), dist.all_gather_single

    def counted(output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        traffic.add("weights", input_tensor.nbytes * (dist.get_world_size(group) - 1))
        return real(output_tensor, input_tensor, group=group, async_op=async_op)

    # FSDP looks it up in each call.
    dist.all_gather_single = counted
    return traffic


def prepare(params: ResolvedParams, groups: dict[Layout, Any], shared: Any = None) -> tuple[Any, Any]:
    """The product's executor around a random denoiser, and one request that has been encoded.

    Args:
        params: of the request.
        groups: of every layout that will be asked for.
        shared: the device mesh that the weights are sharded over; None: whole.
    """
    import torch
    from diffusers import UniPCMultistepScheduler

    from workers.attention.backends import choose
    from workers.executor import Executor
    from workers.models.wan import FoldedText, TextAttention, WanFamily
    from workers.parallel.fsdp import shard
    from workers.parallel.sequence import SequenceParallel

    torch.manual_seed(0)
    denoiser, text, cpu = random_denoiser(), FoldedText(), torch.device("cpu")
    if shared is not None:
        shard(denoiser, shared)
    for block in denoiser.blocks:
        block.attn2.set_processor(TextAttention(text))
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    strips: Any = None
    family = WanFamily(card(), cpu, None, None, denoiser, None, solver, text, strips)
    sequence = SequenceParallel(denoiser, family.sequence_plan, choose("auto"), family.attention_processor)
    executor = Executor(family, family.card, sequence, groups, lambda *_: None)
    embeddings = {branch: torch.randn(1, TEXT, 64) for branch in family.card.branches(params, 0)}
    return executor, family.prepare(Request("bench", params), embeddings, torch.Generator("cpu").manual_seed(0))


def random_denoiser() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**CONFIGS["transformer"]).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
