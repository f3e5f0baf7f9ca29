"""How many requests share a forward: the cost model's budget, under the operator's limits. Knows no queue.

Small shapes gain because a step has a fixed part (launches, collectives, the text's keys and values) that a batch pays
once; large ones gain nothing and would only make every member wait for the others.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from runtime.cost import CostModel
from runtime.errors import InvalidInput
from runtime.layout import Layout
from runtime.sampling import ResolvedParams

MARGINAL_GAIN = 0.02
"""One more member must lower the seconds per member by at least this share."""


class BatchRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule of `--batching-config`; the first that matches a request bounds its batch."""

    max_batch_size: int
    model: str | None = None
    model_contains: str | None = None
    resolution: str | None = None
    """WIDTHxHEIGHT."""

    def matches(self, model: str, params: ResolvedParams) -> bool:
        return (
            self.model in {None, model}
            and (self.model_contains is None or self.model_contains.lower() in model.lower())
            and self.resolution in {None, f"{params.width}x{params.height}"}
        )


@dataclass(frozen=True)
class BatchLimits:
    """The operator's word on batch sizes."""

    max_size: int = 16
    rules: tuple[BatchRule, ...] = ()
    model: str = ""

    def of(self, params: ResolvedParams) -> int:
        rule = next((rule for rule in self.rules if rule.matches(self.model, params)), None)
        return min(self.max_size, rule.max_batch_size) if rule is not None else self.max_size


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


def read_batch_rules(path: Path) -> tuple[BatchRule, ...]:
    """The rules of a JSON or YAML file: a list, or an object with the list under "rules".

    Raises:
        InvalidInput: names the rule and the key at fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as error:
        raise InvalidInput("batching_config", f"{path} cannot be read: {error}") from error
    rules = content.get("rules") if isinstance(content, dict) else content
    if not isinstance(rules, list):
        raise InvalidInput("batching_config", f"{path} holds no list of rules")
    return tuple(_rule(path, number, rule) for number, rule in enumerate(rules, start=1))


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _rule(path: Path, number: int, rule: Any) -> BatchRule:
    where = f"rule {number} of {path}"
    if not isinstance(rule, dict):
        raise InvalidInput("batching_config", f"{where} is no object")
    _check_keys(where, rule, BatchRule.__struct_fields__)
    try:
        made = msgspec.convert(rule, BatchRule)
    except msgspec.ValidationError as error:
        raise InvalidInput("batching_config", f"{where}: {error}") from error
    if made.max_batch_size < 1:
        raise InvalidInput("batching_config", f"{where}: max_batch_size is {made.max_batch_size}; take 1 or more")
    if made.resolution is not None and re.fullmatch(r"[1-9]\d*x[1-9]\d*", made.resolution) is None:
        raise InvalidInput("batching_config", f"{where}: resolution is {made.resolution}; write it as 832x480")
    return made


def _check_keys(where: str, rule: dict[Any, Any], known: Iterable[str]) -> None:
    for key in map(str, rule):
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise InvalidInput("batching_config", f"{where} has an unknown key {key}{hint}")
