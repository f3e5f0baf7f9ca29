"""RequestState: everything that depends on one request on one rank. Modules hold weights and nothing else."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from runtime.protocol import Request
from runtime.sampling import ResolvedParams
from workers.foresight import Foresight, Taken


@dataclass
class RequestState:
    """Replicated on every rank of the request's items; only activations inside a forward are sharded.

    A step replaces tensors and never writes into them: a checkpoint holds them while it waits for the disk.
    """

    request: Request
    latents: torch.Tensor
    """(1, channels, latent frames, latent height, latent width), fp32."""
    solver: Any
    """This request's own copy of the diffusers scheduler; solvers keep history and indices."""
    embeddings: dict[str, torch.Tensor]
    """Per guidance branch: (1, text tokens, text dim), in the denoiser's dtype."""
    generator: torch.Generator | None = None
    """The CPU RNG that drew the initial noise, for solvers that draw more; the executor sets it."""
    step: int = 0
    decoder: Iterator[torch.Tensor] | None = None
    """The open decode: yields uint8 (frames, height, width, 3) and holds the VAE's temporal cache."""
    frames_sent: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of compute per stage on this rank."""
    foresight: Foresight | None = None
    """Set for a step whose prediction of the finished latents is wanted."""
    foreseen: torch.Tensor | None = None
    """What that step predicted, shaped as the latents."""

    @property
    def params(self) -> ResolvedParams:
        return self.request.params

    @property
    def timestep(self) -> torch.Tensor:
        """Scalar tensor: where this request is on its own schedule."""
        timestep: torch.Tensor = self.solver.timesteps[self.step]
        return timestep

    @property
    def draws_noise(self) -> bool:
        """Whether the solver's step takes an RNG."""
        solver: Any = type(self.solver)
        return _takes_generator(solver)

    def advance(self, prediction: torch.Tensor) -> None:
        """One solver step along the combined prediction; noise comes from the request's own RNG."""
        noise = {"generator": self.generator} if self.draws_noise else {}
        before, index = self.latents, self.step
        returned = self.solver.step(prediction, self.timestep, before, return_dict=False, **noise)
        self.latents = returned[0]
        if self.foresight is not None:
            self.foreseen = self.foresight(Taken(self.solver, index, before, prediction, returned))
        self.step += 1

    def spend(self, stage: str, since: float) -> None:
        self.timings[stage] = self.timings.get(stage, 0.0) + time.monotonic() - since


@cache
def _takes_generator(solver: Any) -> bool:
    return "generator" in inspect.signature(solver.step).parameters
