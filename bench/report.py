"""How every benchmark states its result: the command, the machine, the figures. One JSON per benchmark."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What a reader has to know to judge a figure; load above 0.5 before the start makes it worthless."""
    return {
        "cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """median, lowest, highest, p95, n."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "p95": ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)],
        "n": len(ordered),
    }


def save(name: str, where: dict[str, Any], figures: dict[str, Any], *, variant: str = "") -> None:
    """Print the figures and write them to results/NAME.json, or to NAME_VARIANT.json."""
    text = shown(name, where, figures)
    print(text)
    (RESULTS / f"{name}{variant and f'_{variant}'}.json").write_text(text + "\n")


def shown(name: str, where: dict[str, Any], figures: dict[str, Any]) -> str:
    """The figures as they are printed and kept."""
    result = {"command": command(name), "machine": where, **figures}
    return msgspec.json.format(msgspec.json.encode(result)).decode()


def command(name: str) -> str:
    """How to get the figures again: what runs now, which need not be the module that the result is named after."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = f"bench.{name}" if spec is None or not spec.name.startswith("bench.") else spec.name
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
