"""One process that has to be there: watched for its end and for hanging, started again, counted when it dies."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from launch.process import Child

CRASH_WINDOW_S = 300.0
"""So far back a death counts."""
SILENT_S = 6.0
"""A process that shows no life for so long hangs."""
PROBE_S = 2.0
"""How often a gateway is asked whether it lives, and how long it may take to answer."""


@dataclass(frozen=True)
class End:
    """How a child ended."""

    code: int | None
    """None: it hung and was killed."""
    words: str


class Keeper:
    """Owns one child after the other; decides nothing."""

    def __init__(
        self, name: str, start: Callable[[], Awaitable[None]], until_it_hangs: Callable[[Child], Awaitable[str]]
    ) -> None:
        """`start` sets `child`; `until_it_hangs` returns, with the reason, when a child has to be killed."""
        self.name = name
        self.start = start
        self.child: Child | None = None
        self._until_it_hangs = until_it_hangs
        self._deaths: deque[float] = deque()

    async def end(self) -> End:
        """Until the child is gone, and with it its whole session."""
        child = self.child
        assert child is not None
        exited = asyncio.ensure_future(child.wait())
        hangs = asyncio.ensure_future(self._until_it_hangs(child))
        try:
            await asyncio.wait({exited, hangs}, return_when=asyncio.FIRST_COMPLETED)
            code = exited.result() if exited.done() else None
            words = f"ended with exit code {code}" if exited.done() else f"{hangs.result()} and was killed"
            await child.stop(0)
            return End(code, words)
        finally:
            exited.cancel()
            hangs.cancel()

    def note_death(self) -> int:
        """How often it died within the window, this time included."""
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > CRASH_WINDOW_S:
            self._deaths.popleft()
        return len(self._deaths)


async def until_stopped(child: Child) -> str:
    """Until it has been in the stopped state (SIGSTOP) for too long: nothing else shows that torchrun hangs."""
    # Counted in our own ticks: a launcher that was itself suspended blames nobody.
    ticks = 0.0
    while ticks < SILENT_S:
        await asyncio.sleep(1.0)
        ticks = ticks + 1.0 if _is_stopped(child.pid) else 0.0
    return f"was stopped for {ticks:.0f} s"


async def until_deaf(url: str) -> str:
    """Until the HTTP server has not answered for too long."""
    missed = 0.0
    loop = asyncio.get_running_loop()
    while missed < SILENT_S:
        asked = loop.time()
        missed = 0.0 if await _answers(url) else missed + PROBE_S
        await asyncio.sleep(max(asked + PROBE_S - loop.time(), 0.0))
    return f"did not answer for {missed:.0f} s"


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


async def _answers(url: str) -> bool:
    """A real request on a connection of its own: that one can connect says nothing, the kernel accepts by itself."""
    place = urlsplit(url)
    ask = f"GET /health/live HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            try:
                writer.write(ask.encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
