"""The SDK's Generator: a gateway without a port, over a mesh that it starts and stops."""

from __future__ import annotations

import asyncio
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gateway.media.metadata import generation_metadata
from gateway.mesh import Event, Frames, Mesh
from launch.sizes import settle_layout
from launch.supervisor import Supervisor
from launch.weights import resolve_model
from runtime.batchrules import rules_of
from runtime.config import Config, check_config, describe_mesh
from runtime.errors import FramemeshError, InvalidInput, StartFailed
from runtime.models.card import Card, card_for, read_configs
from runtime.protocol import Completed, MeshState, Request, Usage
from runtime.sampling import ResolvedParams, SamplingParams, check_terms

T = TypeVar("T")

DRAIN_S = 3.0
"""How long the ranks may take to leave by themselves."""


@dataclass(frozen=True)
class Result:
    """One finished generation."""

    frames: NDArray[np.uint8]
    """(T, H, W, 3) RGB."""
    metadata: dict[str, Any]
    """Prompt, seed, sizes, model, and seconds per stage under "timings"."""
    usage: Usage = field(default_factory=Usage)
    """What it took of the mesh."""


class Generator:
    """A local mesh as a context manager.

    Example:
        >>> with Generator.from_pretrained("demo", num_gpus=2) as generator:
        ...     result = generator.generate("a red circle moving right", seed=1)
        ...     result.frames.shape
        (17, 64, 64, 3)
    """

    def __init__(self, config: Config, folder: Path, *, on_state: Callable[[MeshState], None] | None = None) -> None:
        """Start the mesh and wait until it is ready; `from_pretrained` is the usual way in.

        Raises:
            InvalidInput: the configuration does not fit the model or the machine; nothing was started.
            StartFailed: a process did not come up; everything was stopped again.
        """
        check_config(config)
        rules_of(config)
        if config.replicas > 1:
            raise InvalidInput("replicas", "a Generator has one mesh; replicas are for `framemesh serve`")
        self.card: Card = card_for(read_configs(folder))
        config, why = settle_layout(config, folder, self.card)
        if why:
            print("\n".join([*describe_mesh(config, self.card), *why]), file=sys.stderr, flush=True)
        self._loop = asyncio.new_event_loop()
        # The children die with the thread that started them: this one lives until close().
        self._thread = threading.Thread(target=self._loop.run_forever, name="framemesh", daemon=True)
        self._thread.start()
        self._closed = False
        self._mesh: Mesh | None = None
        self._guard: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(config, folder, quiet=True)
        self.config = self._supervisor.config
        if on_state is not None:
            self._supervisor.on_state = on_state
        try:
            self._run(self._start())
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_pretrained(cls, model: str = "demo", *, num_gpus: int = 1, **options: Any) -> Self:
        """A mesh for a diffusers folder or a hub id; `options` are the fields of `runtime.config.Config`."""
        config = Config(model_path=model, num_gpus=num_gpus, **options)
        check_config(config)
        return cls(config, resolve_model(model, config.revision))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self, params: SamplingParams) -> ResolvedParams:
        """The same with every default filled in; raises `InvalidInput`."""
        return self.card.check(params)

    def stream(
        self, params: SamplingParams, *, key: str = "", priority: int | None = None, timeout: float | None = None
    ) -> Iterator[Event]:
        """Progress and Frames as they happen, Completed last. Leaving early cancels the generation.

        Shares are fair between `key`s; within one, a higher `priority` goes first. After `timeout` seconds the
        generation is no longer wanted.

        Raises:
            InvalidInput: before anything is queued.
            RequestFailed: the mesh gave up on it.
        """
        terms = check_terms(priority, timeout, key)
        request = self._connected.request(f"local-{secrets.token_hex(8)}", self.check(params), terms)
        events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        pump = asyncio.run_coroutine_threadsafe(self._pump(request, events), self._loop)
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            pump.cancel()

    def generate(
        self, prompt: str | SamplingParams, *, on_event: Callable[[Event], None] = lambda event: None, **sampling: Any
    ) -> Result:
        """One generation from start to end; `sampling` are the fields of `SamplingParams`."""
        params = prompt if isinstance(prompt, SamplingParams) else SamplingParams(prompt=prompt)
        resolved = self.check(replace(params, **sampling))
        chosen = SamplingParams(**{name: getattr(resolved, name) for name in resolved.__struct_fields__})
        chunks: list[NDArray[np.uint8]] = []
        timings: dict[str, float] = {}
        usage = Usage()
        for event in self.stream(chosen):
            on_event(event)
            if isinstance(event, Frames):
                chunks.append(event.pixels)
                timings = event.timings
            elif isinstance(event, Completed):
                usage = event.usage
        metadata = generation_metadata(resolved, self.config.model_name, timings)
        return Result(np.concatenate(chunks), metadata, usage)

    def close(self) -> None:
        """Stop every process; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._run(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def scheduler_endpoint(self) -> str:
        """Where an observer can look at the mesh."""
        return self._supervisor.scheduler_endpoint

    @property
    def pids(self) -> dict[str, int]:
        return self._supervisor.pids

    @property
    def _connected(self) -> Mesh:
        assert self._mesh is not None
        return self._mesh

    async def _start(self) -> None:
        supervisor = self._supervisor
        await supervisor.start()
        delay_s = self.config.batching_delay_ms / 1000
        self._mesh = Mesh(supervisor.scheduler_endpoint, supervisor.frames_endpoint, batching_delay_s=delay_s)
        await self._mesh.start()
        await supervisor.wait_ready()
        await self._mesh.wait_ready(30.0)
        self._guard = asyncio.create_task(self._fail_with_supervisor(self._mesh))

    async def _fail_with_supervisor(self, mesh: Mesh) -> None:
        """What the supervisor cannot repair ends every running request instead of leaving it silent."""
        try:
            await self._supervisor.watch()
            mesh.abort("the mesh was drained")
        except StartFailed as error:
            mesh.abort(str(error))

    async def _pump(self, request: Request, events: queue.SimpleQueue[Event | Exception | None]) -> None:
        try:
            async for event in self._connected.run(request):
                events.put(event)
            events.put(None)
        except FramemeshError as error:
            events.put(error)

    async def _stop(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await self._supervisor.leave(DRAIN_S)
        if self._mesh is not None:
            await self._mesh.close()
        await self._supervisor.stop()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; who is interrupted while waiting (Ctrl-C) does not want it any more."""
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result()
        finally:
            running.cancel()
