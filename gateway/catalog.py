"""The models that this gateway serves, by the names that clients know them under."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.replicas import Replicas
from runtime.errors import InvalidInput, NotReady
from runtime.models.card import Card
from runtime.protocol import MeshState


@dataclass(frozen=True)
class Model:
    """One model, and the meshes behind it."""

    name: str
    known: Card | None
    """Its card, if there is a folder to read it from; else a mesh tells."""
    mesh: Replicas
    aliases: tuple[str, ...] = ()
    """Further names that clients may use."""

    @property
    def card(self) -> Card:
        """Raises NotReady while no mesh has told yet."""
        card = self.known or self.mesh.card
        if card is None:
            raise NotReady(f"{self.name}: {self.mesh.state.reason}")
        return card


class Catalog:
    """At least one model; the first is the one that a request without a name means."""

    def __init__(self, models: Sequence[Model], *, allow_any: bool = False) -> None:
        """`allow_any` takes every other name for the first model's."""
        self._models = {model.name: model for model in models}
        self._names = {alias: model for model in models for alias in model.aliases} | self._models
        self._allow_any = allow_any

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def default(self) -> Model:
        return next(iter(self))

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a request may hold, aliases too."""
        return tuple(self._names)

    @property
    def state(self) -> MeshState:
        """Of all models in one: ready if one is; the reason names those that are not."""
        states = {model.name: model.mesh.state for model in self}
        if len(states) == 1:
            return self.default.mesh.state
        told = "; ".join(f"{name}: {state.reason}" for name, state in states.items() if state.reason != "ready")
        return MeshState(
            any(state.ready for state in states.values()),
            told or "ready",
            sum(state.ranks_ready for state in states.values()),
            sum(state.num_ranks for state in states.values()),
            draining=all(state.draining for state in states.values()),
        )

    def get(self, name: str) -> Model | None:
        return self._names.get(name)

    def find(self, name: str | None) -> Model:
        """The model of that name.

        Raises:
            InvalidInput: there is none.
        """
        found = self.default if name is None else self.get(name)
        if found is None and self._allow_any:
            return self.default
        if found is None:
            message = f"{name!r} does not exist here; this server has {', '.join(map(repr, self._names))}"
            raise InvalidInput("model", message, code="model_not_found")
        return found

    async def start(self) -> None:
        """Greet every mesh; waits for none."""
        for model in self:
            await model.mesh.start()

    async def close(self) -> None:
        await asyncio.gather(*(model.mesh.close() for model in self))
