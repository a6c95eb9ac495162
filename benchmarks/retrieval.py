"""Retrieval both ways: does a photo find a caption of its own among the first k, and a caption its photo?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.errors import UsageError

KS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
ROWS = 256  # of similarities held at a time
ROUNDS = 1000  # of the bootstrap


@dataclass(frozen=True)
class RetrievalScores:
    """Ranks from 0 of what was looked for, and what follows from them.

    photo_ranks [photos]: of the best own caption among all captions; text_ranks [captions]: of the own photo among all
    photos; owners [captions]: each caption's photo.
    """

    photo_ranks: np.ndarray
    text_ranks: np.ndarray
    owners: np.ndarray

    def recall(self, way: str, k: int) -> float:
        """Share of photos ("image_to_text") or captions ("text_to_image") that find their own among the first k."""
        return float((self._ranks(way) < k).mean())

    def chance(self, way: str, k: int) -> float:
        """The recall that a random order gives: k / photos, or that at least one of a photo's own captions is among
        k drawn without replacement (hypergeometric), averaged over photos."""
        counts = np.bincount(self.owners, minlength=len(self.photo_ranks))
        if way == "text_to_image":
            return min(1.0, k / len(counts))
        others = len(self.owners) - counts  # [photos]
        draws = np.arange(min(k, len(self.owners)))[:, None]
        none = np.prod(np.clip(others - draws, 0, None) / (len(self.owners) - draws), axis=0)
        return float(1 - none.mean())

    def mean_recall(self) -> float:
        """The mean of the six recalls: both ways, k = 1, 5, 10."""
        return float(np.mean([self.recall(way, k) for way in WAYS for k in KS]))

    def interval(self, way: str, k: int, *, seed: int = 0) -> tuple[float, float]:
        """95% bootstrap interval of the recall over photos: a photo's captions are drawn together, for they are not
        independent of each other."""
        hits = (self._ranks(way) < k).astype(float)
        sizes = np.ones(len(self.photo_ranks))
        if way == "text_to_image":
            hits, sizes = np.bincount(self.owners, weights=hits), np.bincount(self.owners).astype(float)
        random = np.random.default_rng(seed)
        means = np.empty(ROUNDS)
        for i in range(ROUNDS):
            drawn = random.integers(0, len(sizes), len(sizes))
            means[i] = hits[drawn].sum() / sizes[drawn].sum()
        low, high = np.quantile(means, (0.025, 0.975))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Each way: median rank (from 1), and recall@k with its interval and chance level."""
        figures: dict[str, Any] = {"photos": len(self.photo_ranks), "captions": len(self.text_ranks)}
        for way in WAYS:
            rows: dict[str, Any] = {"median_rank": float(np.median(self._ranks(way) + 1))}
            for k in KS:
                low, high = self.interval(way, k)
                rows[f"recall_{k}"] = {
                    "value": self.recall(way, k), "low": low, "high": high, "chance": self.chance(way, k),
                }  # fmt: skip
            figures[way] = rows
        return figures | {"mean_recall": self.mean_recall()}

    def _ranks(self, way: str) -> np.ndarray:
        return {"image_to_text": self.photo_ranks, "text_to_image": self.text_ranks}[way]


def score_retrieval(photos: np.ndarray, texts: np.ndarray, owners: np.ndarray) -> RetrievalScores:
    """Rank by dot product: photos [P, D], texts [C, D], owners int [C] (the photo each text belongs to).

    Ties count against the own one, so that equal embeddings find nothing. Raises UsageError where a photo has no
    caption or an embedding is not finite.
    """
    owners = np.asarray(owners)
    if len(owners) != len(texts) or len(np.unique(owners)) != len(photos):
        raise UsageError("retrieval needs a caption for every photo, and a photo for every caption")
    if not (np.isfinite(photos).all() and np.isfinite(texts).all()):
        raise UsageError("retrieval: the embeddings are not finite: the training has diverged, lower its rate")
    photo_ranks, text_ranks = np.empty(len(photos), np.int64), np.empty(len(texts), np.int64)
    for start in range(0, len(photos), ROWS):
        part = np.arange(start, min(start + ROWS, len(photos)))
        scores = photos[part] @ texts.T  # [rows, C]
        own = owners[None, :] == part[:, None]
        best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
        photo_ranks[part] = ((scores >= best) & ~own).sum(axis=1)
    for start in range(0, len(texts), ROWS):
        part = slice(start, start + ROWS)
        scores = texts[part] @ photos.T  # [rows, P]
        own = np.take_along_axis(scores, owners[part, None], axis=1)
        text_ranks[part] = (scores >= own).sum(axis=1) - 1
    return RetrievalScores(photo_ranks, text_ranks, owners)
