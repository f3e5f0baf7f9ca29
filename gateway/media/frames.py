"""The frames of any finished video, one after the other; knows no request and no HTTP."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image


def each_frame(path: Path) -> Iterator[NDArray[np.uint8]]:
    """(height, width, 3) RGB, in order, one in memory at a time; of an MP4, WebM, GIF or a zip of PNGs.

    Raises:
        FileNotFoundError: there is no such file, as soon as the first frame is asked for.
    """
    if path.suffix == ".zip":
        yield from _unzipped(path)
        return
    with av.open(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(
                format="rgb24", src_colorspace=Colorspace.ITU709, src_color_range=_range_of(frame.format.name)
            )


def _range_of(pixel_format: str) -> ColorRange:
    """What our encoders were given: video in limited range, and the RGB of GIFs as it is."""
    return ColorRange.MPEG if pixel_format.startswith("yuv") else ColorRange.JPEG


def _unzipped(path: Path) -> Iterator[NDArray[np.uint8]]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            with archive.open(name) as file, Image.open(file) as image:
                yield np.asarray(image.convert("RGB"))
