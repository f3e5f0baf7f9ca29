"""What a solver predicts the finished latents to be after any of its steps. Reads solvers, changes nothing.

Flow models say x_t = (1 - sigma) x_0 + sigma noise and predict noise - x_0, so that x_0 = x_t - sigma * prediction;
multistep solvers in data prediction compute x_0 themselves and keep it, as do the classic ones that return it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Taken:
    """One solver step that was taken."""

    solver: Any
    index: int
    """0 for the first step."""
    before: torch.Tensor
    """The latents that it began with."""
    prediction: torch.Tensor
    """The denoiser's, branches combined."""
    returned: tuple[Any, ...]
    """What `solver.step` gave."""


Foresight = Callable[[Taken], torch.Tensor]
"""Predicted clean latents of the shape of the latents; may be a tensor that the solver holds."""


def foresight_of(solver: Any) -> Foresight | None:
    """How to read x_0 from a diffusers scheduler of this class and configuration; None if nobody knows."""
    config = solver.config
    match type(solver).__name__:
        case "UniPCMultistepScheduler" if solver.predict_x0:
            return _kept
        case "DPMSolverMultistepScheduler" if config.algorithm_type in {"dpmsolver++", "sde-dpmsolver++"}:
            return _kept
        case "FlowMatchEulerDiscreteScheduler" if not config.get("invert_sigmas"):
            return _along_the_flow
        case "EulerDiscreteScheduler" | "EulerAncestralDiscreteScheduler" | "DDIMScheduler":
            return _returned
    return None


def _kept(taken: Taken) -> torch.Tensor:
    newest: torch.Tensor = taken.solver.model_outputs[-1]
    return newest


def _along_the_flow(taken: Taken) -> torch.Tensor:
    return taken.before.float() - taken.solver.sigmas[taken.index] * taken.prediction.float()


def _returned(taken: Taken) -> torch.Tensor:
    clean: torch.Tensor = taken.returned[1]
    return clean
