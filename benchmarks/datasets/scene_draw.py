"""Pictures of scenes: polygons on textured backgrounds, with jitter, blur and noise, in a millisecond."""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scene_facts import Group, Scene, pick

Point = tuple[float, float]
Polygon = list[Point]

RGB = {
    "red": (214, 36, 40),
    "orange": (246, 136, 20),
    "yellow": (248, 218, 40),
    "green": (34, 150, 60),
    "blue": (36, 84, 210),
    "purple": (130, 50, 168),
    "pink": (248, 134, 190),
    "white": (246, 246, 244),
    "black": (28, 28, 30),
}
# (top colour, bottom colour) of each background
GRADIENTS = {
    "grass": ((118, 178, 82), (84, 142, 56)),
    "sky": ((112, 176, 236), (186, 218, 246)),
    "sand": ((232, 210, 160), (210, 182, 124)),
    "night": ((14, 18, 48), (38, 42, 84)),
    "snow": ((206, 216, 230), (226, 232, 240)),
    "water": ((36, 112, 168), (64, 150, 190)),
    "wall": ((158, 84, 66), (142, 74, 58)),
    "plain": ((150, 150, 152), (136, 136, 138)),
}
OVERSAMPLE = 2  # shapes are drawn at twice the size and halved: smooth edges


UP = -math.pi / 2


def _regular(corners: int, radius: float = 1.0, start: float = UP, centre: Point = (0, 0)) -> Polygon:
    step = 2 * math.pi / corners
    return [
        (centre[0] + radius * math.cos(start + i * step), centre[1] + radius * math.sin(start + i * step))
        for i in range(corners)
    ]


def _star() -> Polygon:
    outer, inner = _regular(5), _regular(5, 0.45, UP + math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> Polygon:
    # The classic parametric heart: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t
    points = []
    for i in range(28):
        t = 2 * math.pi * i / 28
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 15.5))
    return points


def _rectangle(left: float, top: float, right: float, bottom: float) -> Polygon:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _ring() -> Polygon:
    # One outline that goes round outside, crosses over, and comes back inside: the hole shows what is behind.
    outer = _regular(28)
    inner = _regular(28, 0.6)
    return [*outer, outer[0], inner[0], *inner[::-1]]


