"""`framemesh serve` as benches see it from outside: started life after life on one folder and port, its processes and
what it leaves behind found. Knows no requests."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import psutil

from launch.observe import FOLDER_PREFIX, Observer
from launch.process import child_environment
from runtime.errors import FramemeshError

ROLES = ("worker0", "worker1", "scheduler", "gateway", "torchrun", "launcher")
"""The processes of a mesh of two ranks."""
MODULES = {"runtime": "scheduler", "torch.distributed.run": "torchrun", "gateway": "gateway", "launch": "launcher"}
MARK = "BENCH_SERVER"
"""An environment variable that every process of a server inherits, so that an orphan can be told."""
POLL_S = 0.05


class Stuck(Exception):
    """Something that has to happen did not in its time."""


def until(condition: Callable[[], bool], patience_s: float, what: str) -> None:
    """Look again and again.

    Raises:
        Stuck: it did not come true in time.
    """
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            raise Stuck(f"not within {patience_s:.0f} s: {what}")
        time.sleep(POLL_S)


class Server:
    """One output folder, and the processes that serve it."""

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs, self.trace, self._log = folder / "outputs", folder / "trace.jsonl", folder / "server.log"
        self.spool = self.outputs / "spool"
        # Paths of Unix sockets are short; a temporary folder of its own shows what is left behind.
        self.temporary = Path(tempfile.mkdtemp(prefix="fm"))
        self._mark = secrets.token_hex(8)
        self._environment = {**(environment or {}), MARK: self._mark, "TMPDIR": str(self.temporary)}
        # A default that a flag names again would be given twice.
        files = ("--output-path", str(self.outputs), "--trace-path", str(self.trace))
        self._flags = (
            "--num-gpus",
            "2",
            "--ulysses-degree",
            "2",
            *files,
            "--cost-cache",
            str(folder / "costs"),
            *flags,
        )
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> Server:
        """Start a life and wait until it serves, at the address of the last one."""
        command = [sys.executable, "-P", "-m", "launch", "serve", "--port", str(urlsplit(self.url).port or 0)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._flags],
                env=child_environment(self._environment),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("framemesh serves"):
            raise Stuck(f"the server did not start: {self.log[-2000:]}")
        self.url = line.split()[-1]
        return self

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def pids(self) -> dict[str, int]:
        """Role -> process, of those that are there."""
        found = {}
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                found[role_of(process)] = process.pid
        return {role: found[role] for role in ROLES if role in found}

    def tree(self) -> list[psutil.Process]:
        """The launcher and what descends from it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []

    def orphans(self) -> list[str]:
        """Processes of any life of this server that are not in the launcher's tree."""
        ours = {process.pid for process in self.tree()} if self.process.poll() is None else set()
        return [f"{p.pid} {' '.join(p.cmdline()[:6])}" for p in self.marked() if p.pid not in ours]

    def marked(self) -> list[psutil.Process]:
        """Every living process that was ever started by a life of this server."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left_in_temporary(self) -> list[str]:
        """Names in the temporary folder that do not belong to the life that runs."""
        alive = self._process is not None and self._process.poll() is None
        # Inductor's folder is a cache for all processes of a user, by intent.
        names = [path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor")]
        folders = [name for name in names if name.startswith(FOLDER_PREFIX)]
        return [name for name in names if name not in folders[: 1 if alive else 0]]

    def wait_whole(self, patience_s: float = 180.0) -> dict[str, int]:
        """Until every process is there and the mesh takes work; the processes."""
        until(self._is_whole, patience_s, "the server is whole again")
        return self.pids()

    def stop(self, patience_s: float = 90.0) -> int:
        """Drain; the exit code of the launcher."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience_s)

    def kill(self) -> None:
        """End whatever is there and remove the sockets; safe at any time."""
        for process in self.marked():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.communicate()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _is_whole(self) -> bool:
        """As the gateway says, and the scheduler of the very ranks that there are: it may not have missed them yet."""
        pids = self.pids()
        if len(pids) < len(ROLES) or not self._takes_work():
            return False
        endpoint = next(self.temporary.glob(f"{FOLDER_PREFIX}*/scheduler"))
        with contextlib.suppress(FramemeshError), Observer(f"ipc://{endpoint}") as observer:
            status = observer.look()
            return status.ready and [rank.pid for rank in status.ranks] == [pids["worker0"], pids["worker1"]]
        return False

    def _takes_work(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health/ready", timeout=2.0).status_code == 200
        return False


def role_of(process: psutil.Process) -> str:
    """In the words of `ROLES`; helpers are called by their program. Raises psutil.Error if it is gone."""
    words = process.cmdline()
    module = words[words.index("-m") + 1] if "-m" in words else ""
    # torchrun has a "-m workers" of its own behind the "-m" that names it.
    if module == "workers":
        return f"worker{process.environ()['RANK']}"
    return MODULES.get(module, os.path.basename(words[0]) if words else process.name())
