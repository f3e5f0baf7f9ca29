"""`framemesh tune`: ranks every layout of a model, measures the best few, says why, writes the profile."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.observe import TUNE, RunFolder
from launch.progress import ProgressView
from launch.signals import sigterm_as_interrupt
from launch.sizes import tuner_for
from runtime.config import Config
from runtime.errors import FramemeshError, InvalidInput
from runtime.machine import load_machine
from runtime.models.card import Card
from runtime.sampling import ResolvedParams, SamplingParams
from runtime.tune import Candidate, Prediction, Tuner, crossovers, gib, why

WARM_STEPS, TIMED_STEPS = 2, 6
"""Steps of the generation that warms a candidate's mesh up, and of the one whose steps are timed."""
SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Sides, relative to the wanted shape, among which the crossovers are looked for."""
GRID = 64


@dataclass(frozen=True)
class Measured:
    """What became of a candidate on this machine."""

    candidate: Candidate
    seconds: float = math.nan
    """Per step."""
    refused: str = ""
    """Why there is no time."""


def tune(
    config: Config,
    folder: Path,
    card: Card,
    params: SamplingParams,
    *,
    machine: str | None,
    dry_run: bool,
    measure: int,
    profile_file: Path,
) -> int:
    """Rank every layout, measure the best few unless `dry_run`, say why, write the profile; returns the exit code.

    Without a layout that fits, and runs where it was tried, there is no profile.
    """
    resolved = card.check(params)
    tuner = tuner_for(config, folder, card, None if machine is None else load_machine(machine))
    if machine is None:
        _say(f"note: constants of {tuner.machine.name}; --machine FILE takes better ones")
    ranked = tuner.rank(resolved, config.num_gpus)
    if not ranked:
        raise InvalidInput("num_gpus", f"{tuner.unshared(resolved, config.num_gpus)}; take fewer, or a larger shape")
    # The next best on paper may be the best in truth; one that does not fit is not tried.
    tried = [p.candidate for p in ranked if p.fits and not dry_run]
    with sigterm_as_interrupt():
        measured = {m.candidate: m for m in _measure(config, folder, params, tried, measure)}
    best = _winner(ranked, measured)
    console = Console()
    console.print(_table(ranked, measured, best))
    for line in _why(ranked, measured, best):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in crossovers(tuner, _shapes(card, params), resolved, config.num_gpus):
        console.print(line, highlight=False, soft_wrap=True)
    if best is None or not best.fits:
        return 1
    write_profile(profile_file, config, resolved, tuner, ranked, measured, best)
    console.print(
        f"profile {profile_file}: framemesh serve --profile-file {profile_file}", highlight=False, soft_wrap=True
    )
    return 0


def _shapes(card: Card, params: SamplingParams) -> list[ResolvedParams]:
    """The wanted shape and smaller and larger ones, by tokens."""
    wanted = card.check(params)
    shapes = {}
    for scale in SCALES:
        height, width = (max(round(side * scale / GRID), 1) * GRID for side in (wanted.height, wanted.width))
        try:
            shape = card.check(replace(params, height=height, width=width))
        except InvalidInput:
            continue
        shapes[card.tokens(shape)] = shape
    return [shapes[tokens] for tokens in sorted(shapes)]


# ---- measuring ---------------------------------------------------------------------------------------------------


def _measure(
    config: Config, folder: Path, params: SamplingParams, candidates: Sequence[Candidate], wanted: int
) -> Iterator[Measured]:
    """The first `wanted` that run, and those before them that do not."""
    for candidate in candidates:
        if not wanted:
            return
        _say(f"measuring {candidate}")
        try:
            found = Measured(candidate, _seconds_per_step(config, folder, params, candidate))
            _say(f"  {found.seconds:.4g} s per step")
            wanted -= 1
        except FramemeshError as error:
            found = Measured(candidate, refused=str(error))
            _say(f"  no time: {error}")
        yield found


def _seconds_per_step(config: Config, folder: Path, params: SamplingParams, candidate: Candidate) -> float:
    """Of a real mesh in this layout: starts it, warms it up, times a few steps of the wanted shape."""
    from launch.generator import Generator

    flags: dict[str, Any] = candidate.flags
    # Costs that this run measures must not be mistaken for those of a served model.
    with RunFolder(config.model_name, role=TUNE) as own, ProgressView() as view:
        asked = replace(config, **flags, cost_cache=str(own.path), output_path=str(own.path))
        with Generator(asked, folder) as generator:
            for steps in (WARM_STEPS, TIMED_STEPS):
                view.stage("denoise", 0, steps)
                few = replace(params, prompt=params.prompt or "a measurement", num_inference_steps=steps, seed=0)
                result = generator.generate(few)
        return float(result.metadata["timings"]["denoise"]) / TIMED_STEPS


def _winner(ranked: Sequence[Prediction], measured: dict[Candidate, Measured]) -> Prediction | None:
    """The fastest in truth, None if nothing that was tried ran; the first on paper if nothing was tried."""
    if not measured:
        return ranked[0]
    timed = _timed(measured)
    return min((p for p in ranked if p.candidate in timed), key=lambda p: measured[p.candidate].seconds, default=None)


# ---- telling -----------------------------------------------------------------------------------------------------


def _table(ranked: Sequence[Prediction], measured: dict[Candidate, Measured], best: Prediction | None) -> Table:
    table = Table(box=SIMPLE_HEAD, caption="seconds per step; memory and bytes sent per rank", caption_justify="left")
    table.add_column("layout", no_wrap=True)
    for name in ("predicted", *(["measured"] if measured else []), "memory", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    order = {candidate: number for number, candidate in enumerate(_timed(measured))}
    for number, p in enumerate(sorted(ranked, key=lambda p: order.get(p.candidate, len(ranked)))):
        tried = measured.get(p.candidate)
        time = "-" if tried is None else "refused" if tried.refused else f"{tried.seconds:.4g}"
        mark = "*" if p is best and p.fits else str(number + 1) if p.fits else "too big"
        times = [f"{p.seconds:.4g}", *([time] if measured else [])]
        table.add_row(f"{mark:>2} {p.candidate}", *times, gib(p.memory), gib(p.traffic.total))
    return table


def _timed(measured: dict[Candidate, Measured]) -> list[Candidate]:
    """Those that ran, the fastest first."""
    ran = [candidate for candidate, found in measured.items() if not found.refused]
    return sorted(ran, key=lambda candidate: measured[candidate].seconds)


def _why(ranked: Sequence[Prediction], measured: dict[Candidate, Measured], best: Prediction | None) -> Iterator[str]:
    """A line on what was measured, if anything was, and one on what was predicted."""
    if best is None:
        yield f"no layout ran: {next(iter(measured.values())).refused}"
        return
    if timed := _timed(measured):
        first, *others = (measured[candidate].seconds for candidate in timed)
        against = f"; {timed[1]} takes {others[0] / first - 1:.1%} longer" if others else ""
        yield f"measured: {timed[0]} wins with {first:.3g} s per step{against}"
    yield f"predicted: {why(ranked)}"


def write_profile(
    file: Path,
    config: Config,
    params: ResolvedParams,
    tuner: Tuner,
    ranked: Sequence[Prediction],
    measured: dict[Candidate, Measured],
    best: Prediction,
) -> None:
    """Everything that `serve --profile-file` needs ("flags"), and what it was concluded from."""
    model = {"model_path": config.model_path} | ({} if config.revision is None else {"revision": config.revision})
    profile = {
        "flags": {**model, **best.candidate.flags},
        "shape": {"height": params.height, "width": params.width, "num_frames": params.num_frames},
        "machine": msgspec.to_builtins(tuner.machine),
        "weights": msgspec.to_builtins(tuner.weights),
        "layouts": [
            {
                "layout": str(p.candidate),
                "predicted_s": p.seconds,
                "measured_s": measured[p.candidate].seconds if p.candidate in _timed(measured) else None,
                "memory_bytes": int(p.memory),
                "sent_bytes": int(p.traffic.total),
                "fits": p.fits,
            }
            for p in ranked
        ],
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput("profile_file", f"{file} cannot be written: {error.strerror}") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
