"""The demo's world: one coloured shape that moves on a plain background, its words and its pixels; knows no model.

What a prompt leaves out has a fixed meaning: no size is medium, no background is black, no motion is still.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (35, 70, 225),
    "yellow": (245, 220, 40),
    "orange": (250, 132, 20),
    "purple": (130, 40, 180),
    "pink": (250, 130, 192),
    "cyan": (40, 210, 225),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (12, 12, 16), "gray": (120, 120, 128)} | COLOURS
SIZES = {"small": 0.34, "medium": 0.42, "big": 0.5}
"""Diameter of a circle; the other shapes have about its area. In parts of the frame's shorter side."""
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "still", "growing", "shrinking", "rotating")

SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("",), "big": ("big", "large", "huge")}
MOTION_WORDS = {
    "right": (
        "moving right",
        "moving to the right",
        "going right",
        "sliding to the right",
        "moving from left to right",
    ),
    "left": ("moving left", "moving to the left", "going left", "sliding to the left", "moving from right to left"),
    "up": ("moving up", "going up", "rising", "moving upwards", "flying up"),
    "down": ("moving down", "going down", "falling", "moving downwards", "falling down"),
    "still": ("standing still", "staying still", "not moving", "static"),
    "growing": ("growing", "getting bigger", "getting larger", "expanding"),
    "shrinking": ("shrinking", "getting smaller"),
    "rotating": ("rotating", "spinning", "turning around"),
}
TEMPLATES = (
    "{thing} {motion} {on}",
    "{thing} {on} {motion}",
    "{thing} {on}, {motion}",
    "{thing} is {motion} {on}",
    "a video of {thing} {motion} {on}",
    "an animation of {thing} {motion} {on}",
)
UNSAID = 0.3
"""How often a training prompt leaves out what need not be said (black, still)."""

HELD_OUT = 10
"""One of so many combinations of shape, colour, background and motion is never trained on."""
CLOSEST = 130.0
"""Colour and background are at least so far apart in RGB."""


@dataclass(frozen=True)
class Attributes:
    """What a prompt can ask for and the judge can see."""

    shape: str
    colour: str
    background: str
    motion: str


@dataclass(frozen=True)
class Scene(Attributes):
    """One clip. x and y place the path in the room that it leaves in the frame, 0 to 1; travel and turn say how far
    it goes (parts of the frame's shorter side, degrees)."""

    size: str
    diameter: float
    x: float
    y: float
    travel: float
    turn: float


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene, of the combinations that are trained on or of the others."""
    while True:
        size = rng.choice(list(SIZES))
        scene = Scene(
            shape=rng.choice(SHAPES),
            colour=rng.choice(list(COLOURS)),
            background="black" if rng.random() < 0.35 else rng.choice(list(BACKGROUNDS)),
            motion=rng.choice((*MOTIONS, *DIRECTIONS)),
            size=size,
            diameter=SIZES[size] * rng.uniform(0.95, 1.05),
            x=rng.random(),
            y=rng.random(),
            travel=rng.uniform(0.28, 0.4),
            turn=rng.uniform(80, 110),
        )
        if is_visible(scene) and is_held_out(scene) == held_out:
            return scene


def is_visible(wanted: Attributes) -> bool:
    """Colours that can be told apart, and nothing that looks the same as something else (a circle that rotates)."""
    if (wanted.shape, wanted.motion) == ("circle", "rotating"):
        return False
    return math.dist(COLOURS[wanted.colour], BACKGROUNDS[wanted.background]) >= CLOSEST


def is_held_out(wanted: Attributes) -> bool:
    key = " ".join((wanted.shape, wanted.colour, wanted.background, wanted.motion))
    return zlib.crc32(key.encode()) % HELD_OUT == 0


def training_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of an endless list."""
    return sample_scene(random.Random(f"scene {seed} {index}"))


def held_out_prompts(count: int, seed: int = 77) -> list[tuple[str, Scene]]:
    """Prompts of combinations that no training clip shows, everything said; the same list for the same seed.

    Every shape with every motion comes equally often.
    """
    rng = random.Random(f"held out {seed}")
    kinds = [(shape, motion) for shape in SHAPES for motion in MOTIONS if (shape, motion) != ("circle", "rotating")]
    rng.shuffle(kinds)
    prompts = []
    for kind, _ in zip(itertools.cycle(kinds), range(count), strict=False):
        scene = sample_scene(rng, held_out=True)
        while (scene.shape, scene.motion) != kind:
            scene = sample_scene(rng, held_out=True)
        prompts.append((describe(scene, rng, unsaid=0), scene))
    return prompts


def describe(scene: Scene, rng: random.Random, unsaid: float = UNSAID) -> str:
    """One of the many ways to say it."""
    thing = f"{rng.choice(SIZE_WORDS[scene.size])} {scene.colour} {rng.choice(SHAPE_WORDS[scene.shape])}".strip()
    on = rng.choice((f"on a {scene.background} background", f"with a {scene.background} background"))
    motion = rng.choice(MOTION_WORDS[scene.motion])
    if scene.background == "black" and rng.random() < unsaid:
        on = ""
    template = rng.choice(TEMPLATES)
    if scene.motion == "still" and rng.random() < unsaid:
        template, motion = "{thing} {on}", ""
    article = "an" if thing[0] in "aeiou" else "a"
    text = template.format(thing=f"{article} {thing}", motion=motion, on=on)
    text = re.sub(r"\s+", " ", text).replace(" ,", ",").strip(" ,")
    return text + rng.choice(("", "", "", "."))


