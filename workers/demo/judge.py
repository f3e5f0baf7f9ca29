"""Says what a clip of the demo's world shows, from its pixels alone; knows no prompt and no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from workers.demo.data import BACKGROUNDS, COLOURS, SHAPES, Attributes, coverage

CROP, REACH = 40, 1.9
"""A shape is compared in a window of CROP x CROP samples that reaches REACH times the radius of the equal circle."""
PERIODS = {"circle": 0, "square": 90, "triangle": 120, "star": 72}
"""Degrees after which a shape looks the same."""
ANGLE_STEP = 3
UNCLEAR = 0.72
"""An outline that overlaps less with every shape (intersection over union) is none of them."""
UNSEEN = "unseen"
"""The motion of a single frame."""


@dataclass(frozen=True)
class Verdict(Attributes):
    """What a clip shows; "none" where it shows nothing of the kind. outline: mean overlap with the ideal shape."""

    outline: float


def judge(video: torch.Tensor) -> Verdict:
    """What the frames (T, H, W, 3) uint8 show."""
    pixels = video.float()
    sides = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    border = torch.cat([side.flatten(0, 2) for side in sides])
    behind = border.median(dim=0).values
    background = _nearest(behind, BACKGROUNDS)
    away = (pixels - behind).norm(dim=-1)
    peak = away.flatten().topk(max(1, away.numel() // 50)).values.mean()
    if peak < 40:
        return Verdict("none", "none", background, "none", 0.0)
    front = pixels[away > peak / 2].median(dim=0).values
    inside = ((pixels - behind) @ (front - behind) / (front - behind).square().sum()).clamp(0, 1)
    inside = torch.where(inside < 0.15, 0.0, inside)
    path = _track(inside)
    if path is None:
        return Verdict("none", _nearest(front, COLOURS), background, "none", 0.0)
    shape, outline, turn = _outline(inside, path)
    return Verdict(shape, _nearest(front, COLOURS), background, _motion(path, turn, min(video.shape[1:3])), outline)


@dataclass(frozen=True)
class _Path:
    """Per frame, in pixels: the shape's centre and the radius of a circle of its area."""

    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor


def _nearest(colour: torch.Tensor, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float((colour - torch.tensor(names[name])).norm()))


def _track(inside_THW: torch.Tensor) -> _Path | None:
    area = inside_THW.sum(dim=(1, 2))
    if area.min() < 4:
        return None
    _, height, width = inside_THW.shape
    x = (inside_THW.sum(dim=1) @ (torch.arange(width) + 0.5)) / area
    y = (inside_THW.sum(dim=2) @ (torch.arange(height) + 0.5)) / area
    return _Path(x, y, (area / math.pi).sqrt())


def _motion(path: _Path, turn: float, side: int) -> str:
    """The strongest of moving, changing size and turning; first and last are means of up to three frames."""
    if len(path.x) == 1:
        return UNSEEN
    ends = max(1, min(3, len(path.x) // 4))
    right = float(path.x[-ends:].mean() - path.x[:ends].mean()) / side
    down = float(path.y[-ends:].mean() - path.y[:ends].mean()) / side
    growth = float((path.radius[-ends:].mean() / path.radius[:ends].mean()).log())
    if max(abs(right), abs(down)) > 0.09:
        if abs(right) > abs(down):
            return "right" if right > 0 else "left"
        return "down" if down > 0 else "up"
    if abs(growth) > math.log(1.25):
        return "growing" if growth > 0 else "shrinking"
    return "rotating" if abs(turn) > 40 else "still"


def _outline(inside_THW: torch.Tensor, path: _Path) -> tuple[str, float, float]:
    """The shape with the best mean overlap (big frames count more), that overlap, and how far it turns (degrees)."""
    crops = _crops(inside_THW, path)[:, None]
    weight = path.radius**2 / (path.radius**2).sum()
    best = ("none", 0.0, 0.0)
    for shape in SHAPES:
        bank = _templates(shape)[None]
        overlap = torch.minimum(crops, bank).sum(dim=(2, 3)) / torch.maximum(crops, bank).sum(dim=(2, 3))
        score = float(overlap.max(dim=1).values @ weight)
        if score > best[1]:
            best = (shape, score, _turn(overlap.argmax(dim=1) * ANGLE_STEP, PERIODS[shape]))
    return best if best[1] >= UNCLEAR else ("none", best[1], 0.0)


def _turn(angles: torch.Tensor, period: int) -> float:
    """Total turn of a shape that looks the same every `period` degrees: each step is the shortest that fits."""
    if not period:
        return 0.0
    steps = angles.diff()
    return float((steps - period * (steps / period).round()).sum())


def _crops(inside_THW: torch.Tensor, path: _Path) -> torch.Tensor:
    """(T, CROP, CROP): each frame's shape, moved to the middle and scaled to the same area."""
    _, height, width = inside_THW.shape
    x, y = (path.x[:, None, None], path.y[:, None, None])
    grid_y, grid_x = _window()
    radius = path.radius[:, None, None]
    where = torch.stack([(x + grid_x * radius) / width, (y + grid_y * radius) / height], dim=-1) * 2 - 1
    return F.grid_sample(inside_THW[:, None], where, align_corners=False)[:, 0]


def _window() -> tuple[torch.Tensor, torch.Tensor]:
    line = ((torch.arange(CROP) + 0.5) / CROP * 2 - 1) * REACH
    grid_y, grid_x = torch.meshgrid(line, line, indexing="ij")
    return grid_y, grid_x


@cache
def _templates(shape: str) -> torch.Tensor:
    """(angles, CROP, CROP): the shape with the area of a circle of radius 1, at every angle that looks different."""
    grid_y, grid_x = _window()
    cell = (2 * REACH / CROP) ** 2
    zero = torch.zeros(1, 1)
    area = coverage(shape, grid_x, grid_y, zero + 1, zero, pixel=0.1).sum() * cell
    radius = (math.pi / area).sqrt().view(1, 1)
    angles = torch.arange(0, PERIODS[shape] or 1, ANGLE_STEP)
    return torch.stack([coverage(shape, grid_x, grid_y, radius, torch.deg2rad(a.view(1, 1)), 0.12) for a in angles])
