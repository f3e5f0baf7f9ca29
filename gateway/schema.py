"""The bodies that come in: the one place where HTTP words become protocol words. Asks the card, never the mesh."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    WithJsonSchema,
)
from pydantic_core import CoreSchema

from gateway.inputs import Given, Source, read_sources
from gateway.jobs.store import Job
from gateway.media.formats import GIF_MAX_FPS, VideoFormat
from gateway.media.stills import StillFormat
from runtime.errors import UNSUPPORTED_PARAMETER, InvalidInput
from runtime.models.card import Card
from runtime.sampling import ResolvedParams, SamplingParams

UNSUPPORTED = ("unsupported_value", UNSUPPORTED_PARAMETER)
"""Codes of refusals that leniency turns into warnings."""
SIZE = re.compile(r"(\d{1,5})[xX×](\d{1,5})")
SIZES = "^([0-9]{1,5}[xX×][0-9]{1,5}|auto)$"


INTEGER = r"[+-]?[0-9]{1,30}"
DECIMAL = r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?"


def _number(pattern: str, what: str) -> Callable[[Any], Any]:
    """Refuses what pydantic's lax mode takes for a number besides: true, `1_000`, ` 7`."""

    def check(value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a number, not true or false")
        if isinstance(value, str) and not re.fullmatch(pattern, value):
            raise ValueError(f"should be a valid {what}")
        return value

    return check


@dataclass(frozen=True)
class _OrText:
    """Forms have only text, and some clients send numbers as text in JSON too: says so in the API's description."""

    pattern: str

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        number = handler(core)
        for ours, theirs in (("ge", "minimum"), ("lt", "exclusiveMaximum")):
            if ours in number:
                number.setdefault(theirs, number.pop(ours))
        return {"anyOf": [number, {"type": "string", "pattern": f"^{self.pattern}$"}]}


Whole = Annotated[int, BeforeValidator(_number(INTEGER, "integer")), Field(ge=-(2**63), lt=2**63), _OrText(INTEGER)]
Number = Annotated[
    float, BeforeValidator(_number(DECIMAL, "finite number")), Field(allow_inf_nan=False), _OrText(DECIMAL)
]
Label = Annotated[str, Field(max_length=512)]

_PICTURE = {
    "anyOf": [
        {"type": "string", "format": "binary", "description": "a file of a form"},
        {"type": "string", "description": "a URL: https://… or data:image/png;base64,…"},
        {"type": "object", "properties": {"image_url": {"type": "string"}}, "required": ["image_url"]},
    ]
}
Picture = Annotated[Any, WithJsonSchema(_PICTURE)]
"""PNG, JPEG or WebP."""
Pictures = Annotated[Any, WithJsonSchema({"anyOf": [*_PICTURE["anyOf"], {"type": "array", "items": _PICTURE}]})]


class Generation(BaseModel):
    """What a body for a video and one for images have in common: OpenAI's words and our sampling parameters."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(json_schema_extra={"pattern": r"\S"})
    model: str | None = None
    size: str | None = Field(
        None, json_schema_extra={"pattern": SIZES}, description='"WIDTHxHEIGHT" or "auto"; unset: the model\'s default'
    )
    width: Whole | None = None
    height: Whole | None = None
    seed: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = Field(None, description="image models: guidance against the negative prompt")
    negative_prompt: str | None = None
    deterministic: bool | None = Field(
        None, description="the same bytes each time on this mesh: shares no forward with other requests"
    )
    priority: Whole | None = Field(None, description="-100 to 100; higher goes first among your own requests")
    timeout: Number | None = Field(None, description="seconds after which the result is no longer wanted")
    user: Label | None = Field(None, description="kept with the job, and changes nothing")
    safety_identifier: Label | None = Field(None, description="kept with the job, and changes nothing")

    _lenient: bool = PrivateAttr(False)
    _warnings: list[str] = PrivateAttr(default_factory=list)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was ignored, one sentence each."""
        return tuple(self._warnings)

    def be_lenient(self, ignored: Iterable[str]) -> None:
        """From now on values that cannot be had are ignored; some have been already."""
        self._lenient = True
        self._warnings += ignored

    def ignore(self, error: InvalidInput) -> bool:
        """Take back what cannot be had, with a warning; False if that is not for us to do."""
        known = type(self).model_fields.get(error.field)
        if not self._lenient or error.code not in UNSUPPORTED or known is None:
            return False
        unset = known.get_default(call_default_factory=True)
        if known.is_required() or getattr(self, error.field) == unset:
            return False
        setattr(self, error.field, unset)
        self._warnings.append(f"{error}; it was ignored")
        return True

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
            deterministic=self.deterministic,
        )

    def _sides(self) -> tuple[int | None, int | None]:
        if self.size is None or self.size == "auto":
            return self.width, self.height
        match = SIZE.fullmatch(self.size)
        if match is None:
            raise InvalidInput("size", f'{self.size!r} is not of the form "WIDTHxHEIGHT", e.g. "832x480"')
        width, height = int(match[1]), int(match[2])
        if self.width not in {None, width} or self.height not in {None, height}:
            sides = {"width": self.width, "height": self.height}
            given = ", ".join(f"{name}={side}" for name, side in sides.items() if side is not None)
            raise InvalidInput("size", f"{self.size} contradicts {given}; give one of the two")
        return width, height


