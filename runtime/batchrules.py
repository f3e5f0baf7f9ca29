"""The rules file of `--batching-config`: how many requests of a kind may share a forward. Knows no cost, no queue."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from runtime.config import Config
from runtime.errors import InvalidInput
from runtime.sampling import ResolvedParams

GIB = 1 << 30
ANY_SIZE = "*"
VERSION = 1
"""Of the file's form, if it names one."""
NOT_HERE = {
    "max_cost": "a batch is bounded by the seconds that the cost model predicts, and the unit of this bound is another "
    "product's own; take max_batch_size",
}
"""Keys of such files that would change a batch, and why they cannot here."""

Gibibytes = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class BatchRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule; every rule that matches a request bounds its batch."""

    max_batch_size: int
    model: str | None = None
    """The model path, or a name under which the model is served."""
    model_contains: str | None = None
    """A part of one of these, in either case."""
    resolution: str | None = None
    """WIDTHxHEIGHT, or "*" for all."""
    device_memory_gb_min: Gibibytes | None = None
    device_memory_gb_max: Gibibytes | None = None
    """GiB in all of a rank's GPU, or of its host where ranks run on the CPU."""
    offload: bool | None = None
    """Only false: weights stay where they are."""
    calibration: Any = None
    """Notes on where the rule comes from, for people."""

    def matches(self, models: Collection[str], params: ResolvedParams, device_memory: int | None = None) -> bool:
        """`device_memory` is in bytes; unknown, it excludes no rule."""
        known = device_memory is not None
        gib = (device_memory or 0) / GIB
        return (
            (self.model is None or self.model in models)
            and (self.model_contains is None or any(self.model_contains.lower() in name.lower() for name in models))
            and self.resolution in {None, ANY_SIZE, f"{params.width}x{params.height}"}
            and not (known and self.device_memory_gb_min is not None and gib < self.device_memory_gb_min)
            and not (known and self.device_memory_gb_max is not None and gib > self.device_memory_gb_max)
        )


def rules_of(config: Config) -> tuple[BatchRule, ...]:
    """What the operator's file says; none without one.

    Raises:
        InvalidInput: as `read_batch_rules`.
    """
    return read_batch_rules(Path(config.batching_config)) if config.batching_config is not None else ()


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
    rules = content
    if isinstance(content, dict):
        rules = content.get("rules")
        if content.get("schema_version", VERSION) != VERSION:
            reason = f"{path} has schema_version {content['schema_version']}; only {VERSION} is known"
            raise InvalidInput("batching_config", reason)
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
    for wrong in _faults(made):
        raise InvalidInput("batching_config", f"{where}: {wrong}")
    return made


def _faults(rule: BatchRule) -> Iterable[str]:
    least, most = rule.device_memory_gb_min, rule.device_memory_gb_max
    if rule.max_batch_size < 1:
        yield f"max_batch_size is {rule.max_batch_size}; take 1 or more"
    if rule.resolution not in {None, ANY_SIZE} and re.fullmatch(r"[1-9]\d*x[1-9]\d*", rule.resolution or "") is None:
        yield f"resolution is {rule.resolution}; write it as 832x480"
    if least is not None and most is not None and least > most:
        yield f"device_memory_gb_min({least:g}) > device_memory_gb_max({most:g}); no device is both"
    if rule.offload:
        yield "offload is true, but no weights are offloaded here, so that it would never hold; leave the rule out"


def _check_keys(where: str, rule: dict[Any, Any], known: Collection[str]) -> None:
    for key in map(str, rule):
        if key in NOT_HERE:
            raise InvalidInput("batching_config", f"{where} has {key}, which does nothing here: {NOT_HERE[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise InvalidInput("batching_config", f"{where} has an unknown key {key}{hint}")
