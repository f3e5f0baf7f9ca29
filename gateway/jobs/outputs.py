"""Where a job's files lie, and one job's video while it is made. Knows neither the store nor the mesh."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway.jobs.store import Job
from gateway.media.metadata import generation_metadata
from gateway.media.mp4 import FragmentWriter, read_frames, remux_faststart

VIDEO_ID = re.compile(r"video_[0-9a-f]+")


class Outputs:
    """The folder ``<output_path>/videos``: a file that grows while a job runs, and the finished one after it."""

    def __init__(self, output_path: Path) -> None:
        self._folder = output_path / "videos"

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def fragments(self, video_id: str) -> Path:
        """The fragmented MP4 that grows with every chunk of frames."""
        return self._place(video_id, ".fragments.mp4")

    def final(self, video_id: str) -> Path:
        """The MP4 to hand out: it appears whole, with its index in front, or not at all."""
        return self._place(video_id, ".mp4")

    def read(self, video_id: str, first: int, count: int) -> NDArray[np.uint8]:
        """Up to `count` frames from number `first` on, of a running or a finished job; blocks.

        Raises:
            FileNotFoundError: nothing was written, or it was deleted.
        """
        try:
            return read_frames(self.fragments(video_id), first, count)
        except FileNotFoundError:
            # They go only after the final file has come, so looking in this order never falls between the two.
            return read_frames(self.final(video_id), first, count)

    def delete(self, video_id: str) -> None:
        for path in (self.fragments(video_id), self.final(video_id)):
            path.unlink(missing_ok=True)

    def _place(self, video_id: str, suffix: str) -> Path:
        if not VIDEO_ID.fullmatch(video_id):
            raise ValueError(f"{video_id!r} is no video id")
        return self._folder / f"{video_id}{suffix}"


class Recording:
    """One job's video from its first chunk to the finished file. Every method blocks; one thread at a time."""

    def __init__(self, outputs: Outputs, job: Job) -> None:
        self._fragments = outputs.fragments(job.id)
        self._final = outputs.final(job.id)
        self._job = job
        self._writer: FragmentWriter | None = None

    def add(self, pixels: NDArray[np.uint8], timings: dict[str, float]) -> None:
        """Append (n, height, width, 3) RGB frames; when it returns they can be read back."""
        if self._writer is None:
            params = self._job.params
            metadata = generation_metadata(params, self._job.model, timings)
            self._writer = FragmentWriter(self._fragments, params.width, params.height, params.fps, metadata)
        self._writer.write(pixels)

    def finish(self) -> str:
        """Turn the fragments into the finished file; returns its name."""
        self.close()
        remux_faststart(self._fragments, self._final)
        self._fragments.unlink()
        return self._final.name

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
