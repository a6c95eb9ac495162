"""A photo → the square frames that a SmolVLM's vision graph takes: as a whole, or in tiles with an overview.

What Idefics3's and SmolVLM's image processors of transformers do (their Pillow versions, value for value), in Pillow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from .errors import EdgecapError, UsageError
from .preprocess import MAX_PIXELS, MAX_SIDE, load_image

if TYPE_CHECKING:
    from .preprocess import ImageSource
    from .session import Pixels

MAX_EDGE = 4096  # pixels of a side after the first resize, whatever longest_edge says; as in transformers
RESAMPLE = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class Frames(NamedTuple):
    """One photo as the vision graph takes it.

    pixels: uint8 [F, S, S, 3], RGB. rows, columns: of the tiles, which come row by row and then the whole photo as an
    overview (F = rows · columns + 1); 0, 0 where the photo is one frame (F = 1).
    """

    pixels: Pixels
    rows: int
    columns: int


@dataclass(frozen=True)
class Framing:
    """How photos become frames, and what the vision graph makes of each.

    side: S, pixels a side of a frame: at most `native`, and a multiple of patch · scale, or native itself.
    native: pixels a side of what the model learnt; patch: pixels a side of a patch; scale: patches a side that become
    one embedding.
    longest_edge: the photo's longer side is first brought to so many pixels (at most MAX_EDGE), up or down; 0: it is
    not, so that an unsplit photo is resampled once, and small photos make few tiles.
    split: cut into tiles of S where the photo is then larger than one; otherwise squashed to S × S.
    resample: Pillow's "lanczos", "bicubic" or "bilinear". UsageError for other values.
    """

    side: int
    native: int
    patch: int
    scale: int
    longest_edge: int = 0
    split: bool = False
    resample: str = "lanczos"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("native", 1, MAX_SIDE),
            ("patch", 1, MAX_SIDE),
            ("scale", 1, MAX_SIDE),
            ("side", 1, MAX_SIDE),
            ("longest_edge", 0, 2**16),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"framing {name} must be a whole number from {low} to {high}, not {value!r:.40}")
        if type(self.split) is not bool:
            raise UsageError(f"framing split must be true or false, not {self.split!r:.40}")
        if not isinstance(self.resample, str) or self.resample not in RESAMPLE:
            raise UsageError(f"framing resample must be one of {', '.join(RESAMPLE)}, not {self.resample!r:.40}")
        step = self.patch * self.scale
        if self.native < step or self.native // self.patch % self.scale:
            raise UsageError(f"framing native must be whole groups of {self.scale} patches of {self.patch} px")
        if self.side > self.native or (self.side % step and self.side != self.native):
            raise UsageError(f"this model sees photos of {self._sides()}, not {self.side}")

    def _sides(self) -> str:
        step = self.patch * self.scale
        largest = self.native // step * step
        near = min(max(round(self.side / step), 1) * step, largest)
        exact = f" or {self.native}" if largest < self.native else ""
        return f"a multiple of {step} px up to {largest}{exact} (the nearest: {near})"

    @property
    def tokens(self) -> int:
        """Embeddings that each frame becomes."""
        return (self.side // self.patch // self.scale) ** 2

    @property
    def most(self) -> int | None:
        """Tiles a side that a photo can have: 0 where none is split, None where its own size decides."""
        if not self.split or not self.longest_edge:
            return None if self.split else 0
        edge = min(
            self.longest_edge + self.longest_edge % 2, MAX_EDGE
        )  # the shorter side is made even, and may be 1 more
        count = -(-edge // self.side)
        return count if count > 1 else 0

    def at(self, side: int, *, split: bool = False) -> Framing:
        """The same for frames of another size: fewer embeddings for less time. UsageError for what does not fit.

        Unsplit that is a processor with max_image_size = side and do_image_splitting = False.
        """
        return dataclasses.replace(self, side=side, split=split)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of the tiles of a photo of that size, (0, 0) where it is one frame."""
        if not self.split:
            return 0, 0
        wide, high = self._sizes(width, height)[-1]
        return (0, 0) if wide == high == self.side else (high // self.side, wide // self.side)

    def load(self, source: ImageSource, *, name: str | None = None) -> Frames:
        """Open a photo (see `load_image`) and cut it.

        A large JPEG is decoded at a fraction of its size, at least twice the frame's, where it is resampled once (no
        longest_edge, no split).
        """
        once = not (self.longest_edge or self.split)
        return self(load_image(source, name=name, target=(self.side, self.side) if once else None))

    def __call__(self, image: Image.Image) -> Frames:
        """RGB image of any size, upright → its frames. EdgecapError where it is empty, or far too long to be cut."""
        if image.mode != "RGB":
            raise UsageError(f"frames are cut from an RGB image, not {image.mode}: open it with load_image")
        rows, columns = self.grid(*image.size)
        for size in self._sizes(*image.size):
            image = self._resized(image, size)
        if not rows:
            return Frames(np.asarray(image)[None], 0, 0)
        side = self.side
        overview = np.asarray(self._resized(image, (side, side)))
        cells = np.asarray(image).reshape(rows, side, columns, side, 3).swapaxes(1, 2)  # [rows, columns, S, S, 3]
        return Frames(np.concatenate((cells.reshape(-1, side, side, 3), overview[None])), rows, columns)

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image if image.size == size else image.resize(size, RESAMPLE[self.resample])

    def _sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """The (width, height) that a photo is given one after the other; the last is what is cut, or the frame."""
        if not width or not height:
            raise EdgecapError(f"a photo of {width}×{height} pixels has nothing to see")
        sizes = []
        if self.longest_edge:
            width, height = _to_edge(width, height, self.longest_edge)
            sizes.append((width, height))
        if not self.split:
            return [*sizes, (self.side, self.side)]
        width, height = _to_tiles(width, height, self.side)
        if width * height > MAX_PIXELS:
            raise EdgecapError(
                f"a photo of {width}×{height} pixels in tiles, more than {MAX_PIXELS:,}; make it smaller first"
            )
        return [*sizes, (width, height)]

    def to_dict(self) -> dict[str, Any]:
        """As written in bundle.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Framing:
        """From bundle.json; names that a later edgecap may add are left aside. UsageError for what is none."""
        if not isinstance(values, Mapping):
            raise UsageError("framing must be an object")
        for name in ("side", "native", "patch", "scale"):
            if name not in values:
                raise UsageError(f"framing {name} is missing")
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    @classmethod
    def from_processor(cls, config: Mapping[str, Any], *, native: int, patch: int, scale: int) -> Framing:
        """From a model's preprocessor_config.json (an Idefics3ImageProcessor or SmolVLMImageProcessor) and the sizes in
        its config.json: vision_config.image_size, vision_config.patch_size and scale_factor.

        What the file leaves out is as in transformers. UsageError for what no published one asks for.
        """
        filters = {int(value): name for name, value in RESAMPLE.items()}
        resample = config.get("resample")
        resample = 1 if resample is None else resample
        if not isinstance(resample, int) or resample not in filters:
            raise UsageError(f"image processor: resample {resample!r:.40} is none of {', '.join(RESAMPLE)}")
        resize = config.get("do_resize", True)
        return cls(
            side=_edge(config, "max_image_size", 364),
            native=native,
            patch=patch,
            scale=scale,
            longest_edge=_edge(config, "size", 4 * 364) if resize else 0,
            split=bool(config.get("do_image_splitting", True)),
            resample=filters[resample],
        )


def _edge(config: Mapping[str, Any], name: str, usual: int) -> int:
    found = config.get(name, {"longest_edge": usual})
    edge = found.get("longest_edge") if isinstance(found, Mapping) else None
    if type(edge) is not int or edge < 1:
        raise UsageError(f"image processor: {name} has no longest_edge: {found!r:.80}")
    return edge


def _to_edge(width: int, height: int, longest: int) -> tuple[int, int]:
    """The longer side brought to `longest`, the other one in proportion, made even; both at most MAX_EDGE.

    In floats that are cut off, as in transformers: 1 px more or less is another photo.
    """
    ratio = width / height
    wide = width >= height
    short = int(longest / ratio) if wide else int(longest * ratio)
    short = max(short + short % 2, 1)
    width, height = (longest, short) if wide else (short, longest)
    if max(width, height) > MAX_EDGE:
        ratio = width / height
        wide = width >= height
        short = max(int(MAX_EDGE / ratio) if wide else int(MAX_EDGE * ratio), 1)
        width, height = (MAX_EDGE, short) if wide else (short, MAX_EDGE)
    return width, height


def _to_tiles(width: int, height: int, side: int) -> tuple[int, int]:
    """The longer side up to whole tiles, the other one in proportion and then up to whole tiles, too."""
    ratio = width / height
    wide = width >= height
    longer = -(-max(width, height) // side) * side
    short = int(longer / ratio) if wide else int(longer * ratio)
    short = max(-(-short // side), 1) * side
    return (longer, short) if wide else (short, longer)
