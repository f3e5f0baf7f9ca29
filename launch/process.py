"""One child process: how it is started, how it is ended. Knows nothing of meshes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.process import die_with_parent

STDERR = 2
HOME = Path(__file__).resolve().parent.parent
"""The folder that holds the four packages."""


def python_module(module: str, *args: str) -> list[str]:
    """A command line that runs one of our modules; -P keeps a stranger's `runtime/` in the working directory out."""
    return [sys.executable, "-P", "-m", module, *args]


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours, with the packages importable and safe paths for grandchildren (torchrun's ranks) too."""
    paths = [str(HOME), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **ours, **extra}


class Child:
    """A running child in a session of its own: a Ctrl-C in the terminal reaches the launcher alone."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        *,
        announces: bool = False,
    ) -> Child:
        """What it prints goes to `log`, or to our stderr; with `announces` its stdout is for `first_line`."""
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("ab")).fileno() if log is not None else STDERR
            process = await asyncio.create_subprocess_exec(
                *command,
                env=child_environment(environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if announces else output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return cls(name, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def first_line(self) -> str:
        """What it prints first on stdout; empty if it ended without a word."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    async def wait(self) -> int:
        """Its exit code."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then after the grace SIGKILL for its whole session; without a grace SIGKILL at once."""
        if self.running and grace_s > 0:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()
