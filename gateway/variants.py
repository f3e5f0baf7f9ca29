"""What is made from a finished video when somebody asks: its thumbnail and its sprite sheet. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gateway.jobs.outputs import Outputs, write_whole
from gateway.jobs.store import Job
from gateway.media.frames import each_frame
from gateway.media.stills import fit, sprite_sheet, still

Variant = Literal["thumbnail", "spritesheet"]
FILES: dict[Variant, str] = {"thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}
THUMBNAIL_SIDE = 512
"""Pixels of the longer side at most; small videos are not enlarged."""
THUMBNAIL_QUALITY = 80
TILE_SIDE = 256
"""Likewise, of each tile."""
TILES = 16
COLUMNS = 4
SHEET_QUALITY = 85


class Variants:
    """Each is made once for everybody who asks meanwhile, and kept beside the video."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._making: dict[Path, asyncio.Task[None]] = {}

    async def get(self, job: Job, file_name: str, variant: Variant) -> Path:
        """The file of a variant of a finished job, whose video is called `file_name`.

        Raises:
            FileNotFoundError: the video was removed.
            StorageFailed: the bucket does not answer.
        """
        path = self._outputs.derived(job.id, FILES[variant])
        if not await asyncio.to_thread(path.is_file):
            if path not in self._making:
                making = asyncio.to_thread(self._make, job, file_name, variant, path)
                task = self._making[path] = asyncio.create_task(making, name=f"{variant} of {job.id}")
                task.add_done_callback(lambda _: self._making.pop(path))
            # Whoever leaves does not take it away from the others.
            await asyncio.shield(self._making[path])
        return path

    async def close(self) -> None:
        """Wait for what is being made."""
        await asyncio.gather(*self._making.values(), return_exceptions=True)

    def _make(self, job: Job, file_name: str, variant: Variant, path: Path) -> None:
        video, num_frames = self._outputs.local_copy(file_name), job.params.num_frames
        write_whole(path, _thumbnail(video, num_frames) if variant == "thumbnail" else _sheet(video, num_frames))


def _thumbnail(video: Path, num_frames: int) -> bytes:
    """The frame in the middle."""
    (frame,) = _shrunk(video, [num_frames // 2], THUMBNAIL_SIDE)
    return still(frame, "webp", quality=THUMBNAIL_QUALITY)


def _sheet(video: Path, num_frames: int) -> bytes:
    """Evenly spaced frames, the first and the last among them, in rows without gaps."""
    shown = np.linspace(0, num_frames - 1, min(num_frames, TILES), dtype=int).tolist()
    return still(sprite_sheet(_shrunk(video, shown, TILE_SIDE), COLUMNS), "jpeg", quality=SHEET_QUALITY)


def _shrunk(video: Path, numbers: Sequence[int], side: int) -> list[NDArray[np.uint8]]:
    """Frames by their ascending numbers, each made small before the next one is decoded."""
    wanted = set(numbers)
    frames = enumerate(islice(each_frame(video), numbers[-1] + 1))
    return [fit(frame, side) for number, frame in frames if number in wanted]
