"""Views of a training photo: as it is, mirrored, and drawn ones that show a part of it, turned, lighter or darker."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from ..settings import Augment, Recipe

LIGHT = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
SQUEEZE = 0.2  # log of how much a crop's aspect ratio may differ from the photo's
SIDES = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class View:
    """One way to look at the photos: `drawn` numbers the varied ones from 1, 0 is the whole photo as it is."""

    drawn: int = 0
    mirrored: bool = False

    def __str__(self) -> str:
        drawn = f", varied {self.drawn}" if self.drawn else ""
        return f"{drawn}{', mirrored' if self.mirrored else ''}"


PLAIN = View()


def views_of(recipe: Recipe) -> tuple[View, ...]:
    """The views of a recipe's training photos: each photo draws one of them, anew in every epoch."""
    plain = (PLAIN, View(mirrored=True)) if recipe.data.flip else (PLAIN,)
    drawn = range(1, recipe.augment.views + 1)
    return (*plain, *(View(number, recipe.data.flip and number % 2 == 0) for number in drawn))


def view_key(view: View, augment: Augment, seed: int) -> dict[str, Any]:
    """What a view's pixels depend on besides the photo, for the cache."""
    if not view.drawn:
        return {"flip": view.mirrored}
    how = {key: value for key, value in asdict(augment).items() if key not in ("views", "sides")}
    return {"flip": view.mirrored, "drawn": view.drawn, "seed": seed, **how}


def vary(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """Draw a view of an RGB photo: turned, then a part of it, then its light changed. The photo itself stays."""
    width, height = image.size
    if augment.rotate:
        fill = tuple(int(channel) for channel in np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0])
        angle = rng.uniform(-augment.rotate, augment.rotate)
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill)
    if augment.crop < 1:
        area = rng.uniform(augment.crop, 1.0) * width * height
        aspect = math.exp(rng.uniform(-SQUEEZE, SQUEEZE)) * width / height
        part = (min(width, round(math.sqrt(area * aspect))), min(height, round(math.sqrt(area / aspect))))
        part = (max(1, part[0]), max(1, part[1]))
        left, top = rng.integers(0, width - part[0] + 1), rng.integers(0, height - part[1] + 1)
        image = image.crop((left, top, left + part[0], top + part[1]))
    if augment.color_jitter:
        for enhance in LIGHT:
            image = enhance(image).enhance(rng.uniform(1 - augment.color_jitter, 1 + augment.color_jitter))
    return image


def mirrored_text(text: str) -> str:
    """A caption (in `caption_text` form) of the mirrored photo."""
    return " ".join(SIDES.get(word, word) for word in text.split())


def names_a_side(text: str) -> bool:
    return not SIDES.keys().isdisjoint(text.split())
