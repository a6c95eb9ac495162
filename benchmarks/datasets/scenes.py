"""Reader for the built-in data: labelled scenes, drawn on demand from a seed; nothing to download."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, overload

from ...runtime.errors import UsageError
from .base import SPLITS, Dataset, Example
from .scene_captions import draw_captions
from .scene_facts import Scene, draw_scene
from .scene_telegrams import draw_telegrams

USAGE = "scenes[:train=N,val=N,test=N,size=PX,seed=N,style=plain|telegram]"
VERSION = 4  # raise it whenever any picture or caption would come out differently: it is in the fingerprint


@dataclass(frozen=True)
class SceneOptions:
    """Photos per split, side of the square picture in pixels, the seed of everything, and how captions are worded."""

    train: int = 4000
    val: int = 4000  # many, so that the gate can tell a small loss of quality from none
    test: int = 1000
    size: int = 128
    seed: int = 0
    style: str = field(
        default="plain", repr=False
    )  # repr is in the fingerprint, which plain captions had before styles


STYLES = {"plain": ("captions", draw_captions), "telegram": ("telegrams", draw_telegrams)}  # stream, drawer
LIMITS = {
    "train": (1, 10**7),
    "val": (1, 10**7),
    "test": (1, 10**7),
    "size": (32, 1024),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class SceneExample(Example):
    """A scene that is drawn when it is loaded; `scene` holds its true labels."""

    scene: Scene = None  # type: ignore[assignment]  # a default is needed after Example's; always given
    size: int = 128
    seed: int = 0

    def jpeg(self) -> bytes:
        """The picture, size × size, as a JPEG; the same in every process (of one libjpeg)."""
        from .scene_draw import render

        buffer = io.BytesIO()
        picture = render(self.scene, self.size, _random(self.seed, self.id, "pixels"))
        picture.save(buffer, format="JPEG", quality=95, subsampling=0)
        return buffer.getvalue()


class SceneSplit(Sequence[SceneExample]):
    """The examples of one split, each worked out the first time it is asked for."""

    def __init__(self, split: str, count: int, options: SceneOptions) -> None:
        self._split, self._options = split, options
        self._made: list[SceneExample | None] = [None] * count

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, index: int) -> SceneExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[SceneExample]: ...
    def __getitem__(self, index: int | slice) -> SceneExample | list[SceneExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        example = self._made[index]
        if example is None:
            example = self._made[index] = make_example(self._split, index, self._options)
        return example

    def __iter__(self) -> Iterator[SceneExample]:
        return (self[i] for i in range(len(self)))


def make_example(split: str, index: int, options: SceneOptions) -> SceneExample:
    """Example `index` of a split. It depends on seed, split and index alone, not on how many there are."""
    id = f"{split}-{index:05d}"
    scene = draw_scene(_random(options.seed, id, "facts"), split, index)
    stream, draw = STYLES[options.style]
    captions = draw(_random(options.seed, id, stream), scene)
    return SceneExample(id, captions, None, scene, options.size, options.seed)


def _random(seed: int, id: str, stream: str) -> Random:
    # Facts, words and pixels have a stream each: changing how one is drawn leaves the others as they were.
    return Random(f"{seed}/{id}/{stream}")


def open_scenes(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Parse the options; nothing is drawn yet. There is nothing to verify or to skip."""
    options = parse_options(argument)
    splits = {split: SceneSplit(split, getattr(options, split), options) for split in SPLITS}
    style = "" if options.style == "plain" else f" {options.style}"
    fingerprint = hashlib.sha256(f"scenes {VERSION} {options}{style}".encode()).hexdigest()
    return Dataset("scenes", spec, splits, fingerprint)


def parse_options(argument: str) -> SceneOptions:
    """'train=400,size=96' → SceneOptions; UsageError naming the choices."""
    choices = [*(f"{name}=N" for name in LIMITS), f"style={'|'.join(STYLES)}"]
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in argument.split(","))):
        key, equals, text = part.partition("=")
        key = key.strip()
        text = text.strip()
        if key == "style" and text in STYLES:
            values[key] = text
            continue
        if not equals or key not in LIMITS:
            raise UsageError(f"scenes has no option {part!r}: choose from {', '.join(choices)}")
        low, high = LIMITS[key]
        if not text.isdecimal() or not low <= int(text) <= high:
            raise UsageError(f"scenes option {key}={text!r} must be a whole number from {low} to {high}")
        values[key] = int(text)
    return SceneOptions(**values)
