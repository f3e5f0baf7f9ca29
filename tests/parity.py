"""The parity matrix: family x layout x shape x batching against the family's own diffusers pipeline, each cell with a
fault that must show. As a program (`make parity`) it runs every cell and writes bench/results/parity.json and
docs/parity.md.
"""

import itertools
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import tiny_flux
import tiny_qwen_image
import torch
from mutations import mutations_of
from ranks import ROOT, run_ranks
from safetensors.torch import load_file
from tiny_wan import build_tiny_wan, load_pipeline, reference

from runtime.layout import Layout, layout_for
from runtime.models.card import card_for, read_configs

BOUND = 1e-4
"""Largest difference of fp32 latents; a fault must exceed it 100-fold."""
AIM = 1e-5
FAULT = 100 * BOUND

LAYOUTS = [
    *(Layout(1, 1, 1), Layout(1, 1, 2), Layout(1, 2, 1), Layout(2, 1, 1)),
    *(Layout(1, 2, 2), Layout(2, 1, 2), Layout(2, 2, 1), Layout(1, 1, 4), Layout(1, 4, 1)),
]
MODES = ("alone", "batched")


class Family(Protocol):
    """What the matrix needs of a model family; a new one is a row of `FAMILIES`."""

    name: str
    heads: tuple[int, ...]
    """Head counts to build; one that divides by no degree is among them."""
    scale: str
    """The field that decides over guidance branches."""
    cases: dict[str, dict[str, Any]]
    """Shape -> a request: fields of `SamplingParams`, `steps` and `guidance` for short. One is called "odd"."""

    def build(self, folder: Path, heads: int) -> Path:
        """A tiny pipeline in the real folder layout, every parameter random."""
        ...

    def load(self, folder: Path) -> Any:
        """diffusers' own pipeline, fp32."""
        ...

    def reference(self, pipeline: Any, case: dict[str, Any]) -> tuple[torch.Tensor, np.ndarray]:
        """(latents in the shape of RequestState.latents, frames uint8 (T, H, W, 3)) of the pipeline."""
        ...


class Wan:
    """Text to video; padding of the text is a bias of its cross-attention."""

    name = "wan"
    heads = (4, 3)
    scale = "guidance"
    cases: ClassVar = {
        "even": {"prompt": "a red circle moving right", "seed": 3, "height": 32, "width": 32, "num_frames": 9},
        "odd": {"prompt": "a star", "seed": 4, "height": 48, "width": 48, "num_frames": 9},
        "still": {"prompt": "a star", "seed": 5, "height": 16, "width": 48, "num_frames": 1},
        "masked": {
            "prompt": "a box",
            "negative_prompt": "blurry &amp; dull, a red circle moving right, a blue square getting bigger",
            "seed": 7,
            "height": 32,
            "width": 48,
            "num_frames": 5,
        },
        "unguided": {"prompt": "a box", "seed": 6, "height": 32, "width": 32, "num_frames": 5, "guidance": 1.0},
    }
    """Tokens: 12, 27, 3, 12, 8. Three tokens on four ranks leave one rank without any."""

    def build(self, folder, heads):
        return build_tiny_wan(folder, heads=heads)

    def load(self, folder):
        return load_pipeline(folder)

    def reference(self, pipeline, case):
        caught = {}

        def catch(pipeline, step, timestep, tensors):
            caught.update(tensors)
            return {}

        pictures = reference(pipeline, case, "pil", callback_on_step_end=catch)[0]
        return caught["latents"], np.stack([np.asarray(picture) for picture in pictures])


class Still:
    """What the image families have in common: text and picture are joined in every attention."""

    heads = (4, 3)
    scale = "true_cfg_scale"
    cases: ClassVar = {
        "even": {"prompt": "a red circle", "negative_prompt": "a square", "seed": 3, "height": 64, "width": 64},
        "odd": {"prompt": "a star", "negative_prompt": "a red circle", "seed": 4, "height": 48, "width": 80},
        "still": {"prompt": "a star", "negative_prompt": "", "seed": 5, "height": 16, "width": 48},
        "masked": {
            "prompt": "a star",
            "negative_prompt": "a red circle moving right, a star over the sea; a big blue square, very bright!",
            "seed": 7,
            "height": 32,
            "width": 48,
        },
        "unguided": {"prompt": "a box", "seed": 6, "height": 32, "width": 64, "true_cfg_scale": 1.0},
    }
    """Tokens of the picture: 16, 15, 3, 6, 8. Three tokens on four ranks leave one rank without any."""

    def __init__(self, tiny: Any) -> None:
        self._tiny = tiny

    def load(self, folder):
        return self._tiny.load_pipeline(folder)

    def reference(self, pipeline, case):
        words = {"num_inference_steps" if name == "steps" else name: value for name, value in case.items()}
        picture = self._tiny.reference(pipeline, words, "pil")[0]
        return self._tiny.reference(pipeline, words), np.asarray(picture)[None]


