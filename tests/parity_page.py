"""`make parity`: every cell of the matrix, printed and written to docs/parity.md and bench/results/parity.json.

With names of families, only those, and nothing is written.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mutations import FAULTS
from parity import (
    BOUND,
    FAULT,
    HALF_BOUND,
    MESHES,
    SEEDS,
    Cell,
    Half,
    HalfOutcome,
    Matrix,
    Outcome,
    cells,
    halves,
    pooled,
)
from parity_families import HEADS, SHAPES
from ranks import ROOT

from bench.report import machine

INTRO = f"""\
Every way to spread a request over ranks, against the family's own diffusers pipeline: tiny models whose every parameter
is random, 8 steps, guidance 4, gloo on CPUs. `make parity` measures all of it and writes this page and
`bench/results/parity.json`, which has every cell; `make test` runs a part that covers every row, column and fault.

## fp32

An entry is the largest difference of the final latents, over all ranks, from the same seed in diffusers. The bound is
{BOUND:.0e}. Each cell is run again with a fault, which has to show as more than {FAULT:.0e}: "smallest fault".

* **even**, **odd**: a number of tokens that divides by the ranks, and one that does not. **still**: three tokens of a
  picture; on four ranks one has none. **masked**: texts of different lengths in one forward. **unguided**: one branch;
  guidance groups join sequence parallelism. Each is the worst over 4 and 3 heads, alone and batched; the last six
  rows have every second of these cells.
* **odd heads**: the worst of those with 3 heads, which divide by no degree. **batched**: the worst of those where
  a second request joins three steps later, so that forwards hold two timesteps. **frames**: shades of 255.
* **fsdp n**: weights sharded over n ranks. Alone, every rank computes the whole forward; with other degrees
  the same ranks share the weights and the work.
* FLUX.1's own guidance is an input of the model, always 4 here, and "unguided" is the model as it is usually run. The
  other columns add a negative prompt and the pipeline's `true_cfg_scale`: without branches the cfg rows would not
  exist. Its pipeline attends to the padding of the text, so its "masked" cells are two lengths of text and no mask.
"""

FAULTS_INTRO = """
### What is broken on purpose

Each cell has one fault of those that its ranks can show; what runs on one rank without a mask has the timestep.
"""

NOTES = """
* **0 is to the bit.** With guidance groups a branch of a request alone runs by itself, as it does in the pipeline; so
  does an unguided request on one rank. Elsewhere branches or requests share a forward, or parts of an attention are
  merged, and kernels round another shape in another way. Wan is never at 0: the padding of its text is one token here.
* **Sharded weights** give the numbers of whole ones where every rank computes the whole forward ("fsdp 2"). With other
  degrees a few small shapes round otherwise.
* **FLUX.1 is farther off**, on one rank as on four: its latents are twice as large as the others'.
* **The smallest faults are Wan's.** "merge": where all keys weigh about the same, the mean of two parts is nearly
  right; the image models are made with larger scores. "branches": some 500 tokens of padding outweigh a short prompt,
  so that the branches differ little.
"""

HALF_INTRO = f"""
## bf16

RMS error of the final latents against diffusers in fp32, and its ratio to the error that diffusers makes in bf16; the
odd shape alone, {len(SEEDS)} seeds pooled, lowest and highest seed behind it. The bound is {HALF_BOUND}. diffusers is
given fp32 noise, rounded: drawn in bf16, the same seed is another picture. "with a fault" is the ratio of a faulty run.
"""

HALF_NOTES = """
* **A fault is 4 to 50 times the error of diffusers and not a hundred**, since that error is large: in the image models
  a hundred times it would be more than the latents themselves, and Wan's branches differ little, as above.
* **The timestep decides.** bf16 rounds it by up to 2 of 1000 in the image models. FLUX.1's is rounded here where its
  pipeline rounds it; rounded after its division by 1000 instead, the ratio was 1.3 to 1.5.
