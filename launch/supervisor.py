"""One mesh on this host: starts scheduler, workers and gateway in order, fences what hangs, stops everything.

launcher ── scheduler           python -P -m runtime
         ├─ torchrun ── rank …  python -P -m torch.distributed.run … -m workers
         └─ gateway             python -P -m gateway        (only with `with_gateway`)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil

from launch.devices import pick_devices
from launch.observe import RunFolder, sweep_dead_folders
from launch.process import Child, python_module
from runtime.config import Config, save_frozen
from runtime.errors import PeerGone, StartFailed
from runtime.log import get_logger
from runtime.protocol import Drain, Fence, FromScheduler, FromSupervisor, MeshState, SupervisorHello, Welcome
from runtime.wire import AsyncChannel, incarnation

CRASH_LOOP = 3
CRASH_WINDOW_S = 300.0
"""So many losses of the worker group within this time end the mesh with the last error."""
GRACE_S = {"gateway": 5.0, "scheduler": 1.0}
"""Between SIGTERM and SIGKILL. torchrun gets none: its ranks die with it, and it would print a traceback."""

log = get_logger("supervisor")


class Supervisor:
    """Owns the children, the folder of their sockets, and the control connection to the scheduler."""

    def __init__(self, config: Config, folder: Path, *, with_gateway: bool, quiet: bool) -> None:
        """`quiet` sends what the children log to files, whose end is shown if one of them fails."""
        self._devices = pick_devices(config.num_gpus, config.device, share=config.dist_backend == "staged")
        self.config = replace(config, device=self._devices.kind)
        self.devices_reason = self._devices.reason
        self._model_folder = folder
        self._with_gateway = with_gateway
        self._quiet = quiet
        sweep_dead_folders()
        self._folder = RunFolder(config.model_name)
        self._run_dir = self._folder.path
        self._children: list[Child] = []
        self._control: AsyncChannel[FromSupervisor, FromScheduler] | None = None
        self._listener: asyncio.Task[None] | None = None
        self._exits: list[asyncio.Task[None]] = []
        self._losses: deque[float] = deque()
        self._trouble: asyncio.Future[str] | None = None
        self._ready = asyncio.Event()
        self.on_state: Callable[[MeshState], None] = lambda state: None
        self.url = ""

    @property
    def scheduler_endpoint(self) -> str:
        return f"ipc://{self._run_dir}/scheduler"

    @property
    def frames_endpoint(self) -> str:
        return f"ipc://{self._run_dir}/frames"

    @property
    def pids(self) -> dict[str, int]:
        return {child.name: child.pid for child in self._children}

    async def start(self) -> None:
        """Start every process; returns before the model is loaded."""
        self._trouble = asyncio.get_running_loop().create_future()
        config_file = self._run_dir / "config.json"
        save_frozen(self.config, config_file)
        shared = ("--config", str(config_file), "--model-folder", str(self._model_folder))
        await self._spawn("scheduler", python_module("runtime", "--bind", self.scheduler_endpoint, *shared), {})
        await self._spawn("workers", self._torchrun(*shared), self._worker_environment())
        self._control = AsyncChannel.connect(self.scheduler_endpoint, FromScheduler, incarnation("supervisor"))
        await self._control.send(SupervisorHello(socket.gethostname()))
        self._listener = asyncio.create_task(self._listen(self._control))
        if self._with_gateway:
            endpoints = ("--scheduler", self.scheduler_endpoint, "--frames", self.frames_endpoint)
            gateway = await self._spawn("gateway", python_module("gateway", *endpoints, *shared), {}, announces=True)
            await self._read_url(gateway)

    async def wait_ready(self) -> None:
        """Until every rank has loaded the model.

        Raises:
            StartFailed: a process died, the model cannot be loaded, or it took longer than `start_timeout`.
        """
        assert self._trouble is not None
        ready = asyncio.create_task(self._ready.wait())
        broken = asyncio.create_task(self.watch())
        done, waiting = await asyncio.wait(
            {ready, broken}, timeout=self.config.start_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        for task in waiting:
            task.cancel()
        if broken in done:
            broken.result()
        if not done:
            raise StartFailed(f"the workers were not ready after {self.config.start_timeout} s (--start-timeout)")

    async def watch(self) -> None:
        """Until something breaks that the mesh cannot repair itself; always ends by raising.

        Raises:
            StartFailed: what broke.
        """
        assert self._trouble is not None
        raise StartFailed(await asyncio.shield(self._trouble))

    async def drain(self, timeout_s: float) -> None:
        """Let running work end and the ranks leave by themselves; does nothing before they were ready."""
        if self._control is None or not self._ready.is_set():
            return
        with contextlib.suppress(TimeoutError, PeerGone):
            await self._control.send(Drain())
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(child.wait() for child in self._children if child.name != "gateway"))

    async def stop(self) -> None:
        """End every process and remove every socket; safe to call at any time."""
        for task in [*self._exits, *([self._listener] if self._listener else [])]:
            task.cancel()
        await asyncio.gather(*(child.stop(GRACE_S.get(child.name, 0.0)) for child in self._children))
        if self._control is not None:
            self._control.close()
        self._folder.remove()

    async def _spawn(
        self, name: str, command: list[str], environment: dict[str, str], announces: bool = False
    ) -> Child:
        log_file = self._run_dir / f"{name}.log" if self._quiet else None
        child = await Child.start(name, command, environment, log_file, announces=announces)
        self._children.append(child)
        self._exits.append(asyncio.create_task(self._watch_exit(child), name=f"exit of {name}"))
        return child

    async def _watch_exit(self, child: Child) -> None:
        code = await child.wait()
        self._give_up(f"the {child.name} process ended with exit code {code}{self._last_words(child.name)}")

    async def _read_url(self, gateway: Child) -> None:
        line = await gateway.first_line()
        if not line:
            raise StartFailed(f"the gateway did not start{self._last_words('gateway')}")
        self.url = msgspec.json.decode(line)["url"]
        self._folder.tell_url(self.url)

    async def _listen(self, control: AsyncChannel[FromSupervisor, FromScheduler]) -> None:
        while True:
            message = (await control.receive()).message
            match message:
                case Welcome():
                    control.set_epoch(message.epoch)
                case MeshState():
                    self._see_state(message)
                case Fence():
                    self._fence(message)

    def _see_state(self, state: MeshState) -> None:
        self.on_state(state)
        if state.ready:
            self._ready.set()
            return
        while len(self._losses) < state.losses:
            self._losses.append(time.monotonic())
        recent = [at for at in self._losses if time.monotonic() - at < CRASH_WINDOW_S]
        # What fails before it was ever ready would fail the same way again.
        if state.losses and (not self._ready.is_set() or len(recent) >= CRASH_LOOP):
            self._give_up(state.reason.removeprefix("the workers are restarting: "))

    def _fence(self, message: Fence) -> None:
        """Kill a rank that hangs, if it is one of ours."""
        workers = next(child for child in self._children if child.name == "workers")
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if any(parent.pid == workers.pid for parent in psutil.Process(message.pid).parents()):
                log.error("fencing", rank=message.rank, pid=message.pid, reason=message.reason)
                os.kill(message.pid, signal.SIGKILL)

    def _give_up(self, reason: str) -> None:
        if self._trouble is not None and not self._trouble.done():
            self._trouble.set_result(reason)

    def _last_words(self, name: str) -> str:
        path = self._run_dir / f"{name}.log"
        if not self._quiet or not path.exists():
            return ""
        lines = path.read_text(errors="replace").splitlines()[-8:]
        return "; its last lines:\n  " + "\n  ".join(lines) if lines else ""

    def _torchrun(self, *shared: str) -> list[str]:
        elastic = ("--nnodes=1", f"--nproc-per-node={self.config.num_gpus}", "--rdzv-backend=c10d")
        # Restarts are the scheduler's recovery path; the supervisor's crash-loop rule is what ends them.
        restarts = ("--rdzv-endpoint=127.0.0.1:0", "--max-restarts=1000", "--monitor-interval=0.2")
        worker = ("-m", "workers", "--scheduler", self.scheduler_endpoint, *shared)
        return python_module("torch.distributed.run", *elastic, *restarts, *worker)

    def _worker_environment(self) -> dict[str, str]:
        threads = max((os.cpu_count() or 1) // self.config.num_gpus, 1)
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Threads that spin while they wait make two ranks on the same cores up to 100 times slower.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self._devices.kind == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._devices.visible))
        return environment
