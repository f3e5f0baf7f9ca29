"""The parity matrix: family x mesh x heads x shape x batching against the family's own diffusers pipeline, each cell
with a fault that must show; and what bf16 loses on some of the meshes, against what it costs diffusers.
"""

import itertools
import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutations import mutations_of
from parity_families import FAMILIES, HEADS, SHAPES, Case
from ranks import run_ranks
from safetensors.torch import load_file

from runtime.layout import Layout, layout_for
from runtime.models.card import card_for, read_configs

BOUND = 1e-4
"""Largest difference of fp32 latents; a fault must exceed it 100-fold."""
AIM = 1e-5
FAULT = 100 * BOUND
HALF_BOUND = 1.25
"""Largest RMS error of bf16 latents, in those of diffusers in bf16; both against diffusers in fp32."""
SEEDS = range(5)
MODES = ("alone", "batched")


@dataclass(frozen=True)
class Mesh:
    """Ranks that run a request together, and over how many of them the weights are sharded."""

    layout: Layout
    shards: int = 1

    @property
    def num_ranks(self) -> int:
        return max(self.layout.num_ranks, self.shards)

    @property
    def title(self) -> str:
        degrees = {"fsdp": self.shards} | {name: getattr(self.layout, name) for name in ("cfg", "ring", "ulysses")}
        return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "1 rank"

    @property
    def name(self) -> str:
        return self.title.replace(" x ", "-").replace(" ", "")


ULYSSES, RING, CFG, USP = Layout(1, 1, 2), Layout(1, 2, 1), Layout(2, 1, 1), Layout(1, 2, 2)
CFG_ULYSSES, CFG_RING, ULYSSES_4, RING_4 = Layout(2, 1, 2), Layout(2, 2, 1), Layout(1, 1, 4), Layout(1, 4, 1)
ALL_AT_ONCE = Layout(2, 2, 2)
COMBINED = [
    *map(Mesh, (CFG_RING, ULYSSES_4, RING_4)),
    *(Mesh(CFG_ULYSSES, 4), Mesh(ALL_AT_ONCE), Mesh(ALL_AT_ONCE, 8)),
]
"""Of these every shape and head count runs either alone or batched, in turns."""
MESHES = [
    *map(Mesh, (Layout(), ULYSSES, RING, CFG, USP, CFG_ULYSSES)),
    *(Mesh(Layout(), 2), Mesh(ULYSSES, 2)),
    *COMBINED,
]
HALF_MESHES = [*map(Mesh, (Layout(), ULYSSES, RING, CFG, USP)), Mesh(ULYSSES, 2)]


class Run:
    """What both kinds of entries are to the ranks; they add family, heads, mesh and fault."""

    family: str
    heads: int
    mesh: Mesh
    fault: str
    precision = "fp32"

    @property
    def folder(self) -> str:
        return f"{self.family}{self.heads}"

    @property
    def model(self) -> dict[str, Any]:
        """How the ranks load it."""
        return {"use_fsdp_inference": self.mesh.shards > 1, "dit_precision": self.precision}

    @property
    def model_name(self) -> str:
        return f"{self.folder}-{self.precision}-{'sharded' if self.mesh.shards > 1 else 'whole'}"

    def both(self, name: str, requests: list[Case]) -> list[dict[str, Any]]:
        """One right run and one with the fault."""
        layout = self.mesh.layout
        run = {
            "model": self.model_name,
            "layout": [layout.cfg, layout.ring, layout.ulysses],
            "requests": requests,
        }
        mutations = {"right": "none", "wrong": self.fault}
        return [run | {"name": f"{kind}/{name}", "mutation": mutation} for kind, mutation in mutations.items()]


@dataclass(frozen=True)
class Cell(Run):
    """One entry of the matrix."""

    family: str
    heads: int
    mesh: Mesh
    shape: str
    mode: str
    fault: str

    @property
    def name(self) -> str:
        return f"{self.folder}-{self.mesh.name}-{self.shape}-{self.mode}"

    @property
    def requests(self) -> list[Case]:
        """The cell's own request; batched, a second one joins it three steps later."""
        family = FAMILIES[self.family]
        requests = [family.request(self.shape), family.companion(self.shape)]
        return requests if self.mode == "batched" else requests[:1]

    def runs(self) -> list[dict[str, Any]]:
        return self.both(self.name, self.requests)