class Flux(Still):
    """Text and picture in streams of their own, then in one."""

    name = "flux"

    def build(self, folder, heads):
        return self._tiny.build_tiny_flux(folder, heads=heads)


class QwenImage(Still):
    """Texts of different lengths are padded and masked."""

    name = "qwen_image"

    def build(self, folder, heads):
        return self._tiny.build_tiny_qwen_image(folder, heads=heads)


FAMILIES: dict[str, Family] = {"wan": Wan(), "flux": Flux(tiny_flux), "qwen_image": QwenImage(tiny_qwen_image)}


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix."""

    family: str
    heads: int
    layout: Layout
    shape: str
    mode: str
    fault: str

    @property
    def name(self) -> str:
        mesh = f"cfg{self.layout.cfg}-ring{self.layout.ring}-ulysses{self.layout.ulysses}"
        return f"{self.model}-{mesh}-{self.shape}-{self.mode}"

    @property
    def model(self) -> str:
        return f"{self.family}{self.heads}"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The cell's own request; batched, a second one joins it three steps later."""
        family = FAMILIES[self.family]
        first = {"steps": 8, family.scale: 4.0} | family.cases[self.shape]
        if self.mode == "alone":
            return [first]
        scale = min(first[family.scale], 2.5)
        return [first, first | {"prompt": "two green triangles", "seed": first["seed"] + 50, family.scale: scale}]

    def runs(self) -> list[dict[str, Any]]:
        layout = [self.layout.cfg, self.layout.ring, self.layout.ulysses]
        run = {"model": self.model, "layout": layout, "requests": self.requests}
        return [
            run | {"name": f"right/{self.name}", "mutation": "none"},
            run | {"name": f"wrong/{self.name}", "mutation": self.fault},
        ]


@dataclass
class Outcome:
    """What a cell gave."""

    cell: str
    fault: str
    difference: float
    """Of the latents from diffusers', largest over requests."""
    fault_difference: float
    shades: int = 0
    """Of the frames, of 255; -1 where none were decoded."""
    ranks_equal: bool = True

    @property
    def right(self) -> bool:
        return self.difference <= BOUND and self.shades <= 1 and self.ranks_equal and self.fault_difference > FAULT


def cells(families=None, full=True):
    """The matrix; not full, a few cells of every layout that cover each shape, head count and mode."""
    turns = itertools.count()
    found = []
    for family in (FAMILIES[name] for name in families or FAMILIES):
        for place, layout in enumerate(LAYOUTS):
            every = list(itertools.product(family.heads, family.cases, MODES))
            # 7 has no factor in common with the number of entries: every layout gets others.
            some = 4 if family.name == "wan" else 2
            chosen = every if full else [every[(place + 7 * i) % len(every)] for i in range(some)]
            for heads, shape, mode in chosen:
                found.append(
                    Cell(family.name, heads, layout, shape, mode, _fault(family, layout, heads, shape, next(turns)))
                )
    return found


def _fault(family, layout, heads, shape, turn):
    """One of those that this layout shows; a request without guidance runs on the folded one."""

    class Card:
        pass

    card = Card()
    card.heads = heads
    guided = family.cases[shape].get(family.scale, 4.0) > 1
    faults = mutations_of(layout if guided else layout_for(layout, 1, card))
    return faults[turn % len(faults)]


