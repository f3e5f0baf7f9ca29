"""Whether Ulysses should send each of q, k and v behind the next projection, or all three in one collective.

Predicted, for bench.parallel's model on 2 gloo ranks: of the three quarters of an attention's bytes that go before it,
two thirds could travel while k and v are computed. That is half of about 10 ms in a step of 0.4 s, so at most 1 %, less
two more collectives per attention; and gloo's thread, which copies, takes its core from the projection that it is to
hide behind.

Measured: 0.96 of the time (0.92 to 1.01), more than predicted. Not separated: three smaller copies into the order of
travel may be cheaper than one large one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.parallel import add_arguments, crew, order, params_of, prepare
from bench.report import machine, save, spread
from runtime.layout import Layout

TOGETHER, EACH = "in one collective", "each behind the next projection"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.projections", description=__doc__)
    add_arguments(parser, pairs=15)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    where = machine()
    seconds: dict[str, list[float]] = {TOGETHER: [], EACH: []}
    sums: dict[str, float] = {}
    with crew(args, args.ranks, 1, "bench.projections") as ranks:
        for turn in range(args.pairs + 1):
            for way in (TOGETHER, EACH):
                answers = order(ranks, way)
                if turn:
                    # The first turn warms up.
                    seconds[way].append(max(answer["seconds"] for answer in answers))
                else:
                    sums[way] = answers[0]["sum"]
    if abs(sums[EACH] - sums[TOGETHER]) > 1e-4 * abs(sums[TOGETHER]):
        raise SystemExit(f"the two ways do not compute the same: {sums}")
    ratios = [each / together for each, together in zip(seconds[EACH], seconds[TOGETHER], strict=True)]
    rows = {way: spread(values) for way, values in seconds.items()}
    save("projections", where, {"seconds_per_step": rows, "each_over_together": spread(ratios)})


def work(args: argparse.Namespace) -> None:
    """Answers the name of a way on stdin with the seconds of a step."""
    import torch

    from workers.parallel.groups import init_distributed, make_groups

    rank, layout = int(os.environ["RANK"]), Layout(ulysses=args.ranks)
    init_distributed("gloo", 600, 0)
    groups = make_groups([layout], rank, "gloo")
    params = params_of(args)
    executors = {way: prepare(params, groups) for way in (TOGETHER, EACH)}
    executor, _ = executors[EACH]
    family, group = executor._family, groups[layout].ulysses
    for block in family.denoiser.blocks:
        block.attn1.set_processor(send_each(group, family.card.tokens(params)))
    for line in sys.stdin:
        executor, state = executors[json.loads(line)]
        groups[layout].replica.all_reduce(torch.zeros(1))
        started = time.monotonic()
        with torch.inference_mode():
            for _ in range(args.steps):
                executor.step([state], layout)
        seconds = (time.monotonic() - started) / args.steps
        print(json.dumps({"seconds": seconds, "sum": state.latents.abs().sum().item()}), flush=True)


def send_each(group: Any, tokens: int) -> Callable[..., Any]:
    """WanAttention with three collectives, each started as soon as its tensor is there."""
    import torch

    from workers.attention.backends import choose
    from workers.models.wan import _finish, _rotate
    from workers.parallel.ulysses import gather_heads

    kernel, sizes = choose("auto"), group.share(tokens)

    def start(x_BSHD: torch.Tensor) -> Callable[[], torch.Tensor]:
        batch, mine, num_heads, dim = x_BSHD.shape
        heads = group.share(num_heads)
        held, width = heads[group.rank], batch * dim
        send, receive = [count * mine * width for count in heads], [held * size * width for size in sizes]
        pending = group.start_all_to_all(x_BSHD.permute(2, 0, 1, 3).flatten(), send, receive)

        def whole() -> torch.Tensor:
            parts = zip(pending.wait().split(receive), sizes, strict=True)
            return torch.cat([x.view(held, batch, size, dim) for x, size in parts], dim=2).permute(1, 2, 0, 3)

        return whole

    def attend(
        attn: Any, hidden_states: torch.Tensor, context: None, attention_mask: None, rotary_emb: Any
    ) -> torch.Tensor:
        def turned(x: torch.Tensor) -> torch.Tensor:
            return _rotate(x.unflatten(2, (attn.heads, -1)), *rotary_emb)

        under_way = [
            start(turned(attn.norm_q(attn.to_q(hidden_states)))),
            start(turned(attn.norm_k(attn.to_k(hidden_states)))),
            start(attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))),
        ]
        q, k, v = (whole() for whole in under_way)
        out = kernel.attend(q, k, v, None)
        return _finish(attn, gather_heads(out, sizes, group.share(attn.heads), group).type_as(q))

    return attend


if __name__ == "__main__":
    main()
