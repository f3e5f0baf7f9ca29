"""Two ranks on one GPU against one, through host memory: kernels, log-sum-exps, merges, masks, uneven shares, models.

Nothing is measured in seconds. Every row has an error, what one rank alone errs by, and the bound between them:
rounding once more may cost as much again as 40 % of the kernel's own error, and a mistake costs 1e4 times as much.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.gpu_models import TINY, Model, build, cast
from runtime.layout import Layout, layouts_of
from workers.attention.backends import KERNELS, Bias, as_bias
from workers.parallel.groups import Groups, init_distributed, make_groups, warm_up
from workers.parallel.usp import spread_bias, usp_attention

LAYOUTS = Layout(1, 1, 2), Layout(1, 2, 1), Layout(2, 1, 1)
RANKS = 2
KERNEL_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative RMS error of one rank's kernel; products of fp32 may be in TF32."""
ROUNDED_AGAIN, FLOOR = 1.4, 2e-6
MODEL_BOUND, FRAME_BOUND = 1e-4, 1
"""Of fp32 latents relative to the largest, and of frames in shades of 255."""
BF16_RATIO, SEEDS, STEPS = 1.25, 5, 3
"""Over so many seeds together, RMS."""
PATIENCE_S = 300


@dataclass(frozen=True)
class Row:
    """One comparison."""

    case: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        # What is not a number holds nothing.
        return self.error <= self.bound


def check(device: str) -> dict[str, Any]:
    """Start the ranks, gather their rows, name those that are out of bounds."""
    rows = [Row(**row) for answer in _start(device) for row in answer]
    wrong = judge(rows)
    for row in wrong:
        print(f"OUT OF BOUNDS {row.case}: {row.error:.2e} > {row.bound:.2e}", file=sys.stderr)
    return {
        "ranks": RANKS,
        "comparisons": len(rows),
        "out_of_bounds": [row.case for row in wrong],
        "rows": {row.case: {"error": row.error, "bound": row.bound} for row in rows},
    }


def judge(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.holds]