class VideoCreate(Generation):
    """The body of POST /v1/videos."""

    seconds: Number | None = Field(
        None, gt=0, le=86_400, description="length; the nearest frame count that the model can make"
    )
    num_frames: Whole | None = None
    fps: Whole | None = None
    webhook_url: str | None = Field(None, description="is sent video.completed, video.failed or video.cancelled")
    previews: Whole = Field(0, ge=0, le=20, description="pictures wanted while it is denoised, as `preview` events")
    output_format: VideoFormat = Field("mp4", description="png: a zip of the frames, without loss")
    input_reference: Picture = Field(None, description="the picture that the video starts from")

    def to_params(self, card: Card) -> SamplingParams:
        if card.task_type == "T2I":
            raise InvalidInput("model", "makes images, not videos; use POST /v1/images/generations")
        if self.output_format == "gif" and (self.fps or 0) > GIF_MAX_FPS:
            raise InvalidInput("fps", f"a GIF shows at most {GIF_MAX_FPS} frames per second, not {self.fps}")
        return replace(super().to_params(card), num_frames=self._frames(card), fps=self.fps)

    def given(self) -> Given:
        """The picture that it starts from; blocks while it is decoded."""
        if self.input_reference is None:
            return Given()
        if isinstance(self.input_reference, list):
            raise InvalidInput("input_reference", "is a list; a video starts from one picture")
        return Given(tuple(read_sources("input_reference", self.input_reference)))

    def _frames(self, card: Card) -> int | None:
        if self.seconds is None:
            return self.num_frames
        fps = self.fps or card.check(SamplingParams(prompt="any")).fps
        frames = card.frames_for(self.seconds, fps)
        if self.num_frames not in {None, frames}:
            message = f"{self.seconds:g} s at {fps} fps are {frames} frames, not num_frames={self.num_frames}"
            raise InvalidInput("seconds", f"{message}; give one of the two")
        return frames


class VideoRemix(VideoCreate):
    """The body of POST /v1/videos/{id}/remix: a new prompt, and whatever else is to differ from the source."""

    def over(self, source: Job) -> Self:
        """The body of the whole video: what this one leaves open is as in the source, its seed included.

        Raises:
            InvalidInput: it names another model.
        """
        if self.model not in {None, source.model}:
            raise InvalidInput("model", f"a remix is made by {source.model}, as its source was; leave it out")
        taken = {"model": source.model, "priority": source.terms.priority, "timeout": source.terms.timeout_s}
        taken |= {name: getattr(source.params, name) for name in REMIXED}
        taken |= {"previews": source.asked.previews, "output_format": source.asked.output_format}
        if self.size not in {None, "auto"}:
            del taken["width"], taken["height"]
        if self.seconds is not None:
            del taken["num_frames"]
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        return self.model_copy(update={name: value for name, value in taken.items() if name not in given})


REMIXED = (
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "seed",
    "width",
    "height",
    "num_frames",
    "fps",
    "deterministic",
)
"""What a remix takes over from its source unless it says otherwise."""

NOTHING: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "style": ("vivid",),
    "complexity": (),
    "frame_count": (),
    "frame_duration_ms": (),
    "svg": (),
    "input_fidelity": ("low",),
}
"""Fields of OpenAI's that we have nothing for, and their values that ask for nothing."""


