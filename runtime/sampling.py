"""What a user may ask of one generation, and the same with every gap filled."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from runtime.bounds import MAX_ID_CHARS, Guidance, Int63, Pixels, Prompt, SomeFrames, SomeSteps
from runtime.errors import InvalidInput


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
    """Guidance weight, 1 or less switches it off; guidance-distilled models take it as an input."""
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
    true_cfg_scale: float | None = None
    """Classifier-free guidance against the negative prompt in image models; 1 or less switches it off."""
    deterministic: bool | None = None
    """The same bytes each time on the same mesh: it shares no forward with other requests, and so takes longer where
    many are there. Unset: no, frames may differ by 1/255 from one company to another."""


class ResolvedParams(msgspec.Struct, frozen=True, kw_only=True):
    """One generation, checked against the family and complete. Travels on the wire."""

    prompt: Prompt
    negative_prompt: Prompt
    num_inference_steps: SomeSteps
    guidance_scale: Guidance
    seed: Int63
    height: Pixels
    width: Pixels
    num_frames: SomeFrames
    fps: SomeSteps
    true_cfg_scale: Guidance = 1.0
    deterministic: bool = False


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """On whose account a generation runs, and how urgent it is. Changes no pixel."""

    key: str = ""
    """Whom the work is charged to: a name for the API key, never the key itself."""
    priority: int = 0
    """Higher goes first within a key."""
    timeout_s: float | None = None
    """Seconds after which it is no longer wanted."""


def preview_steps(num_steps: int, previews: int) -> tuple[int, ...]:
    """After which steps previews are due: evenly spread, none after the last step, whose frames come anyway."""
    ideal = (round(number * num_steps / (previews + 1)) for number in range(1, previews + 1))
    return tuple(sorted({step for step in ideal if 0 < step < num_steps}))


def check_terms(priority: int | None, timeout_s: float | None, key: str = "") -> Terms:
    """The terms of a request in the caller's words; None means the default.

    Raises:
        InvalidInput: names the field.
    """
    if priority is not None and not -100 <= priority <= 100:
        raise InvalidInput("priority", f"{priority} is out of range; take -100 to 100 (higher goes first)")
    if timeout_s is not None and not 0 < timeout_s <= 7 * 86_400:
        raise InvalidInput("timeout", f"{timeout_s:g} s is out of range; take more than 0 and at most a week")
    if len(key) > MAX_ID_CHARS:
        raise InvalidInput("key", f"has {len(key)} characters; take a name of at most {MAX_ID_CHARS}")
    return Terms(key=key, priority=priority or 0, timeout_s=timeout_s)