def _start(device: str) -> list[list[dict[str, Any]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.gpu_ranks", device],
            cwd=Path(__file__).parents[1],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        if process.returncode:
            raise RuntimeError(f"rank {rank} ended with {process.returncode}; what it said is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


# ---- a rank ------------------------------------------------------------------------------------------------------


def work(device: torch.device) -> list[Row]:
    rank = int(os.environ["RANK"])
    # Convolutions of fp32 would be in TF32, and strips differ from whole frames by more than a shade.
    torch.backends.cudnn.allow_tf32 = False
    init_distributed("staged", PATIENCE_S, 0)
    cards = [recipe.card for recipe in TINY.values()]
    layouts = list(dict.fromkeys(made for card in cards for layout in LAYOUTS for made in layouts_of(layout, card)))
    groups = make_groups(layouts, rank, "staged")
    warm_up(groups, device)
    with torch.inference_mode():
        rows = [*kernel_rows(device)] if rank == 0 else []
        rows += [*_attention(groups, device), *_models(groups, device)]
    return [Row(f"rank {rank}: {row.case}", row.error, row.bound) for row in rows]


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Tensors:
    """q, k, v (B, S, H, D) and a bias or none, on the device."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: Bias | None

    def right(self) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64: the output, and the log-sum-exp (B, S, H)."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        scores = scores if self.bias is None else scores + self.bias.double()
        lse = scores.logsumexp(-1)
        # A query that sees no key has no weights.
        weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.transpose(1, 2)


def _cases(device: torch.device) -> Iterator[tuple[str, Tensors]]:
    """Shares and heads that divide by the ranks and that do not; every mask that a family makes, and harder ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype, (tokens, heads, dim) in product(_dtypes(device), [(512, 4, 64), (333, 5, 128), (37, 3, 24)]):
        q, k, v = (torch.randn(2, tokens, heads, dim, generator=generator).to(device, dtype) for _ in range(3))
        keep = torch.ones(2, tokens, dtype=torch.bool, device=device)
        keep[0, tokens // 3 : tokens // 2] = False
        # All keys that the second rank holds are hidden from one row, so that shares without a key are merged.
        keep[1, tokens // 2 :] = False
        noise = torch.randn(1, heads, tokens, tokens, generator=generator).to(device, dtype)
        blind = noise.clone()
        blind[:, :, 3] = -torch.inf
        biases = {"plain": None, "masked": as_bias(keep, dtype), "biased": noise, "a blind query": blind}
        for kind, bias in biases.items():
            yield f"{str(dtype).removeprefix('torch.')} {tokens}x{heads}x{dim} {kind}", Tensors(q, k, v, bias)


def kernel_rows(device: torch.device) -> Iterator[Row]:
    """The kernel with its log-sum-exp, alone."""
    kernel = KERNELS["torch_sdpa"]
    for name, x in _cases(device):
        bound = KERNEL_BOUNDS[x.q.dtype]
        right, right_lse = x.right()
        out, lse = kernel.attend_lse(x.q, x.k, x.v, x.bias)
        yield Row(f"kernel {name}: output", error(out, right), bound)
        seen = right_lse.isfinite()
        agreed = torch.equal(lse.isneginf(), ~seen)
        yield Row(f"kernel {name}: log-sum-exp", error(lse[seen], right_lse[seen]) if agreed else torch.inf, bound)
        if device.type == "cuda" and x.bias is None and x.q.dtype != torch.float32 and x.q.shape[-1] % 8 == 0:
            yield from _cudnn(name, x, right, right_lse)


def _cudnn(name: str, x: Tensors, right: torch.Tensor, right_lse: torch.Tensor) -> Iterator[Row]:
    """Whether cuDNN's kernel, faster on some GPUs, could take the place of flash. Nobody uses it: nothing bounds it."""
    q, k, v = (part.transpose(1, 2) for part in (x.q, x.k, x.v))
    try:
        kernel = torch.ops.aten._scaled_dot_product_cudnn_attention.default
        out, lse, *_ = kernel(q, k, v, None, True, 0.0, False, False)
    except RuntimeError:
        # It says so of shapes that it does not take.
        yield Row(f"cudnn {name}: refused", 0.0, 0.0)
        return
    yield Row(f"cudnn {name}: output", error(out.transpose(1, 2), right), torch.inf)
    # It comes with a dimension of one behind.
    yield Row(f"cudnn {name}: log-sum-exp", error(lse.reshape(q.shape[:3]).transpose(1, 2), right_lse), torch.inf)


def _attention(groups: dict[Layout, Groups], device: torch.device) -> Iterator[Row]:
    """Attention over the ranks against the same kernel on whole tensors."""
    kernel = KERNELS["torch_sdpa"]
    for (name, x), layout in product(_cases(device), (Layout(1, 1, 2), Layout(1, 2, 1))):
        over = groups[layout]
        sizes, rank = over.sp.share(x.q.shape[1]), over.sp.rank
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        key_bias = bias = None
        if x.bias is not None and x.bias.shape[2] == 1:
            key_bias = x.bias[..., mine]
        elif x.bias is not None:
            bias = x.bias[:, :, mine]
        spread = spread_bias(key_bias, bias, x.q.shape[2], sizes, sizes, over)
        out = usp_attention(x.q[:, mine], x.k[:, mine], x.v[:, mine], sizes, sizes, over, kernel, spread)
        right = x.right()[0][:, mine]
        alone = kernel.attend_lse(x.q, x.k, x.v, x.bias)[0][:, mine]
        if "blind" in name and layout.ring == 1:
            # Whole rows go to the plain kernel, which may give what it likes for a query that sees no key.
            out, right, alone = (_without_blind(part, mine) for part in (out, right, alone))
        yield Row(f"attention {layout} {name}", error(out, right), ROUNDED_AGAIN * error(alone, right) + FLOOR)


def _without_blind(x: torch.Tensor, mine: slice) -> torch.Tensor:
    places = torch.arange(mine.start, mine.stop, device=x.device)
    return x[:, places != 3]


def _models(groups: dict[Layout, Groups], device: torch.device) -> Iterator[Row]:
    """A few steps of each family, and its decode by strips, on two ranks against one."""
    for name, recipe in TINY.items():
        model = build(recipe, device, torch.float32)
        half = cast(model, torch.bfloat16)
        steps, half_steps = Steps(model, groups), Steps(half, groups)
        alone = [steps(Layout(), seed) for seed in range(SEEDS)]
        rounded = error(torch.cat([half_steps(Layout(), seed) for seed in range(SEEDS)]), torch.cat(alone))
        for layout in LAYOUTS:
            found = steps(layout, 0)
            yield Row(f"{name} {layout} float32", _largest(found, alone[0]), MODEL_BOUND)
            found = torch.cat([half_steps(layout, seed) for seed in range(SEEDS)])
            yield Row(f"{name} {layout} bfloat16", error(found, torch.cat(alone)), BF16_RATIO * rounded)
        state, group = model.state(STEPS), groups[LAYOUTS[0]].replica
        whole, strips = ([*model.family.decode(state, *among)] for among in ((), (group,)))
        shades = max((a.int() - b.int()).abs().max().item() for a, b in zip(whole, strips, strict=True))
        yield Row(f"{name} decode by strips, shades", shades, FRAME_BOUND)


class Steps:
    """The latents of a model after a few steps in a layout: (1, …)."""

    def __init__(self, model: Model, groups: dict[Layout, Groups]) -> None:
        self._model = model
        self._executor = model.executor({Layout(): Groups(), **groups})

    def __call__(self, layout: Layout, seed: int) -> torch.Tensor:
        state = self._model.state(STEPS, seed)
        for _ in range(STEPS):
            self._executor.step([state], layout)
        return state.latents


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Root of the mean square of the difference, over that of y."""
    if not x.numel():
        return 0.0
    return (((x.double() - y).square().mean() / y.double().square().mean()) ** 0.5).item()


def _largest(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).abs().max() / y.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_ranks", description="one rank of bench.gpu --staged")
    parser.add_argument("device", choices=["cpu", "cuda"])
    device = torch.device(parser.parse_args().device)
    print(json.dumps([asdict(row) for row in work(device)]))


if __name__ == "__main__":
    main()
