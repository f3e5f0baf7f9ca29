"""A job's video while it is made: its growing file from the first byte on, for readers that come and go at any time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

from starlette.responses import StreamingResponse

from gateway.stream import EventLog

PIECE_BYTES = 1 << 18


class BrokenOff(Exception):
    """What was begun to be sent has no end: the connection is closed, so that nobody takes the part for the whole."""


async def open_when_begun(log: EventLog, path: Path) -> BinaryIO | None:
    """The file once there are frames in it; None if the job ended without any, or if they lie on another host."""
    async with contextlib.aclosing(log.follow()) as events:
        async for event in events:
            if event.name == "frames" or event.is_last:
                break
    try:
        return await asyncio.to_thread(path.open, "rb")
    except FileNotFoundError:
        return None


def stream_growing(file: BinaryIO, log: EventLog) -> StreamingResponse:
    """The file as it grows, fragment by fragment, until the job has ended; a slow reader costs no memory."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_grow(file, log), 200, headers, "video/mp4")


async def _grow(file: BinaryIO, log: EventLog) -> AsyncGenerator[bytes, None]:
    # An open file outlives its name, which goes when the finished file has come.
    with contextlib.closing(file):
        async with contextlib.aclosing(log.follow()) as events:
            async for event in events:
                if event.name == "frames":
                    while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                        yield piece
                elif event.name == "error":
                    raise BrokenOff(event.data["error"]["message"])
