"""What a user may ask of one generation, and the same with every gap filled."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One generation in the user's words; ``None`` means "the model's default".

    The family's card turns it into `ResolvedParams` (or raises `InvalidInput`).
    """

    prompt: str = ""
    """Text description of what to generate."""
    negative_prompt: str | None = None
    """What guidance steers away from."""
    num_inference_steps: int | None = None
    """Number of denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance weight; 1 or less switches guidance off."""
    seed: int | None = None
    """Seed of the initial noise; unset draws one and reports it."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    num_frames: int | None = None
    """Frames of video."""
    fps: int | None = None
    """Frames per second of the written video."""


class ResolvedParams(msgspec.Struct, frozen=True, kw_only=True):
    """One generation, checked against the family and complete. Travels on the wire."""

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    height: int
    width: int
    num_frames: int
    fps: int
