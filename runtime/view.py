"""How a captioner sees photos: their preprocessing, and the frames they are cut into, as a budget of time allows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import EdgecapError, UsageError
from .preprocess import Preprocess, load_image

if TYPE_CHECKING:
    from .frames import Framing
    from .prompt import Prompt
    from .session import Model, Pixels, Session


@dataclass(frozen=True)
class View:
    """preprocess: photo → pixels. framing and prompt: what these are cut into, and the words for it; None: nothing.
    one_side: the vision graph takes frames of framing.side alone.
    """

    preprocess: Preprocess
    framing: Framing | None = None
    prompt: Prompt | None = None
    one_side: bool = False

    @property
    def stacks(self) -> bool:
        """Whether the pixels of all photos have one shape."""
        return self.preprocess.mode != "keep"

    def load(self, source: Any, *, name: str | None = None) -> Pixels:
        """Open a photo (see `load_image`) → uint8 [H, W, 3].

        Where nothing but one frame is made of it, a large JPEG is decoded at a fraction of its size.
        """
        framing = self.framing
        if self.stacks or framing is None or self.prompt is None:
            return self.preprocess.load(source, name=name)
        once = not (framing.split or framing.longest_edge)
        photo = load_image(source, name=name, target=(framing.side, framing.side) if once else None)
        try:
            self.prompt.segments(*framing.grid(*photo.size))
        except EdgecapError as error:
            where = name or (str(source) if isinstance(source, str | os.PathLike) else "the image")
            raise EdgecapError(f"{where}: {error.message}") from None
        return np.asarray(photo)

    def within(self, side: int | None, tiles: bool | None) -> View:
        """The same with frames of `side` pixels, split into tiles or not; None: as it is, but a smaller side alone
        means no tiles: there would be more of them. UsageError for what the model does not take."""
        if side is None and tiles is None:
            return self
        if self.framing is None or self.prompt is None:
            raise UsageError("this captioner sees photos in one size: leave image_size and tiles out")
        if self.one_side and side not in (None, self.framing.side):
            raise UsageError(f"this captioner sees frames of {self.framing.side} px alone: leave image_size out")
        less = side is not None and side < self.framing.side
        split = (self.framing.split and not less) if tiles is None else tiles
        if split and not self.framing.split and (self.stacks or not self.prompt.tiles):
            raise UsageError("this captioner did not learn photos in tiles: leave tiles out")
        framing = replace(self.framing, side=side or self.framing.side, split=split)
        if (framing.most or 0) > min(self.prompt.most):
            raise UsageError(f"photos would become {framing.most} tiles a side, more than this captioner has words for")
        preprocess = self.preprocess
        if self.stacks:  # squashed to what is then cut
            count = preprocess.size[0] // self.framing.side if split else 1
            preprocess = replace(preprocess, size=(count * framing.side,) * 2)
        return replace(self, preprocess=preprocess, framing=framing)

    def check(self, pixels: Any) -> None:
        """UsageError for what are not this view's photos: one array [N, H, W, 3], or one [H, W, 3] for each."""
        height, width = self.preprocess.size if self.stacks else ("height", "width")
        whole = isinstance(pixels, np.ndarray)
        for photo in [pixels] if whole else pixels:
            good = isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.ndim == 3 + whole
            if not good or photo.shape[-1] != 3 or (self.stacks and photo.shape[-3:-1] != (height, width)):
                found = f"{photo.dtype} {list(photo.shape)}" if isinstance(photo, np.ndarray) else type(photo).__name__
                wanted = f"[photos, {height}, {width}, 3]" if whole else f"[{height}, {width}, 3] each"
                raise UsageError(f"pixels must be uint8 {wanted}, not {found}")

    def alike(self, pixels: Pixels | Sequence[Pixels]) -> list[list[int]]:
        """The photos that can be captioned together: those that are cut into the same tiles."""
        if self.stacks or self.framing is None:
            return [list(range(len(pixels)))] if len(pixels) else []
        groups: dict[tuple[int, int], list[int]] = {}
        for place, photo in enumerate(pixels):
            groups.setdefault(self.framing.grid(photo.shape[1], photo.shape[0]), []).append(place)
        return list(groups.values())

    def session(self, model: Model) -> Session:
        """A new session of a captioner's model that sees photos so."""
        return model.session() if self.framing is None else model.session(self.framing)  # type: ignore[call-arg]


def whole_view(preprocess: Preprocess, manifest: Mapping[str, Any]) -> View:
    """As a bundle says: its preprocessing, and the manifest's "frames", if any."""
    if "frames" not in manifest:
        return View(preprocess)
    from .framed import read_frames

    inputs = manifest.get("graphs", {}).get("encoder", {}).get("inputs", {})
    one_side = any(type(size) is int for tensor in inputs.values() for size in tensor["shape"][1:3])
    return View(preprocess, *read_frames(manifest["frames"]), one_side)
