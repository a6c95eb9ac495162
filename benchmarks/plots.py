"""Where things lie in the report's plot: latency against CIDEr, as plain numbers that a template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LETTER = 6.6  # px: the mean width of a label's letter at 12 px
LINE = 15  # px: a label's height


@dataclass(frozen=True)
class Point:
    """One subject. x: s; y: a score; low, high: its interval; size: bytes, None where unknown; peer: not ours."""

    name: str
    x: float
    y: float
    low: float
    high: float
    size: float | None
    peer: bool


def pareto(
    points: Sequence[Point], labels: Sequence[str], *, width: int, height: int, largest: float
) -> dict[str, Any]:
    """Ticks, dots (area by size, `largest` px the greatest radius), labels that do not overlap, and the frontier:
    through the points that no other beats in both. x is logarithmic where it spans more than a factor of 4.
    """
    left, right, top, bottom = 46, width - 14, 14, height - 40
    milliseconds = [point.x * 1e3 for point in points]
    x_scale = _logarithmic(milliseconds) if max(milliseconds) > 4 * min(milliseconds) else _linear(milliseconds, 0.15)
    y_scale = _linear([bound for point in points for bound in (point.low, point.high)], 0.06, low=0.0)

    def place(scale: _Scale, value: float, start: float, stop: float) -> float:
        return round(start + scale.share(value) * (stop - start), 1)

    greatest = max((point.size or 0 for point in points), default=0)
    dots = []
    for point, label in zip(points, labels, strict=True):
        area = (point.size or 0) / greatest if greatest else 0.0
        dots.append(
            {
                "label": label,
                "peer": point.peer,
                "x": place(x_scale, point.x * 1e3, left, right),
                "y": place(y_scale, point.y, bottom, top),
                "low": place(y_scale, point.low, bottom, top),
                "high": place(y_scale, point.high, bottom, top),
                "r": round(max(4.0, largest * math.sqrt(area)), 1),
                "title": f"{point.name}: {point.x * 1e3:.3g} ms, CIDEr {point.y:.3f}",
            }
        )
    _label(dots, (left, right, top, bottom))
    best = frontier(points)
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "x_ticks": [{"at": place(x_scale, t, left, right), "text": f"{t:,.6g}"} for t in x_scale.ticks],
        "y_ticks": [{"at": place(y_scale, t, bottom, top), "text": f"{t:.2f}"} for t in y_scale.ticks],
        "dots": sorted(dots, key=lambda dot: -dot["r"]),  # small ones on top
        "frontier": [(dots[i]["x"], dots[i]["y"]) for i in best] if len(best) > 1 else [],
        "logarithmic": x_scale.logarithmic,
    }


def frontier(points: Sequence[Point]) -> list[int]:
    """The positions of points that none is both faster and better than, from the fastest on."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i].x, -points[i].y)):
        if not found or points[i].y > points[found[-1]].y:
            found.append(i)
    return found


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between both ends, 0 to 1."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        return ((math.log(value) if self.logarithmic else value) - low) / (high - low)


def _linear(values: Sequence[float], margin: float, low: float | None = None) -> _Scale:
    """Ticks at round numbers, about five; low: an end that is never passed."""
    least, most = min(values), max(values)
    room = (most - least or abs(most) or 1.0) * margin
    least, most = least - room, most + room
    if low is not None:
        least = max(low, least)
    rough = (most - least) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first = math.ceil(least / step - 1e-9)
    ticks = tuple(round(k * step, 12) for k in range(first, math.floor(most / step + 1e-9) + 1))
    return _Scale(least, most, ticks)


def _logarithmic(values: Sequence[float]) -> _Scale:
    least, most = min(values) / 1.35, max(values) * 1.35
    digits = (1, 2, 5) if most / least < 200 else (1,)
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = tuple(d * 10.0**p for p in powers for d in digits if least <= d * 10.0**p <= most)
    return _Scale(least, most, ticks, logarithmic=True)


def _label(dots: list[dict[str, Any]], frame: tuple[float, float, float, float]) -> None:
    """Give every dot a label beside it, where it covers the least of what is there already."""
    left, right, top, bottom = frame
    taken = [(dot["x"] - dot["r"], dot["y"] - dot["r"], dot["x"] + dot["r"], dot["y"] + dot["r"]) for dot in dots]
    for dot in dots:
        wide, gap = len(dot["label"]) * LETTER, dot["r"] + 5
        tries = []
        for side, x in (("start", dot["x"] + gap), ("end", dot["x"] - gap - wide), ("middle", dot["x"] - wide / 2)):
            for y in (0, -gap - 5, gap + 6) if side != "middle" else (-gap - 6, gap + 7, -gap - 22, gap + 23):
                tries.append((x, dot["y"] + y, side))
        # Also beside, further up or down, so that a crowd spreads.
        tries += [(dot["x"] + gap, dot["y"] + k * LINE, "start") for k in (-2, 2, -3, 3)]

        def cost(spot: tuple[float, float, str], wide: float = wide) -> float:
            x, y, _ = spot
            box = (x, y - LINE / 2, x + wide, y + LINE / 2)
            out = max(0, left - box[0]) + max(0, box[2] - right) + max(0, top - box[1]) + max(0, box[3] - bottom)
            return 40 * out + sum(_overlap(box, other) for other in taken)

        x, y, side = min(tries, key=cost)  # the first of equals
        taken.append((x, y - LINE / 2, x + wide, y + LINE / 2))
        anchor = {"start": x, "end": x + wide, "middle": x + wide / 2}[side]
        dot |= {"label_x": round(anchor, 1), "label_y": round(y + 4, 1), "anchor": side}


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0