def parse(prompt: str) -> Attributes:
    """What a prompt in this world's words asks for.

    Raises:
        ValueError: it names no shape or no colour.
    """
    text = prompt.lower()
    behind = re.search(rf"({'|'.join(BACKGROUNDS)}) background", text)
    background = behind[1] if behind else "black"
    text = text.replace(behind[0], "") if behind else text
    return Attributes(
        shape=_find(text, SHAPE_WORDS) or _missing("shape", prompt),
        colour=_find(text, {name: (name,) for name in COLOURS}) or _missing("colour", prompt),
        background=background,
        motion=_find(text, MOTION_WORDS) or "still",
    )


def without_motion(prompt: str) -> str:
    """The prompt as one would ask for a picture: what it says about motion is left out."""
    phrases = sorted(itertools.chain(*MOTION_WORDS.values()), key=len, reverse=True)
    return re.sub(rf",?( is)? ({'|'.join(phrases)})\b", "", prompt, flags=re.IGNORECASE)


def _find(text: str, words: dict[str, tuple[str, ...]]) -> str | None:
    """The name whose longest phrase is in the text."""
    found = [(len(word), name) for name, group in words.items() for word in group if re.search(rf"\b{word}\b", text)]
    return max(found)[1] if found else None


def _missing(what: str, prompt: str) -> str:
    raise ValueError(f"no {what} of this world in {prompt!r}")


def render(scenes: Sequence[Scene], frames: int, height: int, width: int) -> torch.Tensor:
    """(len(scenes), 3, frames, height, width) in [-1, 1]; one frame shows the middle of the motion."""
    inside_BTHW = torch.stack([_coverage(scene, frames, height, width) for scene in scenes])
    colour = _rgb([COLOURS[scene.colour] for scene in scenes])
    background = _rgb([BACKGROUNDS[scene.background] for scene in scenes])
    return background + (colour - background) * inside_BTHW[:, None]


def _rgb(colours: list[tuple[int, int, int]]) -> torch.Tensor:
    return (torch.tensor(colours, dtype=torch.float32) / 127.5 - 1)[:, :, None, None, None]


def _coverage(scene: Scene, frames: int, height: int, width: int) -> torch.Tensor:
    """(frames, height, width): how much of each pixel the shape covers."""
    time = torch.linspace(0, 1, frames) if frames > 1 else torch.tensor([0.5])
    scale, side = _scale(scene, time), min(height, width)
    radius = side * scene.diameter / 2 * scale
    step_x, step_y = DIRECTIONS.get(scene.motion, (0, 0))
    reach = REACH[scene.shape] * float(radius.max()) + 1
    centre_x = _path(scene.x, step_x * scene.travel * side, time, width, reach)
    centre_y = _path(scene.y, step_y * scene.travel * side, time, height, reach)
    grid_y, grid_x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x = grid_x - centre_x[:, None, None]
    y = grid_y - centre_y[:, None, None]
    angle = torch.deg2rad(scene.turn * time) if scene.motion == "rotating" else torch.zeros_like(time)
    return coverage(scene.shape, x, y, radius[:, None, None], angle[:, None, None])


def _scale(scene: Scene, time: torch.Tensor) -> torch.Tensor:
    low, high = 0.55, 1.15
    if scene.motion == "growing":
        return low + (high - low) * time
    if scene.motion == "shrinking":
        return high + (low - high) * time
    return torch.ones_like(time)


def _path(place: float, travel: float, time: torch.Tensor, length: int, reach: float) -> torch.Tensor:
    """Centre along one axis: the whole path, moved to its place in the room that is left."""
    room = length - 2 * reach
    travel = max(-room, min(room, travel))
    start = reach + place * (room - abs(travel)) - min(travel, 0.0)
    return start + travel * time


def _polygon(radii: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Corners at equal angles from the top on, clockwise (y points down)."""
    turns = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return tuple((r * math.sin(turn), -r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True))


POLYGONS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": _polygon((1.45,) * 3),
    "star": _polygon((1.4, 0.62) * 5),
}
"""Corners around (0, 0), for a circle of radius 1."""
REACH = {"circle": 1.0, "square": 1.28, "triangle": 1.45, "star": 1.4}
"""The farthest corner; with it a shape that turns stays in the frame too."""


def coverage(
    shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, angle: torch.Tensor, pixel: float = 1.0
) -> torch.Tensor:
    """How much of the pixel at (x, y) from the shape's centre lies inside it, 0 to 1; the arguments broadcast.

    Exact along straight edges that follow the grid, and close elsewhere: half a pixel of distance is half covered.
    Turned clockwise by angle (radians).
    """
    turned_x = x * angle.cos() + y * angle.sin()
    turned_y = y * angle.cos() - x * angle.sin()
    if shape == "circle":
        distance = torch.hypot(turned_x, turned_y) - radius
    else:
        distance = _polygon_distance(turned_x / radius, turned_y / radius, POLYGONS[shape]) * radius
    return (0.5 - distance / pixel).clamp(0, 1)


def _polygon_distance(x: torch.Tensor, y: torch.Tensor, corners: tuple[tuple[float, float], ...]) -> torch.Tensor:
    """Signed distance to a polygon, negative inside (Inigo Quilez, "2D distance functions": sdPolygon)."""
    nearest = torch.full_like(x, math.inf)
    sign = torch.ones_like(x)
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        edge_x, edge_y = ax - bx, ay - by
        from_x, from_y = x - bx, y - by
        along = ((from_x * edge_x + from_y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
        nearest = torch.minimum(nearest, (from_x - edge_x * along) ** 2 + (from_y - edge_y * along) ** 2)
        below, above = y >= by, y < ay
        left = edge_x * from_y > edge_y * from_x
        crosses = (below & above & left) | ~(below | above | left)
        sign = torch.where(crosses, -sign, sign)
    return sign * nearest.sqrt()


ATTRIBUTES = tuple(field.name for field in fields(Attributes))