"""


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def matrix_table(family: str, chosen: list[Cell], outcomes: dict[str, Outcome]) -> list[str]:
    """A row per mesh."""
    head = [family, *SHAPES, "odd heads", "batched", "frames", "smallest fault"]

    def rows() -> Iterator[list[str]]:
        for mesh in MESHES:
            row = [cell for cell in chosen if (cell.family, cell.mesh) == (family, mesh)]

            def worst(holds: Callable[[Cell], bool], row: list[Cell] = row) -> str:
                return f"{max(outcomes[cell.name].difference for cell in row if holds(cell)):.1e}"

            entries = [worst(lambda cell, shape=shape: cell.shape == shape) for shape in SHAPES]
            entries += [worst(lambda cell: cell.heads == HEADS[1]), worst(lambda cell: cell.mode == "batched")]
            frames = max(outcomes[cell.name].shades or 0 for cell in row)
            fault = min((outcomes[cell.name].fault_difference, cell.fault) for cell in row)
            yield [mesh.title, *entries, str(frames), f"{fault[0]:.2f} ({fault[1]})"]

    return table(head, rows())


def fault_table(outcomes: list[Outcome]) -> list[str]:
    def rows() -> Iterator[list[str]]:
        for name, fault in FAULTS.items():
            shown = [outcome.fault_difference for outcome in outcomes if outcome.fault == name]
            if shown:
                figures = [f"{of(shown):.2f}" for of in (min, statistics.median)]
                yield [name, (fault.__doc__ or "").partition("\n")[0], str(len(shown)), *figures]

    return table(["fault", "what is broken", "cells", "smallest", "median"], rows())


def half_table(rows: list[Half], outcomes: dict[str, HalfOutcome]) -> list[str]:
    def lines() -> Iterator[list[str]]:
        for row in rows:
            outcome = outcomes[row.name]
            spread = f"{outcome.ratio:.2f} ({min(outcome.ratios):.2f} to {max(outcome.ratios):.2f})"
            errors = [f"{pooled(errors):.1e}" for errors in (outcome.diffusers, outcome.ours)]
            yield [row.family, row.mesh.title, *errors, spread, f"{outcome.fault_ratio:.0f} ({row.fault})"]

    return table(["family", "ranks", "diffusers", "framemesh", "ratio", "with a fault"], lines())


def page(chosen: list[Cell], rows: list[Half], outcomes: list[Outcome], half_outcomes: list[HalfOutcome]) -> str:
    by_name, by_row = {outcome.cell: outcome for outcome in outcomes}, {each.row: each for each in half_outcomes}
    lines = ["# Parity with diffusers", "", INTRO]
    for family in dict.fromkeys(cell.family for cell in chosen):
        lines += [*matrix_table(family, chosen, by_name), ""]
    lines += [verdict("cells", outcomes), FAULTS_INTRO, *fault_table(outcomes), NOTES.rstrip("\n")]
    lines += [HALF_INTRO, *half_table(rows, by_row), "", verdict("rows", half_outcomes), HALF_NOTES]
    return "\n".join(lines)


def verdict(what: str, outcomes: list[Outcome] | list[HalfOutcome]) -> str:
    wrong = sum(not outcome.right for outcome in outcomes)
    missed = sum(not outcome.noticed for outcome in outcomes)
    return f"{len(outcomes)} {what}, {wrong} out of bounds, {missed} faults not noticed."


def listing(where: dict[str, Any], outcomes: list[Outcome], half_outcomes: list[HalfOutcome]) -> str:
    """JSON with a line per cell and row."""
    parts = {"command": "make parity", "machine": where}
    lines = [f' "{name}": {json.dumps(value)}' for name, value in parts.items()]
    for name, entries in {"fp32": outcomes, "bf16": half_outcomes}.items():
        rows = ",\n".join(f"  {json.dumps(asdict(entry))}" for entry in entries)
        lines.append(f' "{name}": [\n{rows}\n ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(families: list[str]) -> int:
    where = machine()
    # Nothing here is timed.
    del where["load_before"]
    chosen, rows = cells(families), halves(families)
    outcomes: list[Outcome] = []
    half_outcomes: list[HalfOutcome] = []
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        for num_ranks in sorted({mesh.num_ranks for mesh in MESHES}):
            some, others = matrix.run(chosen, rows, num_ranks)
            outcomes += some
            half_outcomes += others
    text = page(chosen, rows, outcomes, half_outcomes)
    print(text)
    if not families:
        (ROOT / "bench" / "results" / "parity.json").write_text(listing(where, outcomes, half_outcomes))
        (ROOT / "docs" / "parity.md").write_text(text)
    return 0 if all(each.right and each.noticed for each in (*outcomes, *half_outcomes)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
