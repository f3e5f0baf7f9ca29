"""How many requests share a forward: the cost model's budget, under the operator's limits. Knows no queue.

Small shapes gain because a step has a fixed part (launches, collectives, the text's keys and values) that a batch pays
once; large ones gain nothing and would only make every member wait for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.batchrules import BatchRule
from runtime.cost import CostModel
from runtime.layout import Layout
from runtime.sampling import ResolvedParams

MARGINAL_GAIN = 0.02
"""One more member must lower the seconds per member by at least this share."""


@dataclass
class BatchLimits:
    """The operator's word on batch sizes, and the request's own."""

    max_size: int = 16
    rules: tuple[BatchRule, ...] = ()
    models: tuple[str, ...] = ()
    """The model's path and the names under which it is served."""
    device_memory: int | None = None
    """Bytes in all of the poorest rank's device; None until the ranks have told."""

    def of(self, params: ResolvedParams) -> int:
        if params.deterministic:
            # To the bit a forward is the same only in the same company: in none.
            return 1
        matching = (rule for rule in self.rules if rule.matches(self.models, params, self.device_memory))
        return min([self.max_size, *(rule.max_batch_size for rule in matching)])


def batch_budget(cost: CostModel, limits: BatchLimits, params: ResolvedParams, layout: Layout) -> int:
    """The largest batch of this shape in which every member still makes the others cheaper by the fitted line.

    The line and not the measured sizes: it is smooth, so a noisy measurement of one size does not end the search.
    """
    best, per_member = 1, cost.fitted("denoise", params, layout, 1)
    for size in range(2, limits.of(params) + 1):
        share = cost.fitted("denoise", params, layout, size) / size
        if share > per_member * (1 - MARGINAL_GAIN):
            break
        best, per_member = size, share
    return best
