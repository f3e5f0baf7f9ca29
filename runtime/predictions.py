"""How long items and requests take on this replica, by the cost model. Knows no queue and no policy."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from runtime.cost import CostModel
from runtime.layout import Layout, layout_for
from runtime.models.card import Card
from runtime.protocol import Decode, Denoise, Encode, Request
from runtime.request import RequestRecord, Stage
from runtime.sampling import ResolvedParams


@dataclass(frozen=True)
class Predictions:
    """The cost model in the scheduler's words."""

    cost: CostModel
    card: Card
    layout: Layout
    """Of the mesh."""
    decode_on_all: bool = False
    """Every decode runs on all ranks, not on one."""

    def runs_on(self, kind: str, params: ResolvedParams) -> Layout:
        """What a unit really runs on: without a branch for every guidance group their ranks join SP."""
        if kind == "denoise":
            return layout_for(self.layout, len(self.card.branches(params, 0)), self.card)
        return self.layout if kind == "encode" or self.decode_on_all else Layout()

    def unit(self, kind: str, params: ResolvedParams, batch: int = 1) -> float:
        """Seconds of one request, step or chunk for `batch` requests together."""
        return self.cost.predict(kind, params, self.runs_on(kind, params), batch)

    def learn(self, kind: str, params: ResolvedParams, units: int, seconds: float, batch: int = 1) -> None:
        """From `units` of them that are over."""
        self.cost.observe(kind, params, self.runs_on(kind, params), units, seconds, batch)

    def seconds(self, item: Encode | Denoise | Decode, params: ResolvedParams) -> float:
        """Of an item whose requests have this shape."""
        kind, units, batch = item_size(item)
        return units * self.unit(kind, params, batch)

    def measured(self, item: Encode | Denoise | Decode, params: ResolvedParams) -> bool:
        """Whether such an item was seen before."""
        kind, _, batch = item_size(item)
        return self.cost.measured(kind, params, self.runs_on(kind, params), batch)

    def observe(self, item: Encode | Denoise | Decode, params: ResolvedParams, seconds: float) -> None:
        """Learn from an item that is over, and how right the prediction was."""
        kind, units, batch = item_size(item)
        if isinstance(item, Encode) and len(item.requests) > units:
            # Most of it may be the noise of many requests; it says little of what a text costs.
            return
        self.cost.compare(kind, params, self.runs_on(kind, params), units, seconds, batch)
        self.learn(kind, params, units, seconds, batch)

    def remaining(self, record: RequestRecord) -> float:
        """Seconds of work that are left of a request, alone on the mesh."""
        units = {
            "encode": int(record.stage in {Stage.QUEUED, Stage.ENCODE}),
            "denoise": record.total_steps - record.step,
            "first_decode": int(record.chunk == 0),
            "decode": record.total_chunks - max(record.chunk, 1),
        }
        return sum(n * self.unit(kind, record.request.params) for kind, n in units.items())


def item_size(item: Encode | Denoise | Decode) -> tuple[str, int, int]:
    """(kind, units, requests that share each unit). Requests of one text are one unit: it is encoded once."""
    match item:
        case Encode():
            return "encode", len({text_of(request) for request in item.requests}), 1
        case Denoise():
            return "denoise", item.steps, len(item.request_ids)
        case Decode():
            return "decode" if item.first_chunk else "first_decode", item.chunks, 1


def text_of(request: Request) -> Hashable:
    """What its embeddings depend on; the token ids follow from the texts."""
    params = request.params
    return params.prompt, params.negative_prompt, request.images, request.mask, request.markup
