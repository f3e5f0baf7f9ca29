"""One mesh on this host: starts scheduler and workers in order, and again when one dies or hangs; fences ranks,
drains, stops everything. Knows no gateway and no other mesh.

launcher ── scheduler           python -P -m runtime
         └─ torchrun ── rank …  python -P -m torch.distributed.run … -m workers

A scheduler that dies is started again at its endpoint; lost ranks are torchrun's to start and the scheduler's to count.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from launch.devices import Devices, pick_devices
from launch.keeper import SILENT_S, End, Keeper, until_stopped
from launch.observe import RunFolder, sweep_dead_folders
from launch.part import START_S, Part
from launch.process import Child, python_module
from runtime.config import Config, save_frozen
from runtime.errors import PeerGone, StartFailed
from runtime.log import get_logger
from runtime.protocol import Drain, Fence, FromScheduler, FromSupervisor, MeshState, SupervisorHello, Welcome
from runtime.wire import AsyncChannel, incarnation

ASK_AFTER_S = 2.0
"""A scheduler that is silent for so long is greeted again: one that was started anew does not know us."""
LEAVE_S = 5.0
"""How long the ranks may take to leave after the scheduler."""

log = get_logger("supervisor")


class Supervisor(Part):
    """Owns the mesh's processes, the folder of their sockets, and the control connection to the scheduler."""

    def __init__(self, config: Config, folder: Path, *, quiet: bool, devices: Devices | None = None) -> None:
        """`folder` is the model's. `devices` are those of this mesh's ranks; None picks them."""
        self._devices = devices or pick_devices(config.num_gpus, config.device, share=config.dist_backend == "staged")
        self.devices_reason = self._devices.reason
        sweep_dead_folders()
        run_folder = RunFolder(config.model_name, scheduler=config.bind or "")
        super().__init__(replace(config, device=self._devices.kind), run_folder, quiet=quiet)
        self._model_folder = folder
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
        self._patience: asyncio.TimerHandle | None = None
        self._draining = asyncio.Event()
        self._left = asyncio.Event()
        """The scheduler has ended because it was drained."""
        self._drain_until: float | None = None
        """We want it to drain, and have not heard that it does."""
        self.on_state: Callable[[MeshState], None] = lambda state: None

    @property
    def scheduler_endpoint(self) -> str:
        return self.config.bind or f"ipc://{self._run_dir}/scheduler"

    @property
    def frames_endpoint(self) -> str:
        """For a gateway of this very process."""
        return f"ipc://{self._run_dir}/frames"

    def tell_url(self, url: str) -> None:
        """Have it told where the mesh is served over HTTP."""
        self._folder.tell_url(url)

    async def start(self) -> None:
        """Start every process; returns before the model is loaded."""
        save_frozen(self.config, self._config_file)
        self._control = AsyncChannel.connect(self.scheduler_endpoint, FromScheduler, incarnation("supervisor"))
        self._tasks["listener"] = asyncio.create_task(self._listen(self._control))
        await super().start()

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
            self._drain_until = time.monotonic() + timeout_s
            await self._tell_to_drain(self._control)

    async def _tell_to_drain(self, control: AsyncChannel[FromSupervisor, FromScheduler]) -> None:
        """Said again with every word of a scheduler that does not drain: one that was started anew has not heard it."""
        if self._drain_until is not None:
            left_s = max(self._drain_until - time.monotonic(), 0.0)
            with contextlib.suppress(PeerGone):
                await control.send(Drain(left_s))

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
        await super().stop(at_once=at_once)
        if self._control is not None:
            self._control.close()

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
        if self.scheduler_endpoint.startswith("ipc://"):
            with contextlib.suppress(FileNotFoundError):
                # A killed scheduler leaves its socket behind.
                os.unlink(self.scheduler_endpoint.removeprefix("ipc://"))
        await self._spawn("scheduler", python_module("runtime", "--bind", self.scheduler_endpoint, *self._shared), {})
        await self._greet()

    async def _start_workers(self) -> None:
        await self._spawn("workers", self._torchrun(), self._worker_environment())

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
                    await self._tell_to_drain(control)
                case MeshState() as state:
                    self._see_state(state)
                case Fence() as fence:
                    self._fence(fence)

    def _see_state(self, state: MeshState) -> None:
        self.on_state(state)
        if state.draining:
            self._draining.set()
            self._drain_until = None
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
        threads = max((os.cpu_count() or 1) // (self.config.num_gpus * self.config.replicas), 1)
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Threads that spin while they wait make two ranks on the same cores up to 100 times slower.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self._devices.kind == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._devices.visible))
        return environment
