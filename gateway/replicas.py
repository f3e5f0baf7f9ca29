"""Several meshes of one model as if they were one: where a request runs, and where it goes on if that mesh is lost.

Routing is by predicted remaining work: what each scheduler says it has to do, plus what was sent to it since. Knows
sockets and schedulers through `Mesh` alone.

A mesh that gave up or has not been heard for too long loses its requests to another one that can take them: under the
same id, the next attempt, from the first step on. Whoever consumes a request sees each of its frames once. The old
mesh is told to drop it, late if it has to be, and gets it back only once it has said that it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec

from gateway.mesh import DEFAULT_TERMS, DRAINING, MESH_LOST, NO_NEW_WORK, Event, Frames, Mesh, Moved
from runtime.errors import NotReady, RequestFailed
from runtime.log import get_logger
from runtime.models.card import Card
from runtime.protocol import Completed, MeshState, ModelInfo, Request
from runtime.sampling import ResolvedParams, Terms

BEAT_S = 1.0
"""A scheduler speaks at least so often."""
SILENT_S = 3.0
"""A mesh that was not heard for so long gets nothing new."""
LOST_S = 6.0
"""After so long its requests go elsewhere. A launcher that is there has started its scheduler again by then, which
goes on from the checkpoints."""
LEARNING = 0.2
"""Weight of the latest request in the seconds that an operation takes."""

log = get_logger("replicas")


@dataclass(eq=False)
class _Replica:
    """A mesh, and what this gateway does with it."""

    mesh: Mesh
    quiet_s: float = math.inf
    """Since it was heard, in our own ticks: a gateway that was itself suspended blames nobody."""
    heard: int = 0
    state: MeshState | None = None
    """The latest that was seen."""
    stranger: bool = False
    """Its model is not that of the others."""
    running: set[str] = field(default_factory=set)
    """Requests of this gateway."""
    sent_s: dict[str, float] = field(default_factory=dict)
    """Predicted seconds of those that its scheduler has not counted in its backlog yet."""

    @property
    def reason(self) -> str:
        """Why it takes no new work; empty if it does."""
        if self.stranger:
            return "it runs another model"
        if self.mesh.lost is not None:
            return self.mesh.lost
        if self.mesh.state.draining:
            return "draining"
        if not self.mesh.state.ready:
            return self.mesh.state.reason
        if self.quiet_s >= SILENT_S:
            return f"its scheduler has been silent for {self.quiet_s:.0f} s"
        return ""

    @property
    def closed(self) -> bool:
        """Whether it will not take new work again."""
        return self.stranger or self.mesh.lost is not None or self.mesh.state.draining

    @property
    def load(self) -> tuple[float, int]:
        """Predicted seconds of work, then how many requests."""
        return self.mesh.state.backlog_s + sum(self.sent_s.values()), len(self.running)

    def tick(self, seconds: float) -> None:
        """So many seconds have passed."""
        self.quiet_s = self.quiet_s + seconds if self.mesh.num_heard == self.heard else 0.0
        self.heard = self.mesh.num_heard

    def leave(self, request_id: str) -> None:
        self.running.discard(request_id)
        self.sent_s.pop(request_id, None)


class Replicas:
    """The way into one or more meshes of one model; has what `Mesh` has."""

    def __init__(self, meshes: Sequence[Mesh]) -> None:
        """At least one mesh; they are started and closed with this."""
        self._replicas = [_Replica(mesh) for mesh in meshes]
        self._changed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._pace = 0.0
        """Seconds that one floating-point operation of a denoising step takes, as measured lately."""
        for replica in self._replicas:
            replica.mesh.on_state = functools.partial(self._see_state, replica)

    @property
    def meshes(self) -> tuple[Mesh, ...]:
        return tuple(replica.mesh for replica in self._replicas)

    @property
    def model(self) -> ModelInfo | None:
        """As the first mesh that has loaded it describes it."""
        return next((mesh.model for mesh in self.meshes if mesh.model is not None), None)

    @property
    def card(self) -> Card | None:
        return next((mesh.card for mesh in self.meshes if mesh.card is not None), None)

    @property
    def state(self) -> MeshState:
        """All of them in one: ready if one is, its backlog that of the least busy one that is."""
        states = [self.state_of(mesh) for mesh in self.meshes]
        if len(states) == 1:
            return states[0]
        ready = [state for state in states if state.ready]
        return MeshState(
            bool(ready),
            self._reason(),
            sum(state.ranks_ready for state in states),
            sum(state.num_ranks for state in states),
            self.model,
            sum(state.losses for state in states),
            all(state.draining for state in states),
            all(state.gave_up for state in states),
            min((state.backlog_s for state in ready), default=0.0),
        )

    def state_of(self, mesh: Mesh) -> MeshState:
        """What a mesh said last, unless it has been silent since."""
        replica = next(replica for replica in self._replicas if replica.mesh is mesh)
        if not mesh.state.ready or not replica.reason:
            return mesh.state
        return msgspec.structs.replace(mesh.state, ready=False, reason=replica.reason)

    async def start(self) -> None:
        """Greet every mesh; waits for none."""
        for mesh in self.meshes:
            await mesh.start()
        self._watcher = asyncio.create_task(self._watch(), name="watch over replicas")

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.gather(*(mesh.close() for mesh in self.meshes))

    async def wait_model(self) -> None:
        """Until `request()` can tokenize, however long that takes."""
        waiting = [asyncio.create_task(mesh.wait_model()) for mesh in self.meshes]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def request(
        self,
        request_id: str,
        params: ResolvedParams,
        terms: Terms = DEFAULT_TERMS,
        *,
        resumed: bool = False,
        previews: int = 0,
    ) -> Request:
        """As `Mesh.request`: any mesh of the model tokenizes as every other."""
        if not resumed:
            self._check_open()
        return self._spokesman.request(request_id, params, terms, resumed=True, previews=previews)

    def warnings(self, params: ResolvedParams) -> tuple[str, ...]:
        """As `Mesh.warnings`."""
        return self._spokesman.warnings(params)

    async def cancel(self, request_id: str, reason: str) -> None:
        for mesh in self.meshes:
            await mesh.cancel(request_id, reason)

    async def forget(self, request_id: str) -> None:
        """As `Mesh.forget`: whichever had it."""
        for mesh in self.meshes:
            await mesh.forget(request_id)

    def abort(self, reason: str) -> None:
        """Every mesh is lost for good."""
        for mesh in self.meshes:
            mesh.abort(reason)

    async def run(self, request: Request, *, resumed: bool = False) -> AsyncGenerator[Event, None]:
        """As `Mesh.run`, on one mesh after the other if need be. Progress may fall back; frames come once, in order.

        Raises:
            NotReady: every mesh drains, and the request is not `resumed`.
            RequestFailed: a mesh gave up on it, the last one gave up altogether, or somebody cancelled it.
        """
        told = _Told()
        replica = await self._owner(request.id) if resumed else None
        while True:
            if replica is None:
                replica = await self._place(request.id)
            self._enter(replica, request)
            try:
                async with contextlib.aclosing(replica.mesh.run(request, resumed=resumed)) as events:
                    async for event in events:
                        if told.news(event):
                            yield event
                            told.consumed(event)
                if told.last is not None:
                    self._learn(request.params, told.last.timings)
                return
            except (NotReady, RequestFailed, Moved) as error:
                if not (told.last is not None and _is_lost(error)) and not self._goes_on(replica, error):
                    raise
                attempt = error.attempt if isinstance(error, Moved) else request.attempt
                log.warning("a request goes on elsewhere", request=request.id, left=replica.mesh.scheduler)
            finally:
                replica.leave(request.id)
            await replica.mesh.drop(request.id)
            if told.last is not None:
                # Every frame is stored: that is all that completed means, whoever says so.
                yield Completed(request.id, told.last.timings)
                return
            request = msgspec.structs.replace(request, attempt=attempt + 1)
            replica = None

    # ---- where ---------------------------------------------------------------------------------------------------

    async def _place(self, request_id: str) -> _Replica:
        """The one with the least work; waits for one if none can take any now.

        Raises:
            NotReady, RequestFailed: none ever will.
        """
        if len(self._replicas) == 1:
            # Its scheduler keeps the line, and says why it takes nothing.
            return self._replicas[0]
        while not (fit := self._fit(request_id)):
            self._check_left(request_id)
            await self._change()
        return min(fit, key=lambda replica: replica.load)

    def _fit(self, request_id: str) -> list[_Replica]:
        """Those that can take it now."""
        return [replica for replica in self._replicas if not (replica.reason or replica.mesh.remembers(request_id))]

    async def _change(self) -> None:
        """Until a mesh has news, or the clock."""
        self._changed.clear()
        await self._changed.wait()

    async def _owner(self, request_id: str) -> _Replica | None:
        """Who has it already, from a gateway before this one."""
        if len(self._replicas) == 1:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SILENT_S):
                while not all(mesh.num_heard for mesh in self.meshes):
                    await self._change()
        for replica in self._replicas:
            replica.tick(0.0)
        heard = [replica for replica in self._replicas if replica.quiet_s < SILENT_S]
        known = await asyncio.gather(*(replica.mesh.has(request_id) for replica in heard))
        return next((replica for replica, has in zip(heard, known, strict=True) if has), None)

    def _enter(self, replica: _Replica, request: Request) -> None:
        replica.running.add(request.id)
        replica.sent_s[request.id] = self._pace * self._operations(request.params)

    def _operations(self, params: ResolvedParams) -> float:
        return self.card.step_flops(params) * params.num_inference_steps if self.card is not None else 0.0

    def _learn(self, params: ResolvedParams, timings: dict[str, float]) -> None:
        pace = sum(timings.values()) / max(self._operations(params), 1.0)
        self._pace = pace if not self._pace else self._pace + LEARNING * (pace - self._pace)

    # ---- what becomes of them ------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            for replica in self._replicas:
                replica.tick(BEAT_S)
            for replica in self._replicas:
                if replica.quiet_s >= LOST_S:
                    self._empty(replica)
            self._changed.set()

    def _empty(self, replica: _Replica) -> None:
        """Take away what another one can do now."""
        for request_id in replica.running:
            if any(other is not replica for other in self._fit(request_id)):
                replica.mesh.take_away(request_id)

    def _see_state(self, replica: _Replica) -> None:
        replica.tick(0.0)
        if replica.state is not replica.mesh.state:
            replica.state = replica.mesh.state
            replica.sent_s.clear()
        self._find_strangers()
        self._changed.set()

    def _find_strangers(self) -> None:
        """The first mesh of those that have loaded it says which model it is."""
        ours = self.model
        for replica in self._replicas:
            theirs = replica.mesh.model
            stranger = ours is not None and theirs is not None and ours.configs != theirs.configs
            if stranger and not replica.stranger:
                log.error("a mesh gets no work: it runs another model", mesh=replica.mesh.scheduler)
            replica.stranger = stranger

    def _goes_on(self, left: _Replica, error: NotReady | RequestFailed | Moved) -> bool:
        """Whether a request that a mesh sent away may find another one."""
        if isinstance(error, RequestFailed) and error.code not in {MESH_LOST, DRAINING}:
            return False
        return isinstance(error, Moved) or any(not other.closed for other in self._replicas if other is not left)

    def _check_left(self, request_id: str) -> None:
        if all(replica.closed for replica in self._replicas):
            self._check_open()
            raise RequestFailed(request_id, MESH_LOST, self._reason())

    def _check_open(self) -> None:
        """Raises NotReady if nothing is left but meshes that drain."""
        if all(replica.closed for replica in self._replicas) and any(mesh.state.draining for mesh in self.meshes):
            raise NotReady(NO_NEW_WORK, draining=True)

    def _reason(self) -> str:
        """ "ready", or who is not and why."""
        told = [f"replica {number}: {r.reason}" for number, r in enumerate(self._replicas) if r.reason]
        return "; ".join(told) or "ready"

    @property
    def _spokesman(self) -> Mesh:
        """One that knows the model, if there is one."""
        return next((mesh for mesh in self.meshes if mesh.loaded), self.meshes[0])


def _is_lost(error: Exception) -> bool:
    """Whether it says nothing of the request itself."""
    return isinstance(error, Moved) or (isinstance(error, RequestFailed) and error.code == MESH_LOST)


@dataclass
class _Told:
    """What the consumer of a request has had, whoever sent it."""

    next_frame: int = 0
    last: Frames | None = None
    """The last frames, once the consumer has come back for more."""

    def news(self, event: Event) -> bool:
        """Whether it has not seen this. Chunks have the same boundaries everywhere."""
        return not isinstance(event, Frames) or event.first == self.next_frame

    def consumed(self, event: Event) -> None:
        if isinstance(event, Frames):
            self.next_frame = event.first + event.count
            self.last = event if event.last else None