class Matrix:
    """Tiny pipelines and diffusers' answers, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pipelines: dict[str, tuple[Path, Any]] = {}
        self._answers: dict[str, tuple[torch.Tensor, np.ndarray]] = {}

    def folder_of(self, cell: Cell) -> Path:
        return self._pipeline(cell)[0]

    def run(self, chosen: list[Cell], num_ranks: int) -> list[Outcome]:
        """All cells of layouts with so many ranks, in one group of processes."""
        mine = [cell for cell in chosen if cell.layout.num_ranks == num_ranks]
        models = {cell.model: str(self.folder_of(cell)) for cell in mine}
        ranks = generate(self._folder, num_ranks, models, [run for cell in mine for run in cell.runs()])
        return [self._outcome(cell, ranks) for cell in mine]

    def answer(self, cell: Cell, case: dict[str, Any]) -> tuple[torch.Tensor, np.ndarray]:
        key = cell.model + json.dumps(case, sort_keys=True)
        if key not in self._answers:
            self._answers[key] = FAMILIES[cell.family].reference(self._pipeline(cell)[1], case)
        return self._answers[key]

    def _pipeline(self, cell: Cell) -> tuple[Path, Any]:
        if cell.model not in self._pipelines:
            family = FAMILIES[cell.family]
            folder = family.build(self._folder / cell.model, cell.heads)
            assert card_for(read_configs(folder)).heads == cell.heads
            self._pipelines[cell.model] = folder, family.load(folder)
        return self._pipelines[cell.model]

    def _outcome(self, cell: Cell, ranks: list[dict[str, torch.Tensor]]) -> Outcome:
        outcome = Outcome(cell.name, cell.fault, 0.0, 0.0)
        for index, case in enumerate(cell.requests):
            latents, frames = self.answer(cell, case)
            right, wrong = (f"{kind}/{cell.name}/{index}" for kind in ("right", "wrong"))
            outcome.ranks_equal &= all(torch.equal(t[f"{right}/latents"], ranks[0][f"{right}/latents"]) for t in ranks)
            for tensors in ranks:
                outcome.difference = max(outcome.difference, distance(tensors[f"{right}/latents"], latents))
                outcome.fault_difference = max(outcome.fault_difference, distance(tensors[f"{wrong}/latents"], latents))
                if f"{right}/frames" in tensors:
                    outcome.shades = max(outcome.shades, shades(tensors[f"{right}/frames"], frames))
        return outcome


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    assert found.shape == right.shape
    return (found - right).abs().max().nan_to_num(torch.inf).item()


def shades(found: torch.Tensor, right: np.ndarray) -> int:
    return int(np.abs(found.numpy().astype(int) - right.astype(int)).max())


def generate(folder: Path, num_ranks: int, models: dict[str, str], runs: list[dict[str, Any]]):
    """Every rank's tensors: `run/request index/latents` and, for whom ran alone and right, `…/frames`."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        plan = Path(place, "plan.json")
        plan.write_text(json.dumps({"models": models, "runs": runs}))
        run_ranks(num_ranks, "ranks_generate.py", str(plan), place, timeout_s=60.0 + 5.0 * len(runs))
        return [load_file(Path(place, f"rank{rank}.safetensors")) for rank in range(num_ranks)]


# ---- the report --------------------------------------------------------------------------------------------------


def table(chosen: list[Cell], outcomes: list[Outcome]) -> list[str]:
    """Markdown: a row per family and layout, a column per shape; the largest difference over heads and batching."""
    by_cell = {outcome.cell: outcome for outcome in outcomes}
    shapes = list(dict.fromkeys(cell.shape for cell in chosen))
    lines = [f"| family | layout | {' | '.join(shapes)} | batched | smallest fault |", "|---" * (len(shapes) + 4) + "|"]
    for family, layout in dict.fromkeys((cell.family, cell.layout) for cell in chosen):
        row = [cell for cell in chosen if (cell.family, cell.layout) == (family, layout)]

        def worst(of):
            return f"{max(by_cell[cell.name].difference for cell in of):.1e}" if of else ""

        entries = [worst([cell for cell in row if cell.shape == shape]) for shape in shapes]
        batched = worst([cell for cell in row if cell.mode == "batched"])
        fault = min(by_cell[cell.name].fault_difference for cell in row)
        title = f"cfg {layout.cfg} x ring {layout.ring} x ulysses {layout.ulysses}"
        lines.append(f"| {family} | {title} | {' | '.join(entries)} | {batched} | {fault:.2f} |")
    return lines


def page(chosen: list[Cell], outcomes: list[Outcome]) -> str:
    wrong = [outcome.cell for outcome in outcomes if not outcome.right]
    return "\n".join(
        [
            "# Parity with diffusers",
            "",
            "Largest difference of the final latents from the family's own diffusers pipeline: fp32 on gloo, a tiny",
            'model whose every parameter is random, 8 steps, guidance 4 ("unguided": 1). Each entry is the worst over',
            "head counts (one of which divides by no degree), over a request alone and two requests that share",
            f'forwards at different timesteps, and over all ranks. The bound is {BOUND:.0e}. "smallest fault": each of',
            "the cells was run again with a fault (wrong head or token order, missing log-sum-exp, stale keys, swapped",
            f"branches, wrong timestep), which has to show as more than {FAULT:.0e}.",
            "",
            *table(chosen, outcomes),
            "",
            f"{len(outcomes)} cells, {len(wrong)} out of bounds{': ' if wrong else ''}{', '.join(wrong)}.",
            "`make parity` writes this page; `make test` runs a covering part of it.",
            "",
        ]
    )


def main(families: list[str]) -> int:
    chosen, outcomes = cells(families), []
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        for num_ranks in sorted({cell.layout.num_ranks for cell in chosen}):
            outcomes += matrix.run(chosen, num_ranks)
    print("\n".join(table(chosen, outcomes)))
    if not families:
        rows = [asdict(outcome) for outcome in outcomes]
        (ROOT / "bench" / "results" / "parity.json").write_text(json.dumps(rows, indent=1) + "\n")
        (ROOT / "docs" / "parity.md").write_text(page(chosen, outcomes))
    return 0 if all(outcome.right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
