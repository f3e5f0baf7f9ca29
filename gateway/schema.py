"""The bodies that come in: the one place where HTTP words become protocol words. Asks the card, never the mesh."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gateway.media.stills import StillFormat
from runtime.errors import InvalidInput
from runtime.models.card import Card
from runtime.sampling import ResolvedParams, SamplingParams

SIZE = re.compile(r"(\d{1,5})[xX×](\d{1,5})")


def _no_bool(value: Any) -> Any:
    """Python's True is 1, and pydantic's lax mode agrees."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Generation(BaseModel):
    """What a body for a video and one for images have in common: OpenAI's words and our sampling parameters."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    size: str | None = Field(None, description='"WIDTHxHEIGHT" or "auto"; unset: the model\'s default')
    width: Whole | None = None
    height: Whole | None = None
    seed: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = Field(None, description="image models: guidance against the negative prompt")
    negative_prompt: str | None = None
    priority: Whole | None = Field(None, description="-100 to 100; higher goes first among your own requests")
    timeout: Number | None = Field(None, description="seconds after which the result is no longer wanted")

    def to_params(self, card: Card) -> SamplingParams:
        """The same in the runtime's words; raises `InvalidInput` where two of them contradict each other."""
        width, height = self._sides()
        return SamplingParams(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            true_cfg_scale=self.true_cfg_scale,
            seed=self.seed,
            height=height,
            width=width,
        )

    def _sides(self) -> tuple[int | None, int | None]:
        if self.size is None or self.size == "auto":
            return self.width, self.height
        match = SIZE.fullmatch(self.size)
        if match is None:
            raise InvalidInput("size", f'{self.size!r} is not of the form "WIDTHxHEIGHT", e.g. "832x480"')
        width, height = int(match[1]), int(match[2])
        if self.width not in {None, width} or self.height not in {None, height}:
            given = f"width={self.width}, height={self.height}"
            raise InvalidInput("size", f"{self.size} contradicts {given}; give one of the two")
        return width, height


class VideoCreate(Generation):
    """The body of POST /v1/videos."""

    seconds: Number | None = Field(
        None, gt=0, le=86_400, description="length; the nearest frame count that the model can make"
    )
    num_frames: Whole | None = None
    fps: Whole | None = None
    previews: Whole = Field(0, ge=0, le=20, description="pictures wanted while it is denoised, as `preview` events")

    def to_params(self, card: Card) -> SamplingParams:
        if card.task_type == "T2I":
            raise InvalidInput("model", "makes images, not videos; use POST /v1/images/generations")
        return replace(super().to_params(card), num_frames=self._frames(card), fps=self.fps)

    def _frames(self, card: Card) -> int | None:
        if self.seconds is None:
            return self.num_frames
        fps = self.fps or card.check(SamplingParams(prompt="any")).fps
        frames = card.frames_for(self.seconds, fps)
        if self.num_frames not in {None, frames}:
            message = f"{self.seconds:g} s at {fps} fps are {frames} frames, not num_frames={self.num_frames}"
            raise InvalidInput("seconds", f"{message}; give one of the two")
        return frames


NOTHING: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "stream": (False,),
    "partial_images": (0,),
}
"""Fields of OpenAI's that we have nothing for, and their values that ask for nothing."""


class ImageCreate(Generation):
    """The body of POST /v1/images/generations. A video model makes a still."""

    n: Whole = Field(1, ge=1, le=10, description="how many; the seeds count up from `seed`")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: StillFormat = "png"
    output_compression: Whole | None = Field(None, ge=0, le=100, description="quality of webp and jpeg")
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    user: str | None = None
    safety_identifier: str | None = None

    def to_params(self, card: Card) -> SamplingParams:
        for name, taken in NOTHING.items():
            value = getattr(self, name)
            if value is not None and value not in taken:
                choice = " or ".join(map(str, taken)).lower()
                message = f"{value!r} is not available here; take {choice}, or leave it out"
                raise InvalidInput(name, message, code="unsupported_value")
        if self.output_format == "png" and self.output_compression not in {None, 100}:
            raise InvalidInput("output_compression", "has no effect on png; it is for webp and jpeg")
        return replace(super().to_params(card), num_frames=1)


def resolve(body: Generation, card: Card, max_prompt_chars: int) -> ResolvedParams:
    """Everything that can be checked without the mesh.

    Raises:
        InvalidInput: names the field that the client sent.
    """
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(body, name) or "")
        if length > max_prompt_chars:
            message = f"has {length} characters, at most {max_prompt_chars} are taken"
            raise InvalidInput(name, message, code="string_above_max_length")
    try:
        return card.check(body.to_params(card))
    except InvalidInput as error:
        raise InvalidInput(_sent_as(error.field, body), error.message, code=error.code) from error


def _sent_as(field: str, body: Generation) -> str:
    if field == "num_frames" and isinstance(body, VideoCreate) and body.seconds is not None:
        return "seconds"
    return "size" if field in {"width", "height"} and body.size is not None else field
