"""Where results lie, and one job's video while it is made. Knows neither the store nor the mesh.

OUTPUT/videos/video_….fragments.mp4     grows while a job runs; always on this host
OUTPUT/videos/video_….webm.partial      what grows beside them if another format is wanted
OUTPUT/videos/video_….mp4               the finished file (or .webm, .gif, .zip); with a bucket there, under videos/
OUTPUT/videos/video_….thumbnail.webp    derived files, made when somebody asks; always on this host
OUTPUT/images/image_….png               pictures that were asked for by URL; with a bucket there, under images/
OUTPUT/cache/video_….mp4                copies of what lies in the bucket, for whoever has to read a file
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from gateway.jobs.bucket import Bucket, StorageFailed, Stored
from gateway.jobs.store import Job
from gateway.media.formats import SUFFIXES, VideoFormat, VideoWriter, open_writer
from gateway.media.frames import each_frame
from gateway.media.metadata import generation_metadata
from gateway.media.mp4 import FragmentWriter, read_frames, remux_faststart, replace_synced
from runtime.errors import RequestFailed
from runtime.log import get_logger

VIDEO_ID = re.compile(r"video_[0-9a-f]+")
IMAGE_ID = re.compile(r"image_[0-9a-f]+")
DERIVED = re.compile(r"[a-z0-9_-]+\.[a-z0-9]+")
FINISHED = tuple(SUFFIXES.values())
"""Endings of finished videos."""
STILLS = (".png", ".webp", ".jpeg")
MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".zip": "application/zip",
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
}
RESULTS = frozenset({*FINISHED, *STILLS})
PAGE = 500
"""Files that are looked up in the store at once."""
STORAGE_FAILED = "storage_failed"
"""The code of requests whose result could not be stored."""

log = get_logger("outputs")


@dataclass(frozen=True)
class OldFile:
    """A file that may have outlived what it was made for."""

    owner: str
    """The id at the beginning of its name."""
    file: Path | Stored
    modified_at: float
    """Seconds since the epoch."""

    @property
    def is_result(self) -> bool:
        """A finished video or picture, not something on the way to one."""
        return self.file.name.partition(self.owner)[2] in RESULTS


class Outputs:
    """The folder of results, and the bucket that finished files go to if there is one.

    Args:
        metadata: videos say how they were made.
    """

    def __init__(self, output_path: Path, bucket: Bucket | None = None, *, metadata: bool = True) -> None:
        self.metadata = metadata
        self._folder = output_path / "videos"
        self._images = output_path / "images"
        self._cache = output_path / "cache"
        self._bucket = bucket

    async def open(self) -> None:
        """Raises `StartFailed` if results could not be stored."""
        for folder in (self._folder, self._images):
            folder.mkdir(parents=True, exist_ok=True)
        if self._bucket is not None:
            await self._bucket.check()

    def fragments(self, video_id: str) -> Path:
        """The fragmented MP4 that grows with every chunk of frames."""
        return self._place(video_id, ".fragments.mp4")

    def final(self, video_id: str, kind: VideoFormat = "mp4") -> Path:
        """Where the video to hand out appears: whole, an MP4 with its index in front, or not at all."""
        return self._place(video_id, SUFFIXES[kind])

    def derived(self, video_id: str, name: str) -> Path:
        """Where something made from a finished video may be kept, e.g. ``thumbnail.webp``; it goes with the video."""
        if not DERIVED.fullmatch(name) or name.startswith("fragments."):
            raise ValueError(f"{name!r} is no name of a derived file")
        return self._place(video_id, f".{name}")

    async def keep(self, video_id: str, file_name: str) -> None:
        """Bring a finished file from its place in the folder to where it stays.

        Raises:
            RequestFailed: the bucket did not take it.
        """
        if self._bucket is None:
            return
        path = self._folder / file_name
        try:
            await self._bucket.put(f"videos/{file_name}", path, media_type_of(file_name))
        except StorageFailed as error:
            raise RequestFailed(video_id, STORAGE_FAILED, str(error)) from error
        await asyncio.to_thread(path.unlink)

    async def recover(self, video_id: str, file_name: str) -> bool:
        """Whether the finished file of a job whose end was not noted is there; it is where it stays then.

        Raises:
            StorageFailed: the bucket does not answer.
            RequestFailed: the bucket did not take it.
        """
        if await asyncio.to_thread((self._folder / file_name).exists):
            await self.keep(video_id, file_name)
            return True
        return self._bucket is not None and await self._bucket.head(f"videos/{file_name}") is not None

    async def video(self, file_name: str) -> Path | Stored | None:
        """A finished video, wherever it lies.

        Raises:
            StorageFailed: the bucket does not answer.
        """
        return await self._locate(self._folder, file_name)

    async def keep_image(self, image_id: str, suffix: str, content: bytes) -> None:
        """Store a picture, to be found by its id.

        Raises:
            RequestFailed: it could not be stored.
        """
        name = f"{_checked(image_id, IMAGE_ID)}{suffix}"
        if self._bucket is None:
            await asyncio.to_thread(write_whole, self._images / name, content)
            return
        try:
            await self._bucket.put(f"images/{name}", content, media_type_of(name))
        except StorageFailed as error:
            raise RequestFailed(image_id, STORAGE_FAILED, str(error)) from error

    async def image(self, image_id: str) -> Path | Stored | None:
        """A picture by its id; None as well for what is no id.

        Raises:
            StorageFailed: the bucket does not answer.
        """
        if not IMAGE_ID.fullmatch(image_id):
            return None
        for suffix in STILLS:
            found = await self._locate(self._images, image_id + suffix)
            if found is not None:
                return found
        return None

    def stream(self, stored: Stored, first: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of a file in the bucket; raises `StorageFailed`."""
        assert self._bucket is not None
        return self._bucket.read(stored.name, first, end)

    async def sign(self, stored: Stored, seconds: float) -> str:
        """A URL of a file in the bucket, good for some time."""
        assert self._bucket is not None
        return await self._bucket.sign(stored.name, seconds)

    def local_copy(self, file_name: str) -> Path:
        """A finished video as a file of this host; blocks while it is fetched.

        Raises:
            FileNotFoundError: there is no such video.
            StorageFailed: the bucket does not answer.
        """
        path = self._folder / file_name
        if self._bucket is None or path.exists():
            return path
        cached = self._cache / file_name
        if not cached.exists():
            self._bucket.fetch(f"videos/{file_name}", cached)
        with contextlib.suppress(FileNotFoundError):
            os.utime(cached)  # the sweeper takes what was not used for some time
        return cached

    def read(self, job: Job, first: int, count: int) -> NDArray[np.uint8]:
        """Up to `count` frames from number `first` on, of a running or a finished job; blocks.

        Raises:
            FileNotFoundError: nothing was written, it was deleted, or the bucket does not answer.
        """
        try:
            return read_frames(self.fragments(job.id), first, count)
        except FileNotFoundError:
            # They go only after the final file has come, so looking in this order never falls between the two.
            try:
                name = self.final(job.id, job.asked.output_format).name
                return _stacked(each_frame(self.local_copy(name)), first, count)
            except StorageFailed as error:
                raise FileNotFoundError(str(error)) from error

    async def clear(self, *video_ids: str) -> None:
        """Remove from this host everything of some videos."""
        wanted = {_checked(video_id, VIDEO_ID) for video_id in video_ids}
        await asyncio.to_thread(_unlink_of, wanted, (self._folder, self._cache))

    async def delete(self, *video_ids: str) -> None:
        """Remove everything of some videos, on this host and in the bucket; what the bucket keeps is logged."""
        await self.clear(*video_ids)
        await self._delete_stored([f"videos/{video_id}{suffix}" for video_id in video_ids for suffix in FINISHED])

    async def old_files(self, kind: Literal["videos", "images"], moment: float) -> AsyncIterator[Sequence[OldFile]]:
        """Files that were last written before a moment (seconds since the epoch), by pages.

        Raises:
            StorageFailed: the bucket does not answer.
        """
        folder, pattern = (self._folder, VIDEO_ID) if kind == "videos" else (self._images, IMAGE_ID)
        found = await asyncio.to_thread(_old_files, folder, pattern, moment)
        for start in range(0, len(found), PAGE):
            yield found[start : start + PAGE]
        if self._bucket is not None:
            async for page in self._bucket.list(kind, PAGE):
                named = [(pattern.match(stored.name.removeprefix(f"{kind}/")), stored) for stored in page]
                old = [OldFile(match[0], stored, stored.modified_at) for match, stored in named if match]
                yield [file for file in old if file.modified_at < moment]

    async def discard(self, files: Sequence[OldFile]) -> None:
        """Remove single files; what the bucket keeps is logged."""
        await asyncio.to_thread(_unlink, [old.file for old in files if isinstance(old.file, Path)])
        await self._delete_stored([old.file.name for old in files if isinstance(old.file, Stored)])

    async def trim_cache(self, moment: float) -> None:
        """Forget copies that were last used before a moment."""
        await self.discard(await asyncio.to_thread(_old_files, self._cache, VIDEO_ID, moment))

    async def _delete_stored(self, names: Sequence[str]) -> None:
        if self._bucket is None or not names:
            return
        try:
            await self._bucket.delete(names)
        except StorageFailed as error:
            log.warning("files stay in the bucket", names=names[:4], reason=str(error))

    async def _locate(self, folder: Path, name: str) -> Path | Stored | None:
        path = folder / name
        if await asyncio.to_thread(path.is_file):
            return path
        return None if self._bucket is None else await self._bucket.head(f"{folder.name}/{name}")

    def _place(self, video_id: str, suffix: str) -> Path:
        return self._folder / f"{_checked(video_id, VIDEO_ID)}{suffix}"