class StreamOptions(BaseModel):
    """What else a stream of events is to tell; OpenAI's clients take unknown events for partial images."""

    model_config = ConfigDict(extra="forbid")

    include_progress: bool = False


class ImageCreate(Generation):
    """The body of POST /v1/images/generations. A video model makes a still."""

    n: Whole = Field(1, ge=1, le=10, description="how many; the seeds count up from `seed`")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: StillFormat = "png"
    output_compression: Whole | None = Field(None, ge=0, le=100, description="quality of webp and jpeg")
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: Whole = Field(0, ge=0, le=3, description="previews in the stream; fewer may come")
    stream_options: Annotated[StreamOptions | None, WithJsonSchema(StreamOptions.model_json_schema())] = None
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    style: str | None = None
    complexity: str | None = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    svg: Any = None

    @property
    def wants_progress(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_progress

    def given(self) -> Given:
        """The pictures that it starts from; blocks while they are decoded."""
        return Given()

    def to_params(self, card: Card) -> SamplingParams:
        for name, taken in NOTHING.items():
            value = getattr(self, name, None)
            if value is not None and value not in taken:
                raise unsupported(name, value, taken)
        if self.output_format == "png" and self.output_compression not in {None, 100}:
            raise InvalidInput("output_compression", "has no effect on png; it is for webp and jpeg")
        self._check_stream()
        return replace(super().to_params(card), num_frames=1)

    def _check_stream(self) -> None:
        if self.stream and self.n > 1:
            raise InvalidInput("n", f"{self.n} images do not go into one stream; take 1, or leave stream out")
        if self.stream and self.response_format == "url":
            raise InvalidInput("response_format", "a stream carries its pictures as b64_json; leave it out")
        for name in ("partial_images", "stream_options"):
            if getattr(self, name) and not self.stream:
                raise InvalidInput(name, "has an effect with stream=true only; leave it out")


LISTS = ("image", "images", "url")
"""Fields of an edit that a form may repeat."""


class ImageEdit(ImageCreate):
    """The body of POST /v1/images/edits: files first, then URLs, in the order in which they were given."""

    image: Pictures = Field(None, description="the pictures to start from, 1 to 16")
    images: Pictures = Field(None, description="the same under the name that OpenAI's JSON bodies use")
    url: Pictures = Field(None, description="more of them, by their addresses")
    mask: Picture = Field(None, description="transparent where the first image may change, and of its size")
    markup: Picture = Field(None, description="drawn over the first image to say what to change, and of its size")
    input_fidelity: str | None = None

    def given(self) -> Given:
        images = [
            source
            for name in LISTS
            if getattr(self, name) is not None
            for source in read_sources(name, getattr(self, name))
        ]
        if not images:
            raise InvalidInput("image", "is required", code="missing_required_parameter")
        return Given(tuple(images), self._overlay("mask"), self._overlay("markup"))

    def _overlay(self, name: str) -> Source | None:
        value = getattr(self, name)
        if isinstance(value, list):
            raise InvalidInput(name, "is a list; there is one for the first image")
        return None if value is None else next(read_sources(name, value))


def unsupported(field: str, value: object, choices: Sequence[object]) -> InvalidInput:
    """A value that would change the result and that nobody here can make; `choices` are those that can be had."""
    choice = f"take {' or '.join(map(str, choices)).lower()}, or leave it out" if choices else "leave it out"
    return InvalidInput(field, f"{value!r} is not available here; {choice}", code="unsupported_value")


def resolve(body: Generation, card: Card, max_prompt_chars: int) -> ResolvedParams:
    """Everything that can be checked without the mesh. A lenient body loses the values that cannot be had.

    Raises:
        InvalidInput: names the field that the client sent.
    """
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(body, name) or "")
        if length > max_prompt_chars:
            message = f"has {length} characters, at most {max_prompt_chars} are taken"
            raise InvalidInput(name, message, code="string_above_max_length")
    while True:
        try:
            return card.check(body.to_params(card))
        except InvalidInput as error:
            if not body.ignore(error):
                raise InvalidInput(_sent_as(error.field, body), error.message, code=error.code) from error


def _sent_as(field: str, body: Generation) -> str:
    if field == "num_frames" and isinstance(body, VideoCreate) and body.seconds is not None:
        return "seconds"
    return "size" if field in {"width", "height"} and body.size is not None else field
