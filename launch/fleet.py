"""What one launcher keeps up: meshes of one model on this host, a gateway, or both. Knows no process.

A mesh that breaks in a way that it cannot repair is given up while others are left; the last one, or the gateway,
takes everything with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.devices import Devices, pick_devices
from launch.edge import Edge
from launch.observe import work_left
from launch.supervisor import Supervisor
from runtime.config import Config
from runtime.errors import StartFailed
from runtime.log import get_logger
from runtime.places import Place
from runtime.protocol import MeshState

log = get_logger("supervisor")


class Fleet:
    """Owns the parts' order: who starts first, whose end is everybody's."""

    def __init__(self, meshes: Sequence[Supervisor], edge: Edge | None = None) -> None:
        self._meshes = list(meshes)
        """Those that are not given up and have not left."""
        self._edge = edge
        self._minders: list[asyncio.Task[None]] = []
        self._trouble: asyncio.Future[str] | None = None
        self._left = asyncio.Event()
        """Every mesh was drained."""
        self._ready = False

    @classmethod
    def local(cls, config: Config, folder: Path, *, quiet: bool) -> Fleet:
        """`config.replicas` meshes of the model in a folder, and a gateway over them.

        Raises:
            InvalidInput: CUDA was asked for and there are too few GPUs.
        """
        ranks, replicas = config.num_gpus, config.replicas
        devices = pick_devices(ranks * replicas, config.device, share=config.dist_backend == "staged")
        meshes = [
            Supervisor(replica_config(config, number), folder, quiet=quiet, devices=share)
            for number, share in enumerate(split(devices, ranks, replicas))
        ]
        place = Place(config.model_name, tuple(mesh.scheduler_endpoint for mesh in meshes))
        return cls(meshes, Edge(config, [place], model_folder=folder, quiet=quiet))

    @property
    def url(self) -> str:
        return self._edge.url if self._edge is not None else ""

    @property
    def devices_reason(self) -> str:
        return self._meshes[0].devices_reason if self._meshes else ""

    def tell_states(self, tell: Callable[[MeshState], None]) -> None:
        """Have somebody told what the schedulers say."""
        for mesh in self._meshes:
            mesh.on_state = tell

    async def start(self) -> None:
        """Start every process; returns before the model is loaded.

        Raises:
            StartFailed: the gateway did not come up.
        """
        self._trouble = asyncio.get_running_loop().create_future()
        for mesh in self._meshes:
            await mesh.start()
        if self._edge is not None:
            await self._edge.start()
        for mesh in self._meshes:
            mesh.tell_url(self.url)

    async def wait_ready(self) -> None:
        """Until every mesh is ready.

        Raises:
            StartFailed: one did not come up, or the gateway broke.
        """
        if self._edge is not None:
            self._minders.append(asyncio.create_task(self._mind_edge(self._edge)))
        await self._unless_broken(_all([mesh.wait_ready() for mesh in self._meshes]))
        self._minders += [asyncio.create_task(self._mind(mesh)) for mesh in tuple(self._meshes)]
        self._ready = True

    async def wait_draining(self) -> None:
        """Until somebody has drained every mesh that is left; without meshes for ever.

        Raises:
            StartFailed: what broke.
        """
        drained = [_without_error(mesh.wait_draining()) for mesh in self._meshes]
        await self._unless_broken(_all(drained) if drained else asyncio.Event().wait())

    async def drain(self, timeout_s: float) -> None:
        """As `Supervisor.drain`, every mesh."""
        await asyncio.gather(*(mesh.drain(timeout_s) for mesh in self._meshes))

    async def watch(self) -> None:
        """Until every mesh was drained.

        Raises:
            StartFailed: what broke.
        """
        if self._meshes:
            await self._unless_broken(self._left.wait())

    async def leave(self, patience_s: float) -> None:
        """Have the ranks of idle meshes leave by themselves, which is quieter than being killed."""
        if self._ready:
            await self.drain(0.0)
            with contextlib.suppress(TimeoutError, StartFailed):
                async with asyncio.timeout(patience_s):
                    await self.watch()

    def work_left(self) -> str:
        """What the schedulers still have, in words."""
        return work_left([mesh.scheduler_endpoint for mesh in self._meshes])

    async def stop(self, *, at_once: bool = False) -> None:
        """End every process and remove every socket; safe to call at any time."""
        for task in self._minders:
            task.cancel()
        await asyncio.gather(*self._minders, return_exceptions=True)
        parts = [*self._meshes, self._edge] if self._edge is not None else self._meshes
        await asyncio.gather(*(part.stop(at_once=at_once) for part in parts))

    async def _mind(self, mesh: Supervisor) -> None:
        try:
            await mesh.watch()
        except StartFailed as error:
            if len(self._meshes) == 1:
                self._give_up(str(error))
                return
            log.error("a replica is given up", left=len(self._meshes) - 1, reason=str(error))
        self._meshes.remove(mesh)
        await mesh.stop()
        if not self._meshes:
            self._left.set()

    async def _mind_edge(self, edge: Edge) -> None:
        try:
            await edge.broken()
        except StartFailed as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        if self._trouble is not None and not self._trouble.done():
            self._trouble.set_result(reason)

    async def _unless_broken(self, work: Awaitable[object]) -> None:
        """Wait for it; raises StartFailed for what breaks first."""
        assert self._trouble is not None
        task = asyncio.ensure_future(work)
        waited: list[asyncio.Future[Any]] = [self._trouble, task]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._trouble.done():
                raise StartFailed(self._trouble.result())
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def replica_config(config: Config, number: int) -> Config:
    """Of one of several meshes: a spool of its own, or it would take the others' checkpoints for left over."""
    if config.replicas == 1:
        return config
    return replace(config, spool_dir=str(config.spool / f"replica{number}"))


def split(devices: Devices, ranks: int, replicas: int) -> list[Devices]:
    """The devices of each mesh, the first ones for the first; all of them share what is too little."""
    if len(devices.visible) < ranks * replicas:
        return [devices] * replicas
    parts = [devices.visible[number * ranks : (number + 1) * ranks] for number in range(replicas)]
    return [replace(devices, visible=part) for part in parts]


async def _all(work: Sequence[Awaitable[None]]) -> None:
    """Until all of it is done or something failed; nothing goes on then."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _without_error(work: Awaitable[None]) -> None:
    """What is given up is waited for by nobody."""
    with contextlib.suppress(StartFailed):
        await work
