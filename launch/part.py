"""Processes that are kept up together: started in order, and again when one dies or hangs. Knows no mesh.

What fails before the part was ever ready would fail the same way again and ends it. Later a process that dies is
started again, up to `crash_limit` times in five minutes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from launch.keeper import End, Keeper
from launch.observe import CONFIG_FILE, RunFolder
from launch.process import Child
from runtime.config import Config
from runtime.errors import StartFailed
from runtime.log import get_logger

GRACE_S = {"gateway": 5.0, "scheduler": 1.0}
"""Between SIGTERM and SIGKILL. torchrun gets none: its ranks die with it, and it would print a traceback."""
AT_ONCE_S = 1.0
"""The most of it for somebody who will not wait."""
START_S = 60.0
"""How long a scheduler or a gateway may take to say its first word."""

log = get_logger("supervisor")


class Part:
    """Owns the children, and the folder of their sockets and logs."""

    def __init__(self, config: Config, folder: RunFolder, *, quiet: bool) -> None:
        """`quiet` sends what the children log to files, whose end is shown if one of them fails."""
        self.config = config
        self._quiet = quiet
        self._folder = folder
        self._run_dir = folder.path
        self._config_file = self._run_dir / CONFIG_FILE
        self._keepers: dict[str, Keeper] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._trouble: asyncio.Future[str] | None = None
        self._ready = asyncio.Event()

    @property
    def pids(self) -> dict[str, int]:
        return {name: keeper.child.pid for name, keeper in self._keepers.items() if keeper.child is not None}

    async def start(self) -> None:
        """Start every process.

        Raises:
            StartFailed: one did not come up.
        """
        self._trouble = asyncio.get_running_loop().create_future()
        for name, keeper in self._keepers.items():
            await keeper.start()
            self._tasks[name] = asyncio.create_task(self._keep(keeper), name=f"keeper of {name}")

    async def broken(self) -> None:
        """Until something breaks that cannot be repaired here; raises StartFailed then."""
        await self._until()

    async def stop(self, *, at_once: bool = False) -> None:
        """End every process and remove every socket; safe to call at any time."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        most_s = AT_ONCE_S if at_once else max(GRACE_S.values())
        children = [keeper.child for keeper in self._keepers.values() if keeper.child is not None]
        await asyncio.gather(*(child.stop(min(GRACE_S.get(child.name, 0.0), most_s)) for child in children))
        self._folder.remove()

    async def _until(self, *events: asyncio.Event) -> None:
        """Until one of them happens; raises StartFailed for what breaks first."""
        assert self._trouble is not None
        waiters: list[asyncio.Future[Any]] = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait([self._trouble, *waiters], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
        if self._trouble.done():
            raise StartFailed(self._trouble.result())

    async def _keep(self, keeper: Keeper) -> None:
        """Start a process again whenever it is gone, until it is not wanted any more or dies too often."""
        while True:
            end = await keeper.end()
            reason = f"the {keeper.name} process {end.words}{self._last_words(keeper.name)}"
            if self._is_due(keeper, end):
                return
            if not self._ready.is_set():
                self._give_up(reason)
                return
            deaths = keeper.note_death()
            if deaths >= self.config.crash_limit:
                often = f", {deaths} deaths in five minutes (--crash-limit)" if deaths > 1 else ""
                self._give_up(f"{reason}{often}")
                return
            log.error("starting a process again", process=keeper.name, reason=reason, deaths=deaths)
            try:
                await keeper.start()
            except OSError as error:
                self._give_up(f"{reason}; starting it again failed: {error}")
                return
            except StartFailed as error:
                # The child is dead or deaf, which is what the next turn finds out.
                log.error("it did not start", process=keeper.name, reason=str(error))

    def _is_due(self, keeper: Keeper, end: End) -> bool:
        """Whether a process that is gone was expected to go."""
        return False

    def _give_up(self, reason: str) -> None:
        if self._trouble is not None and not self._trouble.done():
            self._trouble.set_result(reason)

    async def _spawn(
        self, name: str, command: list[str], environment: dict[str, str], announces: bool = False
    ) -> Child:
        child = await Child.start(name, command, environment, self._log_file(name), announces=announces)
        self._keepers[name].child = child
        return child

    def _last_words(self, name: str) -> str:
        path = self._log_file(name)
        if path is None or not path.exists():
            return ""
        lines = path.read_text(errors="replace").splitlines()[-8:]
        return "; its last lines:\n  " + "\n  ".join(lines) if lines else ""

    def _log_file(self, name: str) -> Path | None:
        return self._run_dir / f"{name}.log" if self._quiet else None
