"""RequestState: everything that depends on one request on one rank. Modules hold weights and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.protocol import Request
from runtime.sampling import ResolvedParams


@dataclass
class RequestState:
    """Replicated on every rank of the request's items; only activations inside a forward are sharded."""

    request: Request
    latents: torch.Tensor
    """(1, channels, latent frames, latent height, latent width), fp32."""
    solver: Any
    """This request's own copy of the diffusers scheduler; solvers keep history and indices."""
    embeddings: dict[str, torch.Tensor]
    """Per guidance branch: (1, text tokens, text dim), in the denoiser's dtype."""
    step: int = 0
    decoder: Iterator[torch.Tensor] | None = None
    """The open decode: yields uint8 (frames, height, width, 3) and holds the VAE's temporal cache."""
    frames_sent: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of compute per stage on this rank."""

    @property
    def params(self) -> ResolvedParams:
        return self.request.params

    @property
    def timestep(self) -> torch.Tensor:
        """Scalar tensor: where this request is on its own schedule."""
        timestep: torch.Tensor = self.solver.timesteps[self.step]
        return timestep

    def spend(self, stage: str, since: float) -> None:
        self.timings[stage] = self.timings.get(stage, 0.0) + time.monotonic() - since
