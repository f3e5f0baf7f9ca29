"""The client's end of a call: whether it is still there, and a stream of events that outlasts the proxies between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.requests import Request
from starlette.responses import StreamingResponse

KEEPALIVE_S = 15.0
"""A stream in which nothing happens says so this often."""
CLIENT_LEFT = 499
"""For the access log; nobody reads the answer."""

T = TypeVar("T")
Told = tuple[str, dict[str, Any]]
"""An event's name and data."""


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result, or None if the client closed the connection first; the work is cancelled then."""
    made, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else None
    finally:
        for task in (made, gone):
            task.cancel()
        await asyncio.gather(made, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(events: AsyncGenerator[Told, None]) -> StreamingResponse:
    """The events as they come, each as one server-sent event with JSON; a client that leaves closes the generator.

    It is for few events: what a client has not read yet is kept.
    """
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_render(events), 200, headers, "text/event-stream")


async def _render(events: AsyncGenerator[Told, None]) -> AsyncGenerator[bytes, None]:
    # A task of its own for two reasons: the mesh must not wait for a client that does not read, and the response
    # cancels whatever it waits in again and again, so that nothing could be ended in an orderly way.
    queue: asyncio.Queue[Told | None] = asyncio.Queue()
    telling = asyncio.create_task(_tell(events, queue))
    telling.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    told = await queue.get()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if told is None:
                break
            yield await asyncio.to_thread(_encode, *told)
        await telling
    finally:
        telling.cancel()


async def _tell(events: AsyncGenerator[Told, None], queue: asyncio.Queue[Told | None]) -> None:
    async with contextlib.aclosing(events):
        async for told in events:
            queue.put_nowait(told)


def _encode(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=msgspec.json.encode(data).decode())