class Recording:
    """One job's video from its first chunk to the finished file. Every method blocks; one thread at a time.

    Whatever format is wanted, the fragments are there to be streamed; another one is made beside them, of the same
    frames. All methods but `close` raise `RequestFailed` where the disk is full or an encoder gives up.
    """

    def __init__(self, outputs: Outputs, job: Job) -> None:
        self._kind = job.asked.output_format
        self._fragments = outputs.fragments(job.id)
        self._final = outputs.final(job.id, self._kind)
        self._partial = self._final.with_name(f"{self._final.name}.partial")
        self._with_metadata = outputs.metadata
        self._job = job
        self._writer: FragmentWriter | None = None
        self._other: VideoWriter | None = None

    def add(self, pixels: NDArray[np.uint8], timings: dict[str, float]) -> None:
        """Append (n, height, width, 3) RGB frames; when it returns they can be read back."""
        with _stored(self._job.id):
            if self._writer is None:
                params = self._job.params
                metadata = self._metadata(timings)
                self._writer = FragmentWriter(self._fragments, params.width, params.height, params.fps, metadata)
            self._writer.write(pixels)

    def convert(self, pixels: NDArray[np.uint8], timings: dict[str, float]) -> None:
        """The same frames once more, for the format that is wanted; an MP4 needs nothing of it."""
        if self._kind == "mp4":
            return
        with _stored(self._job.id):
            if self._other is None:
                # Whoever had the job before may still write: into a file that is nobody's.
                self._partial.unlink(missing_ok=True)
                sides = self._job.params.width, self._job.params.height
                metadata = self._metadata(timings)
                self._other = open_writer(self._kind, self._partial, *sides, self._job.params.fps, metadata)
            self._other.write(pixels)

    def finish(self) -> str:
        """Make the finished file whole; returns its name."""
        with _stored(self._job.id):
            if self._writer is not None:
                self._writer.close()
            if self._other is None:
                remux_faststart(self._fragments, self._final)
            else:
                self._other.finish()
                replace_synced(self._partial, self._final)
            self._fragments.unlink()
        return self._final.name

    def close(self) -> None:
        """What could not be written is lost by now, and was said."""
        writers: tuple[FragmentWriter | VideoWriter | None, ...] = (self._writer, self._other)
        for writer in writers:
            with contextlib.suppress(OSError, FFmpegError):
                if writer is not None:
                    writer.close()

    def _metadata(self, timings: dict[str, float]) -> dict[str, object] | None:
        return generation_metadata(self._job.params, self._job.model, timings) if self._with_metadata else None


