"""Frames to and from H.264 in MP4, while it grows and when it is done; knows no request and no HTTP."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from gateway.media.metadata import to_json

# Without zerolatency x264 holds frames back, and a fragment could not be complete when write() returns.
X264 = {"preset": "veryfast", "crf": "20", "tune": "zerolatency"}
BT709 = 1  # the same code point for primaries, transfer and matrix in ITU-T H.273
LIMITED_RANGE = 1

# One muxer lives as long as one fragment: libavformat keeps back the newest frame until it sees the next one or the
# end, and frag_discont with untouched timestamps is its way to go on where another muxer stopped.
FRAGMENTS = {
    "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
}


class FragmentWriter:
    """A fragmented MP4 that plays while it grows: every `write` appends one complete fragment.

    The header with the metadata is on disk as soon as the writer exists. One thread at a time.

    Args:
        path: the file, replaced if it exists.
        width, height: pixels, even, because the video is stored as yuv420p.
        metadata: kept as JSON in the container's ``comment``, if there is any.

    Raises:
        ValueError: an odd width or height.
        OSError: there is no room on the disk; of `write` and `close` as well.
    """

    def __init__(self, path: Path, width: int, height: int, fps: int, metadata: dict[str, object] | None) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"yuv420p needs even sides, got {width}x{height}")
        self._shape = (height, width, 3)
        self._num_frames = 0
        self._num_fragments = 0
        header = io.BytesIO()
        self._encoder = _open_muxer(header, FRAGMENTS)
        if metadata is not None:
            self._encoder.metadata["comment"] = to_json(metadata)
        self._stream = _add_h264(self._encoder, width, height, fps)
        self._encoder.start_encoding()
        self._file = path.open("wb")
        try:
            self._append(header.getvalue())
        except OSError:
            # Closing tries to write once more what the disk had no room for.
            with contextlib.suppress(OSError):
                self.close()
            raise

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames, (n, height, width, 3) RGB; when this returns, any reader of the file can decode them.

        Raises:
            ValueError: frames of another size or dtype.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise ValueError(f"expected uint8 frames of {self._shape}, got {frames.dtype} of {frames.shape[1:]}")
        if len(frames):
            packets = [packet for frame in frames for packet in self._encode(frame)]
            assert len(packets) == len(frames), f"x264 kept frames back: {len(packets)} of {len(frames)}"
            self._append(self._fragment(packets))

    def close(self) -> None:
        """Nothing is pending, so closing twice or after an error is harmless."""
        self._encoder.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _encode(self, frame: NDArray[np.uint8]) -> list[Any]:
        rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
        yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        yuv.pts = self._num_frames
        self._num_frames += 1
        packets: list[Any] = self._stream.encode(yuv)
        return packets

    def _fragment(self, packets: list[Any]) -> bytes:
        self._num_fragments += 1
        sink = io.BytesIO()
        with _open_muxer(sink, FRAGMENTS | {"fragment_index": str(self._num_fragments)}) as muxer:
            stream = muxer.add_stream_from_template(self._stream)
            for packet in packets:
                packet.stream = stream
                muxer.mux(packet)
        return _from_first_moof(sink.getvalue())

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()


def remux_faststart(source: Path, target: Path) -> None:
    """Repack a finished MP4 with its index in front, without re-encoding; metadata is kept.

    ``target`` appears whole and synced or not at all; it may be ``source`` itself.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        _remux(source, partial)
        replace_synced(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def replace_synced(partial: Path, target: Path) -> None:
    """Give a file its name once the disk has it."""
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, target)


def tag_bt709(context: Any) -> None:
    """Players guess the colours of untagged video, and reds come out visibly wrong: say what it was made to be."""
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE


def read_frames(path: Path, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
    """Decode up to ``count`` frames from number ``first`` on as (n, height, width, 3) RGB.

    The file may still be growing: a fragment that is not wholly there yet is left out. A file that grows has no index
    to jump by, so frames before ``first`` are decoded too.
    """
    with av.open(io.BytesIO(_without_torn_end(path.read_bytes()))) as container:
        stream = container.streams.video[0]
        wanted = islice(container.decode(stream), first, None if count is None else first + count)
        rgb: list[NDArray[np.uint8]] = [
            frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709, src_color_range=ColorRange.MPEG)
            for frame in wanted
        ]
        return np.stack(rgb) if rgb else np.empty((0, stream.height, stream.width, 3), np.uint8)


def _remux(source: Path, target: Path) -> None:
    with av.open(source) as reader, _open_muxer(target, {"movflags": "faststart"}) as muxer:
        muxer.metadata.update(reader.metadata)
        original = reader.streams.video[0]
        stream = muxer.add_stream_from_template(original)
        for packet in reader.demux(original):
            if packet.dts is not None:  # the last one is empty: a decoder's signal to flush
                packet.stream = stream
                muxer.mux(packet)


def _open_muxer(sink: Path | io.BytesIO, options: dict[str, str]) -> Any:
    return av.open(sink, "w", format="mp4", container_options=options)


def _add_h264(muxer: Any, width: int, height: int, fps: int) -> Any:
    stream = muxer.add_stream("libx264", rate=fps, options=X264, width=width, height=height)
    context = stream.codec_context
    context.gop_size = fps
    tag_bt709(context)
    return stream


def _from_first_moof(data: bytes) -> bytes:
    """Skip the header that every muxer writes; only the file's first one counts."""
    return data[next(start for kind, start, _ in _boxes(data) if kind == b"moof") :]


def _without_torn_end(data: bytes) -> bytes:
    """Up to the last box that is all there: half a box is an error to the demuxer, a missing one is the end."""
    return data[: max((end for _, _, end in _boxes(data) if end <= len(data)), default=0)]


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each top-level box (ISO/IEC 14496-12, 4.2); the last may end beyond ``data``."""
    start = 0
    while start + 8 <= len(data):
        end = start + max(8, int.from_bytes(data[start : start + 4], "big"))
        yield data[start + 4 : start + 8], start, end
        start = end
