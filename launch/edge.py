"""The gateway process over meshes here or elsewhere: started, and again at its port when it dies or is deaf.

launcher ── gateway             python -P -m gateway
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from launch.keeper import Keeper, until_deaf
from launch.observe import GATEWAY, RunFolder, sweep_dead_folders
from launch.part import START_S, Part
from launch.process import Child, python_module
from runtime.config import Config, save_frozen
from runtime.errors import StartFailed
from runtime.places import Place, is_remote


class Edge(Part):
    """Owns the gateway's process, and the folder of the sockets that it takes frames on."""

    def __init__(self, config: Config, places: Sequence[Place], *, model_folder: Path | None, quiet: bool) -> None:
        """`model_folder` is that of the configured model, if it is among the places."""
        sweep_dead_folders()
        super().__init__(config, RunFolder(", ".join(place.name for place in places), role=GATEWAY), quiet=quiet)
        self._places = places
        self._model_folder = model_folder
        self._keepers = {"gateway": Keeper("gateway", self._start_gateway, self._until_deaf)}
        self.url = ""

    async def start(self) -> None:
        """Returns when it listens.

        Raises:
            StartFailed: it did not come up.
        """
        save_frozen(self.config, self._config_file)
        await super().start()
        self._ready.set()

    async def _start_gateway(self) -> None:
        """Raises StartFailed if it does not say where it listens."""
        child = await self._spawn("gateway", python_module("gateway", *self._arguments()), {}, True)
        line = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                line = await child.first_line()
        if not line:
            raise StartFailed(f"the gateway did not start{self._last_words('gateway')}")
        self.url = msgspec.json.decode(line)["url"]
        # The next one has to listen where this one did, whatever port was asked for.
        save_frozen(replace(self.config, port=urlsplit(self.url).port or 0), self._config_file)
        self._folder.tell_url(self.url)

    async def _until_deaf(self, _child: Child) -> str:
        return await until_deaf(self.url)

    def _arguments(self) -> Iterator[str]:
        yield from ("--config", str(self._config_file))
        if self._model_folder is not None:
            yield from ("--model-folder", str(self._model_folder))
        for place in self._places:
            yield from ("--scheduler", f"{place.name}={','.join(place.schedulers)}")
        schedulers = [scheduler for place in self._places for scheduler in place.schedulers]
        for endpoint in frames_endpoints(schedulers, self._run_dir, self.config.frames_bind):
            yield from ("--frames", endpoint)


def frames_endpoints(schedulers: Sequence[str], folder: Path, bind: str | None) -> Iterator[str]:
    """Where a gateway takes each mesh's frames: on a socket in its folder from this host, else on the ports from that
    of `bind` on, or on free ones if that is 0."""
    far = 0
    for number, scheduler in enumerate(schedulers):
        if bind is None or not is_remote(scheduler):
            yield f"ipc://{folder}/frames{number}"
            continue
        place, _, port = bind.rpartition(":")
        yield f"{place}:{int(port) + far if int(port) else 0}"
        far += 1
