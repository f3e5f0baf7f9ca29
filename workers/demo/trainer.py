"""One training run that can stop at any moment: Muon and Adam, averaged weights, a checkpoint file; knows no model.

Muon: K. Jordan et al. 2024 (github.com/KellerJordan/Muon), with the update's size from Liu et al. (arXiv 2502.16982).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

Losses = dict[str, torch.Tensor]
"""Name -> scalar; "total" is what is minimised, the others are for the log."""


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then flat, then linearly to zero; betas of both optimizers and of the average."""

    steps: int
    lr: float
    warmup: int = 50
    flat: float = 0.5
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    decay: float = 0.01
    average: float = 0.995
    clip: float = 1.0

    def lr_at(self, step: int) -> float:
        start = self.flat * self.steps
        down = 1.0 if step < start else (self.steps - step) / (self.steps - start)
        return self.lr * min(1.0, (step + 1) / self.warmup) * down


class Trainer:
    """Trains `module` in place and keeps `<path>`: weights, their average and the optimizer's state, with the step.

    A run that finds its file goes on from there, also under another schedule. Saved every `save_seconds`.
    """

    def __init__(
        self,
        module: nn.Module,
        path: Path,
        schedule: Schedule,
        save_seconds: float = 180,
        on_save: Callable[[Trainer], None] = lambda trainer: None,
    ) -> None:
        self.step = 0
        self._path, self._schedule = path, schedule
        self._save_seconds, self._on_save = save_seconds, on_save
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}
        self._first = {name: torch.zeros_like(p) for name, p in self._weights.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self._weights.items() if not is_matrix(name, p)}
        self._matrices = _by_shape({name: p for name, p in self._weights.items() if is_matrix(name, p)})
        if path.exists():
            self._load()

    def run(self, loss: Callable[[int], Losses], log: Callable[[str], None] = _print) -> None:
        """Train to the schedule's last step; `loss` must depend on nothing but the step and the weights."""
        saved = began = time.monotonic()
        first, sums, count = self.step, dict[str, float](), 0
        while self.step < self._schedule.steps:
            losses = loss(self.step)
            self._update(losses["total"])
            self.step += 1
            sums = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in losses.items()}
            count += 1
            if self.step % 50 == 0 or self.step == self._schedule.steps:
                parts = " ".join(f"{name} {value / count:.4f}" for name, value in sums.items())
                pace = (time.monotonic() - began) / (self.step - first)
                left = pace * (self._schedule.steps - self.step) / 60
                at = f"{self._path.stem} {self.step}/{self._schedule.steps}"
                log(f"{at} {parts} {pace:.2f} s/step {left:.0f} min left")
                sums, count = {}, 0
            if time.monotonic() - saved > self._save_seconds:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        tensors = {f"{group}/{name}": t.detach() for group, named in self._groups() for name, t in named.items()}
        save_atomically(tensors, self._path, {"step": self.step, "schedule": self._schedule.__dict__})
        self._on_save(self)

    @contextmanager
    def average(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self._average[name] = self._average[name], weight.data

    def _groups(self) -> list[tuple[str, Mapping[str, torch.Tensor]]]:
        groups = ("weight", self._weights), ("average", self._average), ("first", self._first), ("second", self._second)
        return list(groups)

    def _load(self) -> None:
        with safe_open(self._path, "pt") as file, torch.no_grad():
            self.step = json.loads(file.metadata()["state"])["step"]
            for group, named in self._groups():
                for name, tensor in named.items():
                    tensor.copy_(file.get_tensor(f"{group}/{name}"))

    def _update(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights.values(), self._schedule.clip)
        lr = self._schedule.lr_at(self.step)
        with torch.no_grad():
            for names in self._matrices.values():
                self._muon(names, lr)
            for name in self._second:
                self._adam(name, lr)
            keep = min(self._schedule.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - keep)
        for weight in self._weights.values():
            weight.grad = None

    def _muon(self, names: list[str], lr: float) -> None:
        """All matrices of one shape at once: momentum, orthogonalized; its size is that of a usual Adam step."""
        moves = []
        for name in names:
            momentum, grad = self._first[name], _grad(self._weights[name])
            momentum.lerp_(grad, 1 - self._schedule.momentum)
            moves.append(grad.lerp(momentum, self._schedule.momentum).flatten(1))
        step = orthogonalized(torch.stack(moves))
        size = 0.2 * math.sqrt(max(step.shape[1:]))
        for name, move in zip(names, step, strict=True):
            weight = self._weights[name]
            weight.mul_(1 - lr * self._schedule.decay).sub_(move.view_as(weight), alpha=lr * size)

    def _adam(self, name: str, lr: float) -> None:
        weight, grad = self._weights[name], _grad(self._weights[name])
        first, second = self._first[name], self._second[name]
        fast, slow = self._schedule.betas
        first.lerp_(grad, 1 - fast)
        second.lerp_(grad.square(), 1 - slow)
        mean, spread = first / (1 - fast ** (self.step + 1)), second / (1 - slow ** (self.step + 1))
        weight.sub_(mean / (spread.sqrt() + 1e-8), alpha=lr)


def is_matrix(name: str, weight: torch.Tensor) -> bool:
    """Muon is for hidden layers; tables, embeddings, heads and vectors are Adam's. Convolutions count flattened."""
    wide = weight.ndim >= 2 and min(weight.shape[0], weight[0].numel()) >= 16
    return wide and not any(part in name for part in ("embedding", "shared", "head", "table"))


def orthogonalized(moves: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the same with all singular values near 1: five Newton-Schulz steps, in bf16."""
    tall = moves.shape[1] > moves.shape[2]
    x = moves.mT if tall else moves
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(moves.dtype)


def save_atomically(tensors: Mapping[str, torch.Tensor], path: Path, state: dict[str, object] | None = None) -> None:
    """A safetensors file that is there whole or not at all; `state` is kept as JSON in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished, {"state": json.dumps(state or {})})
    os.replace(unfinished, path)


def _by_shape(weights: dict[str, nn.Parameter]) -> dict[tuple[int, int], list[str]]:
    groups: dict[tuple[int, int], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.shape[0], weight[0].numel()), []).append(name)
    return groups


def _grad(weight: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
