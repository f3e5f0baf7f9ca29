"""The simulator's pictures: a figure over the load, a line per policy. Knows only the rows of its results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

PANELS = {"mean_s": "mean latency, s", "p99_s": "p99 latency, s", "slo": "share in time"}


def plot_loads(title: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """`rows` hold policy, load and the figures of `PANELS`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(12, 3.6), constrained_layout=True)
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = [row for row in rows if row["policy"] == policy]
            loads, values = [row["load"] for row in mine], [row[name] for row in mine]
            above = [row.get(f"{name}_95", 0.0) for row in mine]
            # A logarithmic axis has no room for an interval that reaches zero.
            spread = [[min(half, 0.9 * value) for half, value in zip(above, values, strict=True)], above]
            axes.errorbar(loads, values, spread, label=policy, marker="o", markersize=3, linewidth=1.2, capsize=2)
        axes.set_xlabel("load (1: what whole requests could carry)")
        axes.set_title(label)
        axes.grid(alpha=0.3)
        if name == "slo":
            axes.set_ylim(0, 1.02)
        else:
            axes.set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The same rows in Markdown."""
    columns = [(head, write) for head, name, write in COLUMNS if all(name in row for row in rows)]
    lines = ["| " + " | ".join(head for head, _ in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(write(row) for _, write in columns) + " |" for row in rows]
    return "\n".join(lines)


def _mean(row: Row) -> str:
    spread = f" ± {row['mean_s_95']:.2g}" if "mean_s_95" in row else ""
    return f"{row['mean_s']:.3g}{spread}"


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("load", "load", lambda row: f"{row['load']:.2g}"),
    ("policy", "policy", lambda row: str(row["policy"])),
    ("mean s", "mean_s", _mean),
    ("p50", "p50_s", lambda row: f"{row['p50_s']:.3g}"),
    ("p95", "p95_s", lambda row: f"{row['p95_s']:.3g}"),
    ("p99", "p99_s", lambda row: f"{row['p99_s']:.3g}"),
    ("in time", "slo", lambda row: f"{row['slo']:.0%}"),
    (
        "pre-emptions per request",
        "preemptions_per_request",
        lambda row: f"{row['preemptions_per_request']:.2g}",
    ),
    ("rank-s per request", "rank_s_per_request", lambda row: f"{row['rank_s_per_request']:.3g}"),
    ("idle", "idle_share", lambda row: f"{row['idle_share']:.0%}"),
)
"""Head, the figure that it needs, and how that is written; a result of an earlier version may lack some."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simplot", description=__doc__)
    parser.add_argument("result", type=Path, help="a file of bench/results/")
    print(table(json.loads(parser.parse_args().result.read_text())["rows"]))


if __name__ == "__main__":
    main()
