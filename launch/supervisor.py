"""One mesh on this host: starts scheduler, workers and gateway in order, and again when one dies or hangs; fences
ranks, drains, stops everything.

launcher ── scheduler           python -P -m runtime
         ├─ torchrun ── rank …  python -P -m torch.distributed.run … -m workers
         └─ gateway             python -P -m gateway        (only with `with_gateway`)

Whatever fails before the mesh was ever ready would fail the same way again and ends it. Later a process that dies is
started again at its endpoints, up to `crash_limit` times in five minutes; lost ranks are torchrun's to start and the
scheduler's to count.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil

from launch.devices import pick_devices
from launch.keeper import SILENT_S, End, Keeper, until_deaf, until_stopped
from launch.observe import CONFIG_FILE, RunFolder, sweep_dead_folders
from launch.process import Child, python_module
from runtime.config import Config, save_frozen
from runtime.errors import PeerGone, StartFailed
from runtime.log import get_logger
from runtime.protocol import Drain, Fence, FromScheduler, FromSupervisor, MeshState, SupervisorHello, Welcome
from runtime.wire import AsyncChannel, incarnation

GRACE_S = {"gateway": 5.0, "scheduler": 1.0}
"""Between SIGTERM and SIGKILL. torchrun gets none: its ranks die with it, and it would print a traceback."""
AT_ONCE_S = 1.0
"""The most of it for somebody who will not wait."""
START_S = 60.0
"""How long a scheduler or a gateway may take to say its first word."""
ASK_AFTER_S = 2.0
"""A scheduler that is silent for so long is greeted again: one that was started anew does not know us."""
LEAVE_S = 5.0
"""How long the ranks may take to leave after the scheduler."""

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
        self._config_file = self._run_dir / CONFIG_FILE
        self._control: AsyncChannel[FromSupervisor, FromScheduler] | None = None
        self._epoch: int | None = None
        self._dead_epoch: int | None = None
        """Of a scheduler that was killed, some of whose messages may still be under way."""
        self._heard = False
        """Since the last look."""
        self._keepers = {
            "scheduler": Keeper("scheduler", self._start_scheduler, self._until_scheduler_silent),
            "workers": Keeper("workers", self._start_workers, until_stopped),
        }
        if with_gateway:
            self._keepers["gateway"] = Keeper("gateway", self._start_gateway, self._until_gateway_deaf)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._trouble: asyncio.Future[str] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._ready = asyncio.Event()
        self._draining = asyncio.Event()
        self._left = asyncio.Event()
        """The scheduler has ended because it was drained."""
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
        return {name: keeper.child.pid for name, keeper in self._keepers.items() if keeper.child is not None}

    async def start(self) -> None:
        """Start every process; returns before the model is loaded.

        Raises:
            StartFailed: the gateway did not come up.
        """
        self._trouble = asyncio.get_running_loop().create_future()
        save_frozen(self.config, self._config_file)
        self._control = AsyncChannel.connect(self.scheduler_endpoint, FromScheduler, incarnation("supervisor"))
        self._tasks["listener"] = asyncio.create_task(self._listen(self._control))
        for name, keeper in self._keepers.items():
            await keeper.start()
            self._tasks[name] = asyncio.create_task(self._keep(keeper), name=f"keeper of {name}")

    async def wait_ready(self) -> None:
        """Until every rank has loaded the model.

        Raises:
            StartFailed: a process died, the model cannot be loaded, it took longer than `start_timeout`, or somebody
                had the mesh drained already.
        """
        try:
            async with asyncio.timeout(self.config.start_timeout):
                await self._until(self._ready, self._draining)
        except TimeoutError as error:
            reason = f"the workers were not ready after {self.config.start_timeout} s (--start-timeout)"
            raise StartFailed(reason) from error
        if not self._ready.is_set():
            raise StartFailed("the mesh was drained before it was ready")

    async def wait_draining(self) -> None:
        """Until somebody has the mesh drained.

        Raises:
            StartFailed: it broke.
        """
        await self._until(self._draining)

    async def watch(self) -> None:
        """Until the mesh was drained, or something breaks that it cannot repair itself.

        Raises:
            StartFailed: what broke.
        """
        await self._until(self._left)
        await asyncio.wait({self._tasks["workers"]}, timeout=LEAVE_S)

    async def drain(self, timeout_s: float) -> None:
        """Take no new work, and end when what runs has ended or was checkpointed after `timeout_s`; `watch` waits for
        it. Does nothing before the mesh was ready."""
        if self._control is not None and self._ready.is_set():
            self._draining.set()
            with contextlib.suppress(PeerGone):
                await self._control.send(Drain(timeout_s))

    async def leave(self, patience_s: float) -> None:
        """Have the ranks of an idle mesh leave by themselves, which is quieter than being killed."""
        if self._ready.is_set():
            await self.drain(0.0)
            with contextlib.suppress(TimeoutError, StartFailed):
                async with asyncio.timeout(patience_s):
                    await self.watch()

    async def stop(self, *, at_once: bool = False) -> None:
        """End every process and remove every socket; safe to call at any time."""
        self._expect_back(None)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        most_s = AT_ONCE_S if at_once else max(GRACE_S.values())
        children = [keeper.child for keeper in self._keepers.values() if keeper.child is not None]
        await asyncio.gather(*(child.stop(min(GRACE_S.get(child.name, 0.0), most_s)) for child in children))
        if self._control is not None:
            self._control.close()
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
        if not self._draining.is_set():
            return False
        if keeper.name == "scheduler":
            if end.code != 0:
                log.error("the scheduler broke off the drain; what it still had is not done", reason=end.words)
            self._left.set()
        return end.code == 0 or self._left.is_set()

    async def _start_scheduler(self) -> None:
        self._dead_epoch, self._heard = self._epoch, False
        with contextlib.suppress(FileNotFoundError):
            # A killed scheduler leaves its socket behind.
            os.unlink(self.scheduler_endpoint.removeprefix("ipc://"))
        await self._spawn("scheduler", python_module("runtime", "--bind", self.scheduler_endpoint, *self._shared), {})
        await self._greet()

    async def _start_workers(self) -> None:
        await self._spawn("workers", self._torchrun(), self._worker_environment())

    async def _start_gateway(self) -> None:
        """Raises StartFailed if it does not say where it listens."""
        endpoints = ("--scheduler", self.scheduler_endpoint, "--frames", self.frames_endpoint)
        child = await self._spawn("gateway", python_module("gateway", *endpoints, *self._shared), {}, True)
        line = ""
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(child.first_line(), START_S)
        if not line:
            raise StartFailed(f"the gateway did not start{self._last_words('gateway')}")
        self.url = msgspec.json.decode(line)["url"]
        # The next one has to listen where this one did, whatever port was asked for.
        save_frozen(replace(self.config, port=urlsplit(self.url).port or 0), self._config_file)
        self._folder.tell_url(self.url)

    async def _spawn(
        self, name: str, command: list[str], environment: dict[str, str], announces: bool = False
    ) -> Child:
        child = await Child.start(name, command, environment, self._log_file(name), announces=announces)
        self._keepers[name].child = child
        return child

    async def _until_scheduler_silent(self, _child: Child) -> str:
        """Until it has not spoken for too long; it speaks once a second, or when it is greeted."""
        quiet_s, limit_s = 0.0, START_S
        # Counted in our own ticks: a launcher that was itself suspended blames nobody.
        while quiet_s < limit_s:
            await asyncio.sleep(1.0)
            quiet_s += 1.0
            if self._heard:
                quiet_s, limit_s, self._heard = 0.0, SILENT_S, False
            elif quiet_s >= ASK_AFTER_S:
                await self._greet()
        return f"was silent for {quiet_s:.0f} s"

    async def _until_gateway_deaf(self, _child: Child) -> str:
        return await until_deaf(self.url)

    async def _greet(self) -> None:
        assert self._control is not None
        with contextlib.suppress(PeerGone):
            await self._control.send(SupervisorHello(socket.gethostname()))

    async def _listen(self, control: AsyncChannel[FromSupervisor, FromScheduler]) -> None:
        while True:
            received = await control.receive()
            if received.epoch == self._dead_epoch:
                continue
            self._heard = True
            match received.message:
                case Welcome(epoch=epoch):
                    self._epoch = epoch
                    control.set_epoch(epoch)
                case MeshState() as state:
                    self._see_state(state)
                case Fence() as fence:
                    self._fence(fence)

    def _see_state(self, state: MeshState) -> None:
        self.on_state(state)
        if state.draining:
            self._draining.set()
        if state.ready:
            self._ready.set()
            self._expect_back(None)
            return
        reason = state.reason.removeprefix("the workers are restarting: ")
        if not self._ready.is_set() and state.losses:
            # What fails before it was ever ready would fail the same way again.
            self._give_up(reason)
        elif state.gave_up:
            self._give_up(f"the workers were lost too often (--crash-limit): {reason}")
        elif not state.draining:
            self._expect_back(f"the workers did not come back within {self.config.start_timeout} s: {reason}")

    def _expect_back(self, otherwise: str | None) -> None:
        """Give the ranks as long as at the start; what dies before its first word is a loss that nobody counts."""
        if otherwise is None and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        elif otherwise is not None and self._patience is None:
            later = asyncio.get_running_loop().call_later
            self._patience = later(self.config.start_timeout, self._give_up, otherwise)

    def _fence(self, message: Fence) -> None:
        """Kill a rank that hangs, if it is one of ours."""
        workers = self._keepers["workers"].child
        if workers is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if any(parent.pid == workers.pid for parent in psutil.Process(message.pid).parents()):
                log.error("fencing", rank=message.rank, pid=message.pid, reason=message.reason)
                os.kill(message.pid, signal.SIGKILL)

    def _give_up(self, reason: str) -> None:
        if self._trouble is not None and not self._trouble.done():
            self._trouble.set_result(reason)

    def _last_words(self, name: str) -> str:
        path = self._log_file(name)
        if path is None or not path.exists():
            return ""
        lines = path.read_text(errors="replace").splitlines()[-8:]
        return "; its last lines:\n  " + "\n  ".join(lines) if lines else ""

    def _log_file(self, name: str) -> Path | None:
        return self._run_dir / f"{name}.log" if self._quiet else None

    @property
    def _shared(self) -> tuple[str, ...]:
        return "--config", str(self._config_file), "--model-folder", str(self._model_folder)

    def _torchrun(self) -> list[str]:
        elastic = ("--nnodes=1", f"--nproc-per-node={self.config.num_gpus}", "--rdzv-backend=c10d")
        # It makes a folder for logs even if it writes none; in ours it goes with us.
        logs = (f"--log-dir={self._run_dir / 'torchrun'}",)
        # Restarts are the scheduler's recovery path; its crash-loop rule is what ends them.
        restarts = ("--rdzv-endpoint=127.0.0.1:0", "--max-restarts=1000", "--monitor-interval=0.2")
        worker = ("-m", "workers", "--scheduler", self.scheduler_endpoint, *self._shared)
        return python_module("torch.distributed.run", *elastic, *logs, *restarts, *worker)

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
