"""What SIGINT and SIGTERM are to a command that has processes: news in a loop, else an interrupt."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any


class Signals:
    """SIGINT and SIGTERM as news, in place of what they do by default; for the rest of the running loop's life."""

    def __init__(self) -> None:
        self._numbers: asyncio.Queue[int] = asyncio.Queue()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._numbers.put_nowait, number)

    async def during(self, work: Coroutine[Any, Any, None]) -> int | None:
        """Do the work. The signal that came before it was done and put an end to it, or None."""
        task, signalled = asyncio.create_task(work), asyncio.create_task(self._numbers.get())
        try:
            await asyncio.wait({task, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            return signalled.result() if signalled.done() else None
        finally:
            task.cancel()
            signalled.cancel()
            await asyncio.gather(task, signalled, return_exceptions=True)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that every child is stopped."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
