"""Frames to WebM, GIF and a zip of PNGs while they come, a few of them in memory; knows no request and no HTTP."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image
from PIL.GifImagePlugin import getdata, getheader

from gateway.media.metadata import to_json
from gateway.media.mp4 import tag_bt709
from gateway.media.stills import fit, png

VideoFormat = Literal["mp4", "webm", "gif", "png"]
SUFFIXES: dict[VideoFormat, str] = {"mp4": ".mp4", "webm": ".webm", "gif": ".gif", "png": ".zip"}
"""Format -> file name ending; PNGs come as a zip of them."""
# Made for calls: no look ahead, so frames do not pile up in the encoder.
VP9 = {"deadline": "realtime", "cpu-used": "6", "lag-in-frames": "0", "row-mt": "1", "crf": "24", "b": "0"}
WEBM = {"cluster_size_limit": str(1 << 20), "fflags": "bitexact"}
"""How many bytes the muxer keeps back; and that it draws no random ids, so that the same frames are the same file."""
GIF_MAX_FPS = 50
"""Players show what is to be shown for less than 20 ms for 100 ms."""
PALETTE_FRAMES = 5
"""Frames that a GIF's colours are taken from; no more are kept."""
PALETTE_SIDE = 128
CUBE = [value for r in range(4) for g in range(4) for b in range(4) for value in (85 * r, 85 * g, 85 * b)]
"""A quarter of a GIF's colours, spread evenly: dithered, they show whatever comes after the first frames."""
READABLE = 0o644 << 16
"""The permissions of a file in a zip."""


class VideoWriter(Protocol):
    """A video file that is written frame by frame; one thread at a time."""

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append (n, height, width, 3) RGB."""

    def finish(self) -> None:
        """Write what is still due; the file is whole then."""

    def close(self) -> None:
        """Let go of the file, in whatever state it is."""


def open_writer(
    kind: VideoFormat, path: Path, width: int, height: int, fps: int, metadata: dict[str, object] | None
) -> VideoWriter:
    """A new file of any format but mp4, which `gateway.media.mp4` makes.

    Raises:
        ValueError: of that one.
    """
    match kind:
        case "webm":
            return WebmWriter(path, width, height, fps, metadata)
        case "gif":
            return GifWriter(path, fps, metadata)
        case "png":
            return PngZipWriter(path, metadata)
    raise ValueError(f"no writer for {kind}")


class WebmWriter:
    """VP9 in WebM; `metadata` as JSON in the tag ``COMMENT``."""

    def __init__(self, path: Path, width: int, height: int, fps: int, metadata: dict[str, object] | None) -> None:
        self._muxer: Any = av.open(path, "w", format="webm", container_options=WEBM)
        if metadata is not None:
            self._muxer.metadata["comment"] = to_json(metadata)
        self._stream = self._muxer.add_stream("libvpx-vp9", rate=fps, options=VP9, width=width, height=height)
        tag_bt709(self._stream.codec_context)
        self._num_frames = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            yuv.pts = self._num_frames
            self._num_frames += 1
            self._muxer.mux(self._stream.encode(yuv))

    def finish(self) -> None:
        self._muxer.mux(self._stream.encode(None))
        self._muxer.close()

    def close(self) -> None:
        self._muxer.close()


class GifWriter:
    """One palette for all frames, of which only what has changed is stored; `metadata` as JSON in a comment.

    Times are multiples of 10 ms, rounded so that they do not add up to an error.
    """

    def __init__(self, path: Path, fps: int, metadata: dict[str, object] | None) -> None:
        self._file = path.open("wb")
        self._fps = fps
        self._comment = None if metadata is None else to_json(metadata)
        self._waiting: list[NDArray[np.uint8]] = []
        self._palette: Image.Image | None = None
        self._shown: NDArray[np.uint8] | None = None
        self._num_frames = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        for frame in frames:
            if self._palette is None:
                self._waiting.append(frame.copy())
                if len(self._waiting) == PALETTE_FRAMES:
                    self._begin()
            else:
                self._append(frame, self._palette)

    def finish(self) -> None:
        if self._palette is None:
            self._begin()
        self._file.write(b";")
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _begin(self) -> None:
        self._palette = palette = _common_palette(self._waiting)
        height, width, _ = self._waiting[0].shape
        canvas = Image.new("P", (width, height))
        canvas.putpalette(palette.getpalette() or [])
        header, _ = getheader(canvas, info={"loop": 0, "comment": self._comment})
        self._file.writelines(header)
        for frame in self._waiting:
            self._append(frame, palette)
        self._waiting.clear()

    def _append(self, frame: NDArray[np.uint8], palette: Image.Image) -> None:
        image = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        indices = np.asarray(image)
        left, top, right, bottom = _changed(self._shown, indices)
        changed = image.crop((left, top, right, bottom))
        self._file.writelines(getdata(changed, (left, top), duration=10 * self._hundredths()))
        self._shown = indices

    def _hundredths(self) -> int:
        """Of a second, that the next frame is shown."""
        began = round(100 * self._num_frames / self._fps)
        self._num_frames += 1
        return max(100 // GIF_MAX_FPS, round(100 * self._num_frames / self._fps) - began)


class PngZipWriter:
    """Lossless frames, ``frame_00000.png`` and so on, each with `metadata`; stored, for they are deflated already."""

    def __init__(self, path: Path, metadata: dict[str, object] | None) -> None:
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._metadata = metadata
        self._num_frames = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        for frame in frames:
            entry = zipfile.ZipInfo(f"frame_{self._num_frames:05d}.png")
            entry.external_attr = READABLE
            self._archive.writestr(entry, png(frame, self._metadata))
            self._num_frames += 1

    def finish(self) -> None:
        self._archive.close()

    def close(self) -> None:
        self._archive.close()


def _common_palette(frames: list[NDArray[np.uint8]]) -> Image.Image:
    """256 colours: those that the frames have most of, and the cube."""
    seen = Image.fromarray(np.concatenate([fit(frame, PALETTE_SIDE) for frame in frames]))
    num_seen = 256 - len(CUBE) // 3
    colours = (seen.quantize(num_seen, Image.Quantize.MEDIANCUT).getpalette() or [])[: 3 * num_seen]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*CUBE, *colours])
    return palette


def _changed(before: NDArray[np.uint8] | None, now: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around every pixel that differs; one pixel if none does."""
    if before is None:
        return 0, 0, now.shape[1], now.shape[0]
    differs = before != now
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    if not len(rows):
        return 0, 0, 1, 1
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
