"""Pictures that clients send to start from: where they lie, whether they are pictures, where they are kept.

Knows no model and no request. What a body holds is checked in full before anybody asks whether the model takes
pictures at all; an address is asked only after that, since nothing is fetched for a request that is refused anyway.
Kept files are named by the hash of their bytes, so that the same picture lies there once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import os
import secrets
import struct
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from gateway.outbound import fetch
from runtime.errors import InvalidInput

FORMATS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
"""What Pillow calls them -> the ending of their files."""
MAX_IMAGES = 16
MAX_IMAGE_BYTES = 50_000_000
"""A picture has less."""
MAX_IMAGE_PIXELS = 50_000_000
"""200 MB once they are decoded: more than any model looks at, less than what a small file can claim to hold."""
MAX_DECODES = 2
"""Pictures that are decoded at once; bounds the memory."""
FETCH_S = 60.0
"""For all pictures of a request that have to be fetched."""

ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""Orientations in which what is stored as a row is shown as a column."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError)
"""What Pillow raises for files that are no pictures, or damaged ones."""
NO_IMAGE_INPUT = "image_input_not_supported"


@dataclass(frozen=True)
class Upload:
    """A file of a form. What the client says about it is not kept: nothing holds it to that."""

    content: bytes


@dataclass(frozen=True, eq=False)
class Source:
    """One picture as it was given."""

    field: str
    """Under which name, for complaints."""
    content: bytes | None = None
    """None: it lies at `url`."""
    url: str = ""


@dataclass(frozen=True)
class Given:
    """The pictures of one request."""

    images: tuple[Source, ...] = ()
    mask: Source | None = None
    """Is transparent where the first image may change."""
    markup: Source | None = None
    """Is drawn over the first image."""

    @property
    def overlays(self) -> tuple[Source, ...]:
        return tuple(source for source in (self.mask, self.markup) if source is not None)

    @property
    def everything(self) -> tuple[Source, ...]:
        return self.images + self.overlays


@dataclass(frozen=True)
class Kept:
    """The files of one request's pictures; empty names for those that it has not."""

    images: tuple[str, ...] = ()
    mask: str = ""
    markup: str = ""


@dataclass(frozen=True)
class Facts:
    """What a look at a picture showed. Width and height are as it is shown, its orientation applied."""

    suffix: str
    width: int
    height: int
    has_alpha: bool


class Inputs:
    """Checks pictures and keeps them in a folder."""

    def __init__(self, folder: Path, *, allow_private: bool = False) -> None:
        """`allow_private`: whether URLs may lead to addresses inside our own network."""
        self._folder = folder.resolve()
        self._allow_private = allow_private
        self._decoding = asyncio.Semaphore(MAX_DECODES)

    async def take(self, given: Given, most: int) -> Kept:
        """Check everything, then keep it. `most` is how many images the model takes.

        Raises:
            InvalidInput: names the field. Of what the body holds every picture is checked first; then a model that
                takes none refuses with the code `image_input_not_supported`; then what lies elsewhere is fetched.
        """
        _check_number(given)
        facts = {}
        for source in given.everything:
            if source.content is not None:
                facts[source] = await self._look(source, source.content)
        _check_overlays(given, facts)
        _check_model(given, most)
        deadline = asyncio.get_running_loop().time() + FETCH_S
        files = {}
        for source in given.everything:
            content = source.content or await self._fetch(source, deadline)
            if source not in facts:
                facts[source] = await self._look(source, content)
                _check_overlays(given, facts)
            files[source] = await asyncio.to_thread(_keep, self._folder, content, facts[source].suffix)
        mask, markup = (files[source] if source is not None else "" for source in (given.mask, given.markup))
        return Kept(tuple(files[source] for source in given.images), mask, markup)

    async def drop_unused(self, moment: float) -> None:
        """Remove what was last used before a moment (seconds since the epoch)."""
        await asyncio.to_thread(_drop_unused, self._folder, moment)

    async def _look(self, source: Source, content: bytes) -> Facts:
        async with self._decoding:
            return await asyncio.to_thread(examine, source.field, content)

    async def _fetch(self, source: Source, deadline: float) -> bytes:
        left = max(deadline - asyncio.get_running_loop().time(), 0.001)
        return await fetch(
            source.field,
            source.url,
            allow_private=self._allow_private,
            timeout_s=round(left, 3),
            max_bytes=MAX_IMAGE_BYTES - 1,
        )


def read_sources(field: str, value: Any) -> Iterator[Source]:
    """The pictures in a field of a body: a file, a URL, OpenAI's ``{image_url}``, or a list of these.

    Blocks for as long as it takes to decode a data URL.

    Raises:
        InvalidInput: it is something else; what it is a picture of is not looked at here.
    """
    for given in value if isinstance(value, list) else [value]:
        yield _read_source(field, given)


