"""What a stage learns from: token ids per photo, pixels or cached features, and the order of every epoch."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from ...benchmarks.datasets import Dataset, Example
from ...runtime.errors import EdgecapError
from ...runtime.preprocess import Preprocess
from ...runtime.progress import Progress
from ..settings import Recipe
from ..state import digest, model_tensors
from ..tokenizer import caption_text, token_ids
from .augment import PLAIN, View, mirrored_text, names_a_side, vary, view_key
from .cache import CHUNK, cache_key, cached_rows, load_pixels, photos_digest, whole_rows
from .features import FeatureExtractor, can_quicken

MANY = 512  # photos of a split for which a faster engine is worth its loading
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """Photos of one optimizer step (or a piece of it): ids [N, C, T] BOS first, -1 behind the end (the rows that
    `Material.texts` gives); one of pixels uint8 [N, H, W, 3], features [N, L, dim] and trunk (what the encoder's frozen
    lower blocks give); photos: their places in the split; mirrored: bool [N] or None; teacher: its features of them;
    teacher_ids and teacher_logp: what teachers say of the captions, see `TeacherTopK.of`."""

    ids: Tensor
    photos: np.ndarray
    pixels: Tensor | None = None
    features: Tensor | None = None
    teacher: Tensor | None = None
    trunk: Tensor | None = None
    mirrored: np.ndarray | None = None
    teacher_ids: Tensor | None = None
    teacher_logp: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """Teacher-forcing input [N, C, T - 1]."""
        return self.ids[:, :, :-1].clamp(min=0)

    @property
    def keep(self) -> Tensor:
        """Where a target exists [N, C, T - 1]."""
        return self.ids[:, :, 1:] >= 0

    @property
    def targets(self) -> Tensor:
        """The target ids at `keep`: [K]."""
        return self.ids[:, :, 1:][self.keep]

    @property
    def view(self) -> dict[str, Tensor]:
        """The photos as the model takes them."""
        ways = {"pixels": self.pixels, "features": self.features, "trunk": self.trunk}
        return {name: tensor for name, tensor in ways.items() if tensor is not None}

    def to(self, device: torch.device) -> Batch:
        parts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        moved = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
        return dataclasses.replace(self, **moved)


def encode_captions(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    captions: int,
    ids: Mapping[str, int] = MappingProxyType({}),
    mirrored: bool = False,
    sides: str = "swap",
) -> np.ndarray:
    """int64 [N, C, max_length + 2]: BOS, words, EOS, then -1; photos with fewer captions have rows of -1 behind.

    ids: the special ids of a pretrained tokenizer. mirrored: of mirrored photos, whose captions have "left" and "right"
    swapped; where `sides` is "drop" those that say so are left out, unless the photo has no others.
    """
    special = token_ids(tokenizer, ids)
    rows = np.full((len(examples), captions, max_length + 2), -1, np.int64)
    for row, example in enumerate(examples):
        texts = [caption_text(caption) for caption in example.captions[:captions]]
        if mirrored and sides == "drop":
            texts = [text for text in texts if not names_a_side(text)] or texts
        for slot, text in enumerate(texts):
            text = mirrored_text(text) if mirrored else text
            words = tokenizer.encode(text, add_special_tokens=False).ids[:max_length]
            line = [special["bos"], *words, special["eos"]]
            rows[row, slot, : len(line)] = line
    return rows


class Photos:
    """One split seen through a recipe's preprocessing; pixels are cached, features too where the encoder is frozen."""

    def __init__(self, data: Dataset, split: str, recipe: Recipe, preprocess: Preprocess, *, limit: int = 0) -> None:
        self.examples = list(data.splits[split])
        if limit and limit < len(self.examples):
            # Spread over the split: data sets are often sorted.
            picks = np.linspace(0, len(self.examples) - 1, limit).round().astype(int)
            self.examples = [self.examples[i] for i in picks]
        self.preprocess, self.split, self.spec = preprocess, split, data.spec
        self.augment, self.seed = recipe.augment, recipe.seed
        self.identity = {
            "data": data.fingerprint,
            "split": split,
            "limit": limit,
            "preprocess": preprocess.to_dict(),
        }

    def __len__(self) -> int:
        return len(self.examples)

    @functools.cached_property
    def content(self) -> str:
        """What the photos are, whatever is said of them, for keys of caches."""
        return photos_digest(self.examples)

    def pixels(self, *, view: View = PLAIN, progress: Progress) -> np.ndarray:
        """uint8 [N, H, W, 3], memory-mapped."""
        report = lambda done: progress(f"photos of {self.split}{view}", done, len(self))  # noqa: E731
        shape = (*self.preprocess.size, 3)
        return cached_rows(
            self._key("pixels", view), len(self), shape, np.uint8, lambda part: self.load(part, view), report=report
        )

    def seen(self, extractor: FeatureExtractor, key: str, *, view: View = PLAIN, progress: Progress) -> np.ndarray:
        """What a frozen encoder, or its frozen lower blocks, gives of the photos: float16 [N, ...], memory-mapped.

        key: names the extractor, with its weights, for the cache. The engine is chosen once for all photos of the
        split, by the first of them as they are, so that a resumed run sees them as it began to.
        """
        report = lambda done: progress(f"features of {self.split}{view}", done, len(self))  # noqa: E731
        if (known := self.known(key, view=view, device=extractor.device)) is not None:
            report(len(self))  # and no engine need be made
            return known
        quick = len(self) >= MANY and extractor.quickens(self.load(slice(0, CHUNK), PLAIN))
        shape = tuple(extractor(self.load(slice(0, 1), view)).shape[1:])
        compute = lambda part: extractor(self.load(part, view), many=quick)  # noqa: E731
        return cached_rows(self._seen_key(key, view, quick), len(self), shape, np.float16, compute, report=report)

    def known(self, key: str, *, view: View = PLAIN, device: torch.device = CPU) -> np.ndarray | None:
        """What `seen` computed for this key before, memory-mapped; None where that is not whole."""
        return whole_rows(self._seen_key(key, view, len(self) >= MANY and can_quicken(device)), len(self))

    def _seen_key(self, key: str, view: View, quick: bool) -> str:
        engine = {"engine": "onnxruntime"} if quick else {}  # torch's keys are those of before
        return self._key("features", view, encoder=key, **engine)

    def shown_in(self, preprocess: Preprocess) -> Photos:
        """The same photos for a model that sees them in another size or form."""
        other = copy.copy(self)
        other.preprocess, other.identity = preprocess, {**self.identity, "preprocess": preprocess.to_dict()}
        return other

    def _key(self, kind: str, view: View, **more: str) -> str:
        return cache_key(kind=kind, **view_key(view, self.augment, self.seed), **more, **self.identity)

    def load(self, part: slice, view: View) -> np.ndarray:
        """Pixels uint8 [n, H, W, 3] of a part of the photos, computed."""

        def drawn(number: int, image: Image.Image) -> Image.Image:
            return vary(image, self.augment, np.random.default_rng([self.seed, view.drawn, part.start + number]))

        try:
            change = drawn if view.drawn else None
            return load_pixels(self.examples[part], self.preprocess, flip=view.mirrored, change=change)
        except EdgecapError as error:
            raise EdgecapError(
                f"{error.message}; edgecap data {self.spec} --verify lists all such photos, --skip-bad leaves them out"
            ) from error


class EpochPlan:
    """The order of photos in an epoch, a function of (seed, stage, epoch) alone, so that any epoch can be replayed.

    views: how many each photo has; in every epoch it is seen in one of them.
    """

    def __init__(self, photos: int, batch_size: int, seed: tuple[int, ...], *, views: int = 1) -> None:
        self.photos, self.batch_size, self.seed, self.views = photos, batch_size, seed, views
        self.batches = max(1, -(-photos // batch_size))

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places in the split [batch], number of the view of each [batch]) for each optimizer step."""
        rng = np.random.default_rng([*self.seed, number])
        order = rng.permutation(self.photos)
        views = rng.integers(0, self.views, self.photos)  # of each place
        for step in range(self.batches):
            # Sorted places read the memory map in order.
            places = np.sort(order[step * self.batch_size : (step + 1) * self.batch_size])
            yield places, views[places]


def encoder_digest(encoder: Any, kind: str, part: torch.nn.Module | None = None) -> str:
    """What the features of an encoder depend on, or what a `part` of it gives."""
    weights = [digest(tensor) for tensor in model_tensors(part or encoder).values()]
    return cache_key(weights=weights, kind=kind, settings=encoder.settings(), read=encoder.read.__name__)