# Parts in drawing order: (role of the colour, polygon in [-1, 1]²). "body" is the object's own colour.
SHAPES: dict[str, list[tuple[str, Polygon]]] = {
    "circle": [("body", _regular(28))],
    "square": [("body", _rectangle(-0.84, -0.84, 0.84, 0.84))],
    "triangle": [("body", [(0, -0.92), (1, 0.84), (-1, 0.84)])],
    "star": [("body", _star())],
    "heart": [("body", _heart())],
    "cross": [
        (
            "body",
            [
                (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
                (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
            ],
        )
    ],
    "ring": [("body", _ring())],
    "tree": [
        ("wood", _rectangle(-0.16, 0.3, 0.16, 1)),
        ("body", [(0, -1), (0.5, -0.3), (0.3, -0.3), (0.8, 0.45), (-0.8, 0.45), (-0.3, -0.3), (-0.5, -0.3)]),
    ],
    "house": [
        ("body", _rectangle(-0.78, -0.12, 0.78, 0.95)),
        ("roof", [(0, -1), (1, -0.1), (-1, -0.1)]),
        ("wood", _rectangle(-0.2, 0.35, 0.2, 0.95)),
    ],
    "car": [
        (
            "body",
            [
                (-1, 0.45), (-1, -0.02), (-0.62, -0.1), (-0.36, -0.55),
                (0.4, -0.55), (0.7, -0.1), (1, 0), (1, 0.45),
            ],
        ),
        ("glass", [(-0.42, -0.1), (-0.26, -0.42), (0.3, -0.42), (0.48, -0.1)]),
        ("tyre", _regular(14, 0.25, 0, (-0.52, 0.45))),
        ("tyre", _regular(14, 0.25, 0, (0.52, 0.45))),
    ],
    "boat": [
        ("wood", _rectangle(-0.08, -0.9, 0.04, 0.3)),
        ("sail", [(0.06, -0.95), (0.75, 0.16), (0.06, 0.16)]),
        ("body", [(-1, 0.28), (1, 0.28), (0.62, 0.85), (-0.62, 0.85)]),
    ],
}  # fmt: skip
FIXED = {"wood": (112, 74, 44), "glass": (196, 226, 240), "tyre": (40, 40, 42), "sail": (250, 248, 238)}


def render(scene: Scene, size: int, random: Random) -> Image.Image:
    """Draw the scene: PIL RGB [size, size]. The same `random` gives the same picture."""
    canvas = _background(scene.background, size, random)
    canvas = canvas.resize((size * OVERSAMPLE, size * OVERSAMPLE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    at_night = scene.background == "night"
    for group, places in _layout(scene, random):
        jitter = 6 if group.colour in ("white", "black") else 16  # a tint would make these another colour
        body = tuple(_clamp(c + _between(random, -jitter, jitter)) for c in RGB[group.colour])
        for x, y, radius in places:
            _draw_object(draw, group.object, body, (x, y), radius, size * OVERSAMPLE, at_night, random)
    return _spoil(canvas.reduce(OVERSAMPLE), random)


def _between(random: Random, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _clamp(value: float) -> int:
    return max(0, min(255, round(value)))


def _draw_object(
    draw: ImageDraw.ImageDraw,
    name: str,
    body: tuple[int, ...],
    centre: Point,
    radius: float,
    pixels: int,
    at_night: bool,
    random: Random,
) -> None:
    """One object, slightly turned, with an outline that parts it from the background. Lengths in [0, 1]."""
    angle = _between(random, -0.12, 0.12)
    cos, sin = math.cos(angle) * radius * pixels, math.sin(angle) * radius * pixels
    cx, cy = centre[0] * pixels, centre[1] * pixels
    dark = sum(body) < 150 or at_night
    line = tuple(min(255, c + 90) if dark else c // 2 for c in body)
    colours = {"body": body, "roof": tuple(_clamp(c * 0.62 + 14) for c in body), **FIXED}
    width = max(2, round(pixels * 0.009))
    for role, polygon in SHAPES[name]:
        points = [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in polygon]
        draw.polygon(points, fill=colours[role])
        if role in ("body", "roof"):
            if name == "ring":  # not along the seam between its two circles
                half = len(points) // 2
                draw.line([*points[:half]], fill=line, width=width)
                draw.line([*points[half:], points[half]], fill=line, width=width)
            else:
                draw.line([*points, points[0]], fill=line, width=width)


# Where the n objects of a group stand in their cell, as fractions of it, and how large they may get.
_SPREADS: dict[int, list[list[Point]]] = {
    1: [[(0.5, 0.5)]],
    2: [[(0.27, 0.5), (0.73, 0.5)], [(0.5, 0.27), (0.5, 0.73)], [(0.28, 0.3), (0.72, 0.7)]],
    3: [[(0.5, 0.26), (0.25, 0.74), (0.75, 0.74)], [(0.25, 0.27), (0.75, 0.27), (0.5, 0.74)]],
    4: [[(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]],
}
Placed = list[tuple[float, float, float]]  # (x, y, radius) in fractions of the picture


def _layout(scene: Scene, random: Random) -> list[tuple[Group, Placed]]:
    """Places for every object, farthest back first."""
    groups = scene.groups
    if not scene.relation:
        return [(groups[0], _fill_cell(groups[0], (0.5, 0.5), (0.86, 0.86), random))]
    if scene.relation == "inside":
        x, y = _between(random, 0.42, 0.58), _between(random, 0.42, 0.58)
        radius = _between(random, 0.36, 0.42)
        share = 0.44 if groups[1].object == "ring" else 0.52  # a ring has less room inside
        return [(groups[1], [(x, y, radius)]), (groups[0], [(x, y, radius * share)])]
    # Two cells side by side (or one over the other): apart along the relation, about level across it.
    low, high = _between(random, 0.23, 0.27), _between(random, 0.73, 0.77)
    placed = []
    for group, along in zip(groups, (low, high), strict=True):
        across = _between(random, 0.42, 0.58)
        if scene.relation == "left":
            placed.append((group, _fill_cell(group, (along, across), (0.49, 0.66), random)))
        else:
            placed.append((group, _fill_cell(group, (across, along), (0.66, 0.49), random)))
    return placed


def _fill_cell(group: Group, centre: Point, cell: Point, random: Random) -> Placed:
    narrow = min(cell)
    if group.count == 1:
        share = {"small": (0.2, 0.23), "": (0.33, 0.37), "large": (0.46, 0.49)}[group.size]
        radius = narrow * _between(random, *share)
        # In a picture of its own a small object may stand anywhere.
        slack = max(0.0, cell[0] / 2 - radius) if cell[0] > 0.8 else 0.01
        x = centre[0] + _between(random, -slack, slack)
        y = centre[1] + _between(random, -slack, slack)
        return [(x, y, radius)]
    spreads = _SPREADS[group.count]
    if group.count == 2 and cell[0] != cell[1]:
        spreads = spreads[:1] if cell[0] > cell[1] else spreads[1:2]
    points = pick(random, spreads)
    apart = min(
        math.hypot((a[0] - b[0]) * cell[0], (a[1] - b[1]) * cell[1]) for i, a in enumerate(points) for b in points[:i]
    )
    radius = min(apart * 0.46, narrow * 0.28 if group.count > 2 else narrow * 0.33) * _between(random, 0.86, 1)
    jitter = max(0.0, apart / 2 - radius) * 0.8
    return [
        (
            centre[0] + (x - 0.5) * cell[0] + _between(random, -jitter, jitter),
            centre[1] + (y - 0.5) * cell[1] + _between(random, -jitter, jitter),
            radius,
        )
        for x, y in points
    ]


# --- backgrounds and noise: textures are made once per size, then cut out at random places -----------


def _background(name: str, size: int, random: Random) -> Image.Image:
    texture = _texture(name, size)  # [size * 3 / 2, size * 3 / 2, 3] int16, around 0
    top, bottom = GRADIENTS[name]
    tint = _between(random, -10, 10)
    ramp = np.linspace(np.add(top, tint), np.add(bottom, tint), size).astype(np.int16)  # [size, 3]
    x, y = (int(random.random() * size / 2) for _ in range(2))
    pixels = texture[y : y + size, x : x + size] + ramp[:, None, :]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@lru_cache(maxsize=32)
def _texture(name: str, size: int) -> np.ndarray:
    """[3/2 size, 3/2 size, 3] int16 to add to the gradient. RandomState's streams are frozen for good."""
    side = size * 3 // 2
    random = np.random.RandomState(sum(map(ord, name)))
    unit = size / 128
    grain = random.randn(side, side, 1) * 4
    if name == "grass":
        grain = grain + _smooth(random.randn(side, side), 1.2 * unit, 0.4 * unit)[..., None] * 10
    elif name == "sky":
        clouds = _smooth(random.randn(side, side), 9 * unit, 20 * unit)
        grain = grain * 0.3 + np.clip(clouds - 0.5, 0, 1.2)[..., None] * np.array([70, 48, 20])
    elif name == "sand":
        grain = grain * 1.8 + _smooth(random.randn(side, side), 2.5 * unit, 14 * unit)[..., None] * 6
    elif name == "night":
        stars = random.rand(side, side) < 0.004 / unit**2
        grain = grain * 0.5 + stars[..., None] * 150
    elif name == "snow":
        grain = grain * 0.5 + _smooth(random.randn(side, side), 8 * unit, 16 * unit)[..., None] * 7
    elif name == "water":
        grain = grain * 0.4 + _smooth(random.randn(side, side), 1.2 * unit, 9 * unit)[..., None] * 13
    elif name == "wall":
        row = max(6, round(11 * unit))
        y, x = np.mgrid[0:side, 0:side]
        joint = max(1, row // 8)
        x = x + (y // row % 2) * row  # every other row is shifted by half a brick
        mortar = (y % row < joint) | (x % (2 * row) < joint)
        brick = random.randn(side // row + 1, side // (2 * row) + 2)[y // row, x // (2 * row)]
        grain = grain * 0.8 + np.where(mortar, 34, brick * 6)[..., None]
    else:
        grain = grain * 0.4
    return np.broadcast_to(grain, (side, side, 3)).astype(np.int16)


def _smooth(values: np.ndarray, down: float, along: float) -> np.ndarray:
    """Gaussian blur by FFT (wrapping round), standard deviations in pixels, scaled back to unit variance."""
    spectrum = np.fft.rfft2(values)
    fy, fx = np.fft.fftfreq(values.shape[0])[:, None], np.fft.rfftfreq(values.shape[1])[None, :]
    spectrum *= np.exp(-2 * math.pi**2 * ((fy * down) ** 2 + (fx * along) ** 2))
    smooth = np.fft.irfft2(spectrum, s=values.shape)
    return (smooth - smooth.mean()) / smooth.std()


@lru_cache(maxsize=4)
def _noise(size: int) -> np.ndarray:
    return np.random.RandomState(7).randn(size * 3 // 2, size * 3 // 2, 3).astype(np.float32)


def _spoil(image: Image.Image, random: Random) -> Image.Image:
    """What a cheap camera does: now and then a little blur, always some noise and another brightness."""
    if random.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(_between(random, 0.3, 0.9) * image.width / 128))
    gain, offset = _between(random, 0.85, 1.12), _between(random, -8, 8)
    strength = _between(random, 1, 5)
    x, y = (int(random.random() * image.width / 2) for _ in range(2))
    noise = _noise(image.width)[y : y + image.height, x : x + image.width]  # [size, size, 3]
    pixels = np.asarray(image) * np.float32(gain) + (noise * np.float32(strength) + np.float32(offset))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
