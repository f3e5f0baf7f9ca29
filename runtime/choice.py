"""Which layout a mesh gets when nobody asks for one, and why: the cost and memory model's best. No torch, no I/O."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runtime.config import Config
from runtime.sampling import ResolvedParams
from runtime.tune import Candidate, Prediction, Tuner, gib, why

MORE_RANKS = (2, 4, 8)
"""Times as many, among which those are looked for that would do."""


def choose(config: Config, tuner: Tuner, params: ResolvedParams) -> tuple[Config, tuple[str, ...]]:
    """The configuration with the layout that serves `params` fastest among those that fit, and lines that say why.

    Where nothing fits by the estimate it is the one that needs least, with a warning: an estimate refuses nothing.

    Args:
        config: which leaves the layout open; what it says beside it holds.
        tuner: of the model on the machine that the mesh runs on.
        params: of a usual request.
    """
    ranked = tuner.rank(params, config.num_gpus)
    shape = f"{params.width}x{params.height}" + (f", {params.num_frames} frames" if params.num_frames > 1 else "")
    if not ranked:
        return config, (f"warning: no layout chosen for {shape}: {tuner.unshared(params, config.num_gpus)}",)
    allowed = [p for p in ranked if _agrees(config, p.candidate)]
    if not allowed:
        return config, ()
    lines = [f"chosen for {shape} on {tuner.machine.name}: {why(allowed)}"]
    best = allowed[0]
    if not best.fits:
        best = min(allowed, key=lambda p: p.memory)
        lines.append(_warning(tuner, params, config.num_gpus, best))
    flags: dict[str, Any] = best.candidate.flags
    return replace(config, **flags), tuple(lines)


def _agrees(config: Config, candidate: Candidate) -> bool:
    """Whether it leaves what was said beside the layout something to do."""
    sp = candidate.layout.sp
    return (
        (config.tp_size is None or sp % config.tp_size == 0)
        and (config.sp_engine == "native" or sp > 1)
        and not (candidate.fsdp and config.dist_backend == "staged")
    )


def _warning(tuner: Tuner, params: ResolvedParams, num_ranks: int, taken: Prediction) -> str:
    more = (times * num_ranks for times in MORE_RANKS)
    enough = next((ranks for ranks in more if any(p.fits for p in tuner.rank(params, ranks))), None)
    remedy = f"{enough} ranks of that memory would do" if enough is not None else "a smaller model would do"
    return (
        f"warning: a rank has {gib(tuner.machine.memory)}, so {taken.candidate} may run out of memory; "
        f"{remedy}, and smaller requests may still run"
    )
