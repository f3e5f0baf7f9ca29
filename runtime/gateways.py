"""Which gateways there are, and how many chunks of frames each may still be sent. Knows no requests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class _Gateway:
    endpoint: str
    credits: int
    limit: int
    """Its credits when nothing is under way to it."""


@dataclass
class Gateways:
    """Credits are spent when a decode is planned and come back when the gateway has consumed a chunk."""

    _known: dict[bytes, _Gateway] = field(default_factory=dict)

    def __contains__(self, gateway: object) -> bool:
        return gateway in self._known

    def join(self, gateway: bytes, endpoint: str, credits: int) -> None:
        """One that says hello again keeps the credits that it has."""
        self._known.setdefault(gateway, _Gateway(endpoint, credits, credits))

    def lose(self, gateway: bytes) -> bool:
        """False if it was not known."""
        return self._known.pop(gateway, None) is not None

    def endpoint(self, gateway: bytes) -> str:
        return self._known[gateway].endpoint

    def credits(self, gateway: bytes) -> int:
        """Chunks that it may be sent now; none if it is gone."""
        return self._known[gateway].credits if gateway in self._known else 0

    def spend(self, gateway: bytes, credits: int) -> None:
        self._known[gateway].credits -= credits

    def give_back(self, gateway: bytes, credits: int) -> None:
        """Chunks that were consumed or that will never come. Some may be given back twice, so it ends at the limit."""
        if gateway in self._known:
            known = self._known[gateway]
            known.credits = min(known.credits + credits, known.limit)

    def refill(self) -> None:
        """What was under way has arrived, or died with its rank."""
        for known in self._known.values():
            known.credits = known.limit
