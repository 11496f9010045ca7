"""The world: clips of coloured shapes, and how they look.

A clip is a handful of numbers; it is rendered at any size and at any moments. Lengths are
fractions of the frame's side, times fractions of the clip's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 230, 50),
    "green": (40, 180, 60),
    "blue": (45, 80, 230),
    "purple": (165, 50, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
NUM_BACKGROUNDS = 5
Array = NDArray[np.floating[Any]]
_RADII = (0.145, 0.185)
_TRAVEL = (0.36, 0.6)
_EDGE_PIXELS = 0.6


@dataclass(frozen=True)
class Thing:
    """One coloured shape: where it is at every moment, and from when to when it is seen."""

    colour: str
    shape: str
    radius: float
    motion: str
    start: tuple[float, float]
    end: tuple[float, float]
    appears: float
    disappears: float

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{self.colour} {self.shape}"

    def centre(self, moment: float) -> tuple[float, float]:
        """Returns (x, y) at a moment in [0, 1]."""
        span = self.disappears - self.appears
        way = min(max((moment - self.appears) / span, 0.0), 1.0)
        x = self.start[0] + way * (self.end[0] - self.start[0])
        y = self.start[1] + way * (self.end[1] - self.start[1])
        return x, y

    def seen(self, moment: float) -> bool:
        """Whether the thing is in the picture at a moment in [0, 1]."""
        return self.appears <= moment <= self.disappears


@dataclass(frozen=True)
class Clip:
    """One to three things before a background; `seed` fixes the background and the noise."""

    things: tuple[Thing, ...]
    background: int
    seed: int


def _sample_thing(rng: np.random.Generator, colour: str, shape: str, when: str) -> Thing:
    radius = float(rng.uniform(*_RADII))
    motion = str(rng.choice(list(MOTIONS)))
    direction = MOTIONS[motion]
    travel = float(rng.uniform(*_TRAVEL))
    start, end = [0.0, 0.0], [0.0, 0.0]
    for axis in range(2):
        low, high = radius, 1 - radius
        step = direction[axis] * min(travel, high - low)
        start[axis] = float(rng.uniform(low - min(step, 0.0), high - max(step, 0.0)))
        end[axis] = start[axis] + step
    appears, disappears = 0.0, 1.0
    if when == "appears":
        appears = float(rng.choice([0.31, 0.56]))
    elif when == "disappears":
        disappears = float(rng.choice([0.44, 0.69]))
    return Thing(
        colour,
        shape,
        radius,
        motion,
        (start[0], start[1]),
        (end[0], end[1]),
        appears,
        disappears,
    )


def _collide(a: Thing, b: Thing) -> bool:
    room = (a.radius + b.radius) ** 2
    for moment in np.linspace(0, 1, 15):
        if a.seen(moment) and b.seen(moment):
            (ax, ay), (bx, by) = a.centre(moment), b.centre(moment)
            if (ax - bx) ** 2 + (ay - by) ** 2 < room:
                return True
    return False


def sample_clip(seed: int) -> Clip:
    """Returns the clip of a seed: colours differ, at most corners touch."""
    rng = np.random.default_rng(seed)
    wanted = int(rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4]))
    colours = rng.permutation(list(COLOURS))
    shapes = list(rng.permutation(SHAPES))
    if rng.random() < 0.3:
        shapes[1] = shapes[0]
    # times are rationed, so that what appears first or last is never a tie
    moments = ["stays", "stays", "stays"]
    if rng.random() < 0.65:
        moments = list(rng.permutation(["appears", "disappears", "stays"]))
    things: list[Thing] = []
    for i in range(wanted):
        for _ in range(60):
            thing = _sample_thing(rng, str(colours[i]), str(shapes[i]), moments[i])
            if not any(_collide(thing, other) for other in things):
                things.append(thing)
                break
    return Clip(tuple(things), int(rng.integers(NUM_BACKGROUNDS)), seed)


def _backdrop(clip: Clip, rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    base = rng.uniform(70, 150) + rng.uniform(-12, 12, 3)
    other = base + rng.choice([-1, 1]) * rng.uniform(14, 30)
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size
    if clip.background == 0:
        mix = np.zeros_like(x)
    elif clip.background == 1:
        mix = y
    elif clip.background == 2:
        mix = (np.sin(x * 2 * np.pi * rng.uniform(3, 6)) + 1) / 2
    elif clip.background == 3:
        mix = ((np.floor(x * 6) + np.floor(y * 6)) % 2).astype(float)
    else:
        mix = np.hypot(x - 0.5, y - 0.5)
    picture: NDArray[np.float32] = (base + mix[..., None] * (other - base)).astype(np.float32)
    return picture


def _distance(shape: str, x: Array, y: Array) -> Array:
    """Returns signed distances (unit radius) of points to a shape's outline, inside negative."""
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    x = np.abs(x)
    if shape != "triangle":
        y = np.abs(y)
    if shape == "square":
        return np.maximum(x, y) - 0.83
    if shape == "triangle":
        return np.maximum(0.866 * x - 0.5 * y, y) - 0.55
    upright, lying = np.maximum(x - 0.3, y - 1), np.maximum(y - 0.3, x - 1)
    cross: Array = np.minimum(upright, lying)
    return cross


def masks(clip: Clip, moments: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Returns how much of each pixel each thing covers, (things, T, size, size) in [0, 1]."""
    covered = np.zeros((len(clip.things), len(moments), size, size), np.float32)
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    for i, thing in enumerate(clip.things):
        for t, moment in enumerate(moments):
            if thing.seen(float(moment)):
                cx, cy = thing.centre(float(moment))
                x = ((line - cx) / thing.radius)[None, :]
                y = ((line - cy) / thing.radius)[:, None]
                edge = _distance(thing.shape, x, y) * (thing.radius * size / _EDGE_PIXELS)
                covered[i, t] = np.clip(0.5 - edge, 0, 1)
    return covered


def render(
    clip: Clip,
    moments: NDArray[np.float64],
    size: int,
    covered: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Returns frames (T, size, size, 3) uint8 of a clip at moments in [0, 1].

    Args:
        clip: What to show.
        moments: Times (T,), fractions of the clip's length.
        size: Side in pixels.
        covered: `masks(clip, moments, size)` where it is at hand.
    """
    rng = np.random.default_rng([clip.seed, 1])
    covered = masks(clip, moments, size) if covered is None else covered
    frames = np.repeat(_backdrop(clip, rng, size)[None], len(moments), axis=0)
    for thing, mask in zip(clip.things, covered, strict=True):
        colour = np.array(COLOURS[thing.colour], np.float32) * rng.uniform(0.88, 1.0)
        frames += mask[..., None] * (colour - frames)
    noise = rng.standard_normal((len(moments), size, size, 1), np.float32)
    frames += noise * rng.uniform(2, 9)
    return np.clip(frames, 0, 255).astype(np.uint8)


def sampled_moments(num_frames: int, length: int) -> NDArray[np.float64]:
    """Returns the moments (num_frames,) that PPLLaVA's frame choice takes of a clip.

    seg = (M - 1) / N, index_i = int(seg / 2 + round(seg * i)), as the runtime does it.
    """
    seg = (length - 1) / num_frames
    index = [int(seg / 2 + round(seg * i)) for i in range(num_frames)]
    return np.array(index, np.float64) / (length - 1)