def _read_source(field: str, value: Any) -> Source:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(msgspec.DecodeError):
            value = msgspec.json.decode(value)  # an object in a form
    if isinstance(value, dict):
        value = _address(field, value)
    if isinstance(value, Upload):
        return Source(field, _non_empty(field, value.content))
    if isinstance(value, str) and value[:5].lower() == "data:":
        return Source(field, _non_empty(field, _decode_data_url(field, value)))
    if isinstance(value, str) and value.lower().startswith(("http://", "https://")):
        return Source(field, url=value)
    message = "is neither a file nor a URL of the form https://… or data:image/png;base64,…"
    raise InvalidInput(field, message, code="invalid_url" if isinstance(value, str) else "invalid_value")


def _address(field: str, value: dict[str, Any]) -> Any:
    """What OpenAI's object points at."""
    if value.get("file_id") is not None:
        message = "a file_id means nothing here, there is no Files API; send the picture itself, or its image_url"
        raise InvalidInput(field, message, code="unsupported_value")
    address = value.get("image_url")
    # The chat API has one object more around it.
    return address.get("url") if isinstance(address, dict) else address


def _non_empty(field: str, content: bytes) -> bytes:
    if not content:
        raise InvalidInput(field, "is an empty file; send a picture", code="invalid_image")
    return content


def _decode_data_url(field: str, url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise InvalidInput(field, "is no data URL of the form data:image/png;base64,…", code="invalid_url")
    try:
        return base64.b64decode(urllib.parse.unquote(payload) if "%" in payload else payload, validate=True)
    except ValueError as error:
        raise InvalidInput(field, f"holds no base64: {error}", code="invalid_url") from error


def examine(field: str, content: bytes) -> Facts:
    """Decode a picture, whatever it was said to be; blocks.

    Raises:
        InvalidInput: it is too large, damaged, or of a format that is not taken.
    """
    if len(content) >= MAX_IMAGE_BYTES:
        message = f"has {len(content)} bytes, a picture may have less than {MAX_IMAGE_BYTES}"
        raise InvalidInput(field, message, code="image_too_large")
    try:
        with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
            _check_pixels(field, image.width, image.height)
            image.load()
            return _facts(image)
    except InvalidInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput(field, f"has more than {MAX_IMAGE_PIXELS} pixels", code="image_too_large") from error
    except UNREADABLE as error:
        raise InvalidInput(field, "is no PNG, JPEG or WebP that can be read", code="invalid_image") from error


def _check_pixels(field: str, width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        message = f"has {width} x {height} pixels, at most {MAX_IMAGE_PIXELS} are taken"
        raise InvalidInput(field, message, code="image_too_large")


def _facts(image: Image.Image) -> Facts:
    width, height = image.size
    # What is wrong with its notes does not spoil a picture.
    with contextlib.suppress(*UNREADABLE):
        if image.getexif().get(ORIENTATION) in SIDEWAYS:
            width, height = height, width
    assert image.format is not None, "Image.open found no format"
    return Facts(FORMATS[image.format], width, height, image.has_transparency_data)


def _check_number(given: Given) -> None:
    if len(given.images) > MAX_IMAGES:
        message = f"{len(given.images)} pictures are too many; take at most {MAX_IMAGES}"
        raise InvalidInput(given.images[MAX_IMAGES].field, message, code="too_many_images")
    if given.mask is not None and given.markup is not None:
        raise InvalidInput("markup", "cannot be combined with mask; give one of the two")


def _check_overlays(given: Given, facts: dict[Source, Facts]) -> None:
    """As far as it is known: what lies over the first image has its size, and lets something of it through."""
    for source in given.overlays:
        if source not in facts:
            continue
        if not facts[source].has_alpha:
            message = "has no alpha channel; it takes transparent pixels to say where"
            raise InvalidInput(source.field, message, code="invalid_image")
        below = facts.get(given.images[0]) if given.images else None
        sizes = [f"{fact.width}x{fact.height}" for fact in (facts[source], below) if fact is not None]
        if len(set(sizes)) > 1:
            message = f"is {sizes[0]}, but the image that it is for is {sizes[1]}; both need the same size"
            raise InvalidInput(source.field, message, code="invalid_image")


def _check_model(given: Given, most: int) -> None:
    if not given.images:
        return
    if most == 0:
        message = "this model starts from text alone; take one with image input, or leave it out"
        raise InvalidInput(given.images[0].field, message, code=NO_IMAGE_INPUT)
    if len(given.images) > most:
        message = f"{len(given.images)} pictures are too many for this model; take at most {most}"
        raise InvalidInput(given.images[most].field, message, code="too_many_images")


def _keep(folder: Path, content: bytes, suffix: str) -> str:
    """The file that holds these bytes: whole, on the disk, and as fresh as its last use."""
    digest = hashlib.sha256(content).hexdigest()
    path = folder / digest[:2] / f"{digest}.{suffix}"
    try:
        os.utime(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, content)
    return str(path)


def _drop_unused(folder: Path, moment: float) -> None:
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < moment:
                path.unlink()


def _write_whole(path: Path, content: bytes) -> None:
    growing = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with growing.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        growing.replace(path)
    finally:
        growing.unlink(missing_ok=True)