@contextlib.contextmanager
def _stored(job_id: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.exception("a video could not be stored", job=job_id)
        reason = f"the video could not be stored: {error.strerror or type(error).__name__}"
        raise RequestFailed(job_id, STORAGE_FAILED, reason) from error
    except FFmpegError as error:
        log.exception("a video could not be encoded", job=job_id)
        raise RequestFailed(job_id, "encoding_failed", f"the video could not be encoded: {error.strerror}") from error


def media_type_of(file_name: str) -> str:
    """By its ending, for everything that we make."""
    return MEDIA_TYPES[Path(file_name).suffix]


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all; blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _checked(name: str, pattern: re.Pattern[str]) -> str:
    """Every path is made of an id that holds nothing but letters and digits, so none leaves the folder."""
    if not pattern.fullmatch(name):
        raise ValueError(f"{name!r} is no {pattern.pattern.partition('_')[0]} id")
    return name


def _stacked(frames: Iterator[NDArray[np.uint8]], first: int, count: int) -> NDArray[np.uint8]:
    wanted = list(islice(frames, first, first + count))
    return np.stack(wanted) if wanted else np.empty((0, 0, 0, 3), np.uint8)


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _unlink_of(owners: Set[str], folders: Iterable[Path]) -> None:
    """One look at each folder, however many ids there are."""
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            _unlink([folder / name for name in os.listdir(folder) if name.partition(".")[0] in owners])


def _old_files(folder: Path, pattern: re.Pattern[str], moment: float) -> list[OldFile]:
    """Only what bears an id of ours is ours to delete."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            match = pattern.match(entry.name)
            with contextlib.suppress(FileNotFoundError):
                if match and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < moment:
                    found.append(OldFile(match[0], Path(entry.path), entry.stat().st_mtime))
    return found
