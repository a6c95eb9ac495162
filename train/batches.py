"""What a stage learns from: token ids per photo, pixels or cached features, and the order of every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..benchmarks.datasets import Dataset, Example
from ..runtime.errors import EdgecapError
from ..runtime.preprocess import Preprocess
from .cache import cache_key, cached_rows, load_pixels
from .settings import Recipe
from .tokenizer import caption_text, token_ids

Progress = Callable[[str, int, int], None]  # (phase, done, total)
MIRRORED = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Batch:
    """Photos of one optimizer step (or a piece of it): ids [N, C, T] BOS first, -1 behind the end (the rows that
    `Trainer.texts` gives); one of pixels
    uint8 [N, H, W, 3] or features [N, L, dim]; photos: their places in the split; teacher: its features of them."""

    ids: Tensor
    photos: np.ndarray
    pixels: Tensor | None = None
    features: Tensor | None = None
    teacher: Tensor | None = None

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
        return {"pixels": self.pixels} if self.features is None else {"features": self.features}

    def to(self, device: torch.device) -> Batch:
        parts = (self.ids, self.pixels, self.features, self.teacher)
        ids, *views = [None if part is None else part.to(device) for part in parts]
        return Batch(ids, self.photos, *views)


def encode_captions(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    captions: int,
    ids: Mapping[str, int] = MappingProxyType({}),
    mirrored: bool = False,
) -> np.ndarray:
    """int64 [N, C, max_length + 2]: BOS, words, EOS, then -1; photos with fewer captions have rows of -1 behind.

    ids: the special ids of a pretrained tokenizer.
    """
    special = token_ids(tokenizer, ids)
    rows = np.full((len(examples), captions, max_length + 2), -1, np.int64)
    for row, example in enumerate(examples):
        for slot, caption in enumerate(example.captions[:captions]):
            text = caption_text(caption)
            if mirrored:
                text = " ".join(MIRRORED.get(word, word) for word in text.split())
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
        self.identity = {
            "data": data.fingerprint,
            "split": split,
            "limit": limit,
            "preprocess": preprocess.to_dict(),
        }

    def __len__(self) -> int:
        return len(self.examples)

    def pixels(self, *, flip: bool, progress: Progress) -> np.ndarray:
        """uint8 [N, H, W, 3], memory-mapped."""
        key = cache_key(kind="pixels", flip=flip, **self.identity)
        return cached_rows(
            key,
            len(self),
            (*self.preprocess.size, 3),
            np.uint8,
            lambda part: self._load(part, flip),
            report=lambda done: progress(self._phase("photos", flip), done, len(self)),
        )

    def _load(self, part: slice, flip: bool) -> np.ndarray:
        try:
            return load_pixels(self.examples[part], self.preprocess, flip=flip)
        except EdgecapError as error:
            raise EdgecapError(
                f"{error.message}; edgecap data {self.spec} --verify lists all such photos, --skip-bad leaves them out"
            ) from error

    def features(self, encoder: torch.nn.Module, encoder_hash: str, *, flip: bool, progress: Progress) -> np.ndarray:
        """The frozen encoder's grid, float16 [N, L, dim], memory-mapped."""
        encoder.eval()
        device = next(encoder.parameters()).device

        @torch.inference_mode()
        def compute(part: slice) -> np.ndarray:
            pixels = torch.from_numpy(self._load(part, flip)).to(device)
            return encoder(pixels).half().cpu().numpy()

        shape = tuple(compute(slice(0, 1)).shape[1:])
        key = cache_key(kind="features", flip=flip, encoder=encoder_hash, **self.identity)
        report = lambda done: progress(self._phase("features", flip), done, len(self))  # noqa: E731
        return cached_rows(key, len(self), shape, np.float16, compute, report=report)

    def _phase(self, what: str, flip: bool) -> str:
        return f"{what} of {self.split}{', mirrored' if flip else ''}"


class EpochPlan:
    """The order of photos in an epoch, a function of (seed, stage, epoch) alone, so that any epoch can be replayed."""

    def __init__(self, photos: int, batch_size: int, seed: tuple[int, ...], *, flip: bool) -> None:
        self.photos, self.batch_size, self.seed, self.flip = photos, batch_size, seed, flip
        self.batches = max(1, -(-photos // batch_size))

    def epoch(self, number: int) -> Iterator[tuple[np.ndarray, bool]]:
        """(places in the split [batch], mirrored?) for each optimizer step."""
        rng = np.random.default_rng([*self.seed, number])
        order = rng.permutation(self.photos)
        mirrored = rng.random(self.batches) < 0.5
        for step in range(self.batches):
            # Sorted places read the memory map in order.
            yield (
                np.sort(order[step * self.batch_size : (step + 1) * self.batch_size]),
                bool(self.flip and mirrored[step]),
            )
