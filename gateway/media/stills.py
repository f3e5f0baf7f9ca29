"""Frames to PNG, WebP, JPEG and contact sheets; knows no video container and no HTTP."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from gateway.media.metadata import a1111_line, to_json

StillFormat = Literal["png", "webp", "jpeg"]
SUFFIXES: dict[str, StillFormat] = {f".{name}": name for name in get_args(StillFormat)} | {".jpg": "jpeg"}
"""File name ending -> format."""
FULL_QUALITY = 100
EXIF_DESCRIPTION, EXIF_IFD, EXIF_USER_COMMENT = 0x010E, 0x8769, 0x9286

PREVIEW_SIDE = 512
"""Pixels of a preview's longer side at most; there is no detail in it that more would show."""

GAP = 6
BACKGROUND = (22, 22, 26)


def jpeg(frame: NDArray[np.uint8], quality: int = 80) -> bytes:
    """One (height, width, 3) RGB frame, small and fast: for live frames."""
    sink = io.BytesIO()
    Image.fromarray(frame).save(sink, "JPEG", quality=quality)
    return sink.getvalue()


@dataclass(frozen=True)
class Still:
    """A picture as a file."""

    file: bytes
    width: int
    height: int


def preview_still(pixels: NDArray[np.uint8], width: int, height: int) -> Still:
    """A JPEG of a (rows, columns, 3) preview in the shape of the (height, width) picture that it is of."""
    sides = _within(width, height, PREVIEW_SIDE)
    return Still(jpeg(resize(pixels, *sides)), *sides)


def resize(frame: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """One (rows, columns, 3) RGB frame to (height, width, 3)."""
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def fit(frame: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """One (rows, columns, 3) RGB frame, shrunk if need be so that no side is longer than so many pixels."""
    rows, columns, _ = frame.shape
    return frame if max(rows, columns) <= side else resize(frame, *_within(columns, rows, side))


def sprite_sheet(tiles: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """(height, width, 3) RGB tiles in rows without gaps; what is left of the last row is black."""
    height, width, _ = tiles[0].shape
    columns = min(columns, len(tiles))
    sheet = np.zeros((math.ceil(len(tiles) / columns) * height, columns * width, 3), np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    return sheet


def png(frame: NDArray[np.uint8], metadata: dict[str, object] | None = None) -> bytes:
    """One (height, width, 3) RGB frame, lossless, with ``metadata`` as text chunks.

    ``parameters`` holds A1111's line form (tEXt, or iTXt where Latin-1 cannot say it), ``framemesh`` the same as JSON.
    """
    chunks = PngInfo()
    if metadata is not None:
        chunks.add_text("parameters", a1111_line(metadata))
        chunks.add_itxt("framemesh", to_json(metadata))
    sink = io.BytesIO()
    # Level 6 takes four times as long and saves little on frames with texture.
    Image.fromarray(frame).save(sink, "PNG", compress_level=1, pnginfo=chunks)
    return sink.getvalue()


def still(
    frame: NDArray[np.uint8], kind: StillFormat, metadata: dict[str, object] | None = None, quality: int = FULL_QUALITY
) -> bytes:
    """One (height, width, 3) RGB frame as a file; ``quality`` (0 to 100) is for WebP and JPEG.

    These hold ``metadata`` as EXIF: A1111's line form as UserComment, JSON as ImageDescription.
    """
    if kind == "png":
        return png(frame, metadata)
    exif = Image.Exif()
    if metadata is not None:
        exif[EXIF_DESCRIPTION] = to_json(metadata)
        exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = b"UNICODE\0" + a1111_line(metadata).encode("utf-16-be")
    sink = io.BytesIO()
    subsampling = {"subsampling": 0} if kind == "jpeg" else {}
    Image.fromarray(frame).save(sink, kind.upper(), quality=quality, exif=exif, **subsampling)
    return sink.getvalue()


def contact_sheet(
    frames: NDArray[np.uint8], *, columns: int | None = None, max_tiles: int = 20, min_tile: int = 96
) -> NDArray[np.uint8]:
    """A grid of evenly spaced, numbered frames, the first and the last among them.

    Args:
        frames: (n, height, width, 3) RGB.
        columns: tiles in a row; as many as make the grid nearly square if unset.
        max_tiles: how many frames to show at most.
        min_tile: frames with a shorter side below this many pixels are enlarged by a whole factor, pixels kept sharp.

    Returns:
        One (sheet height, sheet width, 3) RGB image.

    Raises:
        ValueError: no frames, or nowhere to put them.
    """
    num_tiles = min(len(frames), max_tiles)
    if num_tiles < 1 or (columns is not None and columns < 1):
        raise ValueError(f"no contact sheet of {len(frames)} frames in {max_tiles} tiles, {columns} columns")
    shown = np.linspace(0, len(frames) - 1, num_tiles, dtype=int)
    tiles = _enlarge(frames[shown], min_tile)
    columns = min(columns or math.ceil(math.sqrt(num_tiles)), num_tiles)
    height, width = (side + GAP for side in tiles.shape[1:3])
    sheet = Image.new("RGB", (columns * width + GAP, math.ceil(num_tiles / columns) * height + GAP), BACKGROUND)
    for position, (number, tile) in enumerate(zip(shown, tiles, strict=True)):
        row, column = divmod(position, columns)
        sheet.paste(_numbered(tile, number), (column * width + GAP, row * height + GAP))
    return np.asarray(sheet)


def _within(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) of the same shape, no side longer than `side`."""
    shrink = min(1.0, side / max(width, height))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _enlarge(frames: NDArray[np.uint8], min_side: int) -> NDArray[np.uint8]:
    factor = max(1, math.ceil(min_side / min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _numbered(tile: NDArray[np.uint8], number: int) -> Image.Image:
    image = Image.fromarray(tile)
    size = max(12, image.height // 14)
    ImageDraw.Draw(image).text((5, 3), str(number), "white", font_size=size, stroke_width=1, stroke_fill="black")
    return image