@dataclass(frozen=True)
class Half(Run):
    """One row of the bf16 table: the odd number of tokens, alone, over some seeds."""

    family: str
    mesh: Mesh
    fault: str
    heads: int = HEADS[0]
    precision: str = "bf16"

    @property
    def name(self) -> str:
        return f"bf16-{self.folder}-{self.mesh.name}"

    @property
    def requests(self) -> list[Case]:
        return [FAMILIES[self.family].request("odd") | {"seed": seed} for seed in SEEDS]

    def runs(self) -> list[dict[str, Any]]:
        requests = enumerate(self.requests)
        return [run for seed, request in requests for run in self.both(f"{self.name}/{seed}", [request])]


@dataclass
class Outcome:
    """What a cell gave."""

    cell: str
    fault: str
    difference: float = 0.0
    """Of the latents from diffusers', largest over requests."""
    fault_difference: float = 0.0
    shades: int | None = None
    """Of the frames, of 255; None where none were decoded."""
    ranks_equal: bool = True

    @property
    def right(self) -> bool:
        return self.difference <= BOUND and not (self.shades or 0) > 1 and self.ranks_equal

    @property
    def noticed(self) -> bool:
        return self.fault_difference > FAULT


@dataclass
class HalfOutcome:
    """RMS errors of a row against diffusers in fp32, one per seed."""

    row: str
    fault: str
    ours: list[float] = field(default_factory=list)
    diffusers: list[float] = field(default_factory=list)
    faulty: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return pooled(self.ours) / pooled(self.diffusers)

    @property
    def ratios(self) -> list[float]:
        """Seed by seed."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.diffusers, strict=True)]

    @property
    def fault_ratio(self) -> float:
        return pooled(self.faulty) / pooled(self.diffusers)

    @property
    def right(self) -> bool:
        return self.ratio <= HALF_BOUND

    @property
    def noticed(self) -> bool:
        return self.fault_ratio > HALF_BOUND


def pooled(errors: list[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def cells(families: list[str] | None = None, *, full: bool = True) -> list[Cell]:
    """The matrix; not full, a few cells of every mesh that cover each shape, head count, mode and fault."""
    found = []
    for family in families or FAMILIES:
        for place, mesh in enumerate(MESHES):
            every = [Cell(family, *entry, _fault(family, *entry)) for entry in _entries(mesh)]
            # 7 has no factor in common with the number of entries: every mesh gets others.
            some = 3 if family == "wan" else 2
            found += every if full else [every[(place + 7 * i) % len(every)] for i in range(some)]
    return found


def _entries(mesh: Mesh) -> list[tuple[int, Mesh, str, str]]:
    turns = itertools.product(enumerate(HEADS), enumerate(SHAPES), enumerate(MODES))
    return [
        (heads, mesh, shape, mode)
        for (i, heads), (j, shape), (k, mode) in turns
        if mesh not in COMBINED or (i + j + k) % 2 == 0
    ]


def _fault(family: str, heads: int, mesh: Mesh, shape: str, mode: str) -> str:
    """One of those that the mesh shows; a request without guidance runs on the folded layout."""
    guided = FAMILIES[family].guided(shape)
    layout = mesh.layout if guided else layout_for(mesh.layout, 1, _Heads(heads))
    # With guidance groups a request alone has nothing to be padded to.
    masked = FAMILIES[family].masks and shape == "masked" and (layout.cfg == 1 or mode == "batched")
    faults = mutations_of(layout, sharded=mesh.shards > 1, masked=masked)
    return faults[(SHAPES.index(shape) + MODES.index(mode)) % len(faults)]


@dataclass(frozen=True)
class _Heads:
    heads: int


def halves(families: list[str] | None = None, *, full: bool = True) -> list[Half]:
    """The rows of the bf16 table; not full, on one rank and on two."""
    meshes = HALF_MESHES if full else HALF_MESHES[:2]
    return [Half(family, mesh, _half_fault(mesh)) for family in families or FAMILIES for mesh in meshes]


def _half_fault(mesh: Mesh) -> str:
    """Also one rank has branches to exchange; its timestep is what bf16 rounds worst."""
    return mutations_of(mesh.layout, sharded=mesh.shards > 1)[-1] if mesh.num_ranks > 1 else "branches"


class Matrix:
    """Tiny pipelines and diffusers' answers, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders: dict[str, Path] = {}
        self._pipelines: dict[tuple[str, torch.dtype], Any] = {}
        self._answers: dict[str, tuple[torch.Tensor, np.ndarray]] = {}
        self._rounded: dict[str, torch.Tensor] = {}

    def run(self, chosen: list[Cell], rows: list[Half], num_ranks: int) -> tuple[list[Outcome], list[HalfOutcome]]:
        """All entries of meshes with so many ranks, in one group of processes."""
        chosen, rows = ([entry for entry in of if entry.mesh.num_ranks == num_ranks] for of in (chosen, rows))
        models = {e.model_name: e.model | {"folder": str(self.folder_of(e))} for e in [*chosen, *rows]}
        runs = [run for entry in [*chosen, *rows] for run in entry.runs()]
        ranks = generate(self._folder, num_ranks, models, runs)
        return [self._outcome(cell, ranks) for cell in chosen], [self._half_outcome(row, ranks) for row in rows]

    def folder_of(self, entry: Run) -> Path:
        if entry.folder not in self._folders:
            folder = FAMILIES[entry.family].build(self._folder / entry.folder, heads=entry.heads)
            assert card_for(read_configs(folder)).heads == entry.heads
            self._folders[entry.folder] = folder
        return self._folders[entry.folder]

    def answer(self, entry: Run, case: Case) -> tuple[torch.Tensor, np.ndarray]:
        """(latents, frames) by diffusers in fp32."""
        key = entry.folder + json.dumps(case, sort_keys=True)
        if key not in self._answers:
            self._answers[key] = FAMILIES[entry.family].reference(self._pipeline(entry, torch.float32), case)
        return self._answers[key]

    def rounded(self, entry: Run, case: Case) -> torch.Tensor:
        """Latents by diffusers in bf16."""
        key = entry.folder + json.dumps(case, sort_keys=True)
        if key not in self._rounded:
            self._rounded[key] = FAMILIES[entry.family].rounded(self._pipeline(entry, torch.bfloat16), case)
        return self._rounded[key]

    def _pipeline(self, entry: Run, dtype: torch.dtype) -> Any:
        if (entry.folder, dtype) not in self._pipelines:
            self._pipelines[entry.folder, dtype] = FAMILIES[entry.family].load(self.folder_of(entry), dtype)
        return self._pipelines[entry.folder, dtype]

    def _outcome(self, cell: Cell, ranks: list[dict[str, torch.Tensor]]) -> Outcome:
        outcome = Outcome(cell.name, cell.fault)
        for index, case in enumerate(cell.requests):
            latents, frames = self.answer(cell, case)
            right, wrong = (f"{kind}/{cell.name}/{index}" for kind in ("right", "wrong"))
            outcome.ranks_equal &= all(torch.equal(t[f"{right}/latents"], ranks[0][f"{right}/latents"]) for t in ranks)
            for tensors in ranks:
                outcome.difference = max(outcome.difference, distance(tensors[f"{right}/latents"], latents))
                outcome.fault_difference = max(outcome.fault_difference, distance(tensors[f"{wrong}/latents"], latents))
                if f"{right}/frames" in tensors:
                    outcome.shades = max(outcome.shades or 0, shades(tensors[f"{right}/frames"], frames))
        return outcome

    def _half_outcome(self, row: Half, ranks: list[dict[str, torch.Tensor]]) -> HalfOutcome:
        outcome = HalfOutcome(row.name, row.fault)
        for seed, case in enumerate(row.requests):
            exact = self.answer(row, case)[0]
            right, wrong = (f"{kind}/{row.name}/{seed}/0/latents" for kind in ("right", "wrong"))
            outcome.diffusers.append(rms(self.rounded(row, case), exact))
            outcome.ours.append(max(rms(tensors[right], exact) for tensors in ranks))
            outcome.faulty.append(max(rms(tensors[wrong], exact) for tensors in ranks))
        return outcome


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    assert found.shape == right.shape
    return (found - right).abs().max().nan_to_num(torch.inf).item()


def rms(found: torch.Tensor, right: torch.Tensor) -> float:
    assert found.shape == right.shape
    return (found.double() - right.double()).square().mean().sqrt().nan_to_num(torch.inf).item()


def shades(found: torch.Tensor, right: np.ndarray) -> int:
    return int(np.abs(found.numpy().astype(int) - right.astype(int)).max())


def generate(folder: Path, num_ranks: int, models: dict[str, dict[str, Any]], runs: list[dict[str, Any]]):
    """Every rank's tensors: `run/request index/latents` and, for whom ran alone and right, `…/frames`."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        plan = Path(place, "plan.json")
        plan.write_text(json.dumps({"models": models, "runs": runs}))
        run_ranks(num_ranks, "ranks_generate.py", str(plan), place, timeout_s=120.0 + 5.0 * len(runs))
        return [load_file(Path(place, f"rank{rank}.safetensors")) for rank in range(num_ranks)]
