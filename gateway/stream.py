"""A job's events: kept while it lives, followed by any number of readers, told as server-sent events.

``queued`` {position, eta_s} · ``stage`` {stage} · ``step`` {step, total_steps, eta_s, progress} ·
``preview`` {step, width, height, jpeg} · ``frames`` {first, count, total, jpeg?} · and at the end ``done`` (the Video
object) or ``error`` {error}.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from fastapi.sse import ServerSentEvent
from numpy.typing import NDArray

from gateway.jobs.store import Job
from gateway.media.stills import jpeg
from gateway.replies import error_object, video_object

ENDINGS = ("done", "error")
KEPT_STILLS = 16
"""Chunks whose JPEGs stay in memory; who is further behind has them decoded from the file."""
FRAMES_PER_EVENT = 8
FRAMES_PER_READ = 24
"""Frames decoded from the file at a time. Each read decodes from the start, so small ones cost more."""

ReadFrames = Callable[[int, int], NDArray[np.uint8]]
"""(first, count) -> up to `count` frames of the job's video; blocks."""


@dataclass(frozen=True)
class Event:
    id: int
    """1 for the first of its log."""
    name: str
    data: dict[str, Any]

    @property
    def is_last(self) -> bool:
        return self.name in ENDINGS


class EventLog:
    """What happened to one job since this process took it, for readers that come and go; of previews the newest."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(4)
        """Tells this log's event ids from those of the log that the job had before a restart."""
        self._events: list[Event | None] = []
        """None where a preview was that a newer one has replaced."""
        self._preview: int | None = None
        """Where the newest preview is."""
        self._changed = asyncio.Condition()
        self._stills: dict[int, list[str]] = {}
        self._jpeg_readers = 0
        self.readers = 0
        """How many follow it now."""
        self.frames_told = 0
        """Frames that events were published of, from the first on without a gap."""

    @property
    def wants_stills(self) -> bool:
        """Whether anybody now listening asked for JPEGs."""
        return self._jpeg_readers > 0

    @property
    def ended(self) -> bool:
        newest = self._events[-1] if self._events else None
        return newest is not None and newest.is_last

    async def publish(self, name: str, data: dict[str, Any], stills: list[str] | None = None) -> None:
        """Append an event; nothing follows an ending, and no frame is told of twice."""
        if self.ended or (name == "frames" and data["first"] < self.frames_told):
            return
        if name == "frames":
            self.frames_told = data["first"] + data["count"]
        if name == "preview":
            if self._preview is not None:
                self._events[self._preview] = None
            self._preview = len(self._events)
        self._events.append(Event(len(self._events) + 1, name, data))
        if stills is not None:
            self._stills[data["first"]] = stills
            if len(self._stills) > KEPT_STILLS:
                del self._stills[next(iter(self._stills))]
        async with self._changed:
            self._changed.notify_all()

    async def follow(self, after: int = 0) -> AsyncGenerator[Event, None]:
        """Events with a higher id, as they come, up to and with the ending."""
        self.readers += 1
        try:
            while True:
                async with self._changed:
                    while len(self._events) <= after:
                        await self._changed.wait()
                fresh = self._events[after:]
                after += len(fresh)
                for event in fresh:
                    if event is None:
                        continue
                    yield event
                    if event.is_last:
                        return
        finally:
            self.readers -= 1

    def stills(self, first: int) -> list[str] | None:
        """The JPEGs of the chunk that begins at a frame, if they are still there."""
        return self._stills.get(first)

    @contextlib.contextmanager
    def reading_stills(self, wanted: bool) -> Iterator[None]:
        self._jpeg_readers += wanted
        try:
            yield
        finally:
            self._jpeg_readers -= wanted

    def position(self, last_event_id: str | None) -> int:
        """The id to go on after, from what a reader says it saw last; 0 for anything that is not of this log."""
        token, _, number = (last_event_id or "").partition("-")
        return int(number) if token == self.token and number.isdecimal() else 0


def encode_stills(frames: NDArray[np.uint8]) -> list[str]:
    """(n, height, width, 3) RGB to base64 JPEGs; blocks."""
    return [as_base64(jpeg(frame)) for frame in frames]


def as_base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def ending(job: Job) -> tuple[str, dict[str, Any]]:
    """The last event of a finished job."""
    return ("done", video_object(job)) if job.status == "completed" else ("error", {"error": error_object(job)})


async def tell_live(
    log: EventLog, last_event_id: str | None, read: ReadFrames, with_stills: bool
) -> AsyncGenerator[ServerSentEvent, None]:
    """A running job's events from the beginning, or from where the reader was."""
    stored = _StoredStills(read)
    with log.reading_stills(with_stills):
        async with contextlib.aclosing(log.follow(log.position(last_event_id))) as events:
            async for event in events:
                data = event.data
                if with_stills and event.name == "frames":
                    stills = log.stills(data["first"])
                    data = data | {"jpeg": stills or await stored.of(data["first"], data["count"])}
                yield _render(event.name, data, f"{log.token}-{event.id}")


async def tell_ended(job: Job, read: ReadFrames, with_stills: bool) -> AsyncGenerator[ServerSentEvent, None]:
    """What there is to know of a job that ended before the reader came: its frames and its ending."""
    stored = _StoredStills(read)
    total = job.params.num_frames if job.status == "completed" else 0
    group = FRAMES_PER_EVENT if with_stills else max(total, 1)
    for first in range(0, total, group):
        data: dict[str, Any] = {"first": first, "count": min(group, total - first), "total": total}
        if with_stills:
            data["jpeg"] = await stored.of(first, data["count"])
        yield _render("frames", data)
    yield _render(*ending(job))


class _StoredStills:
    """JPEGs from the video's file for one reader, who takes the frames in order."""

    def __init__(self, read: ReadFrames) -> None:
        self._read = read
        self._first = 0
        self._frames: NDArray[np.uint8] | None = None

    async def of(self, first: int, count: int) -> list[str]:
        return await asyncio.to_thread(self._encode, first, count)

    def _encode(self, first: int, count: int) -> list[str]:
        skip = first - self._first
        if self._frames is None or not 0 <= skip <= len(self._frames) - count:
            try:
                self._frames = self._read(first, max(count, FRAMES_PER_READ))
            except FileNotFoundError:
                return []  # deleted under the reader; the ending that follows says so
            self._first, skip = first, 0
        return encode_stills(self._frames[skip : skip + count])


def _render(name: str, data: dict[str, Any], event_id: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(event=name, raw_data=msgspec.json.encode(data).decode(), id=event_id)
