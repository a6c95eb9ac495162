"""Simple captions first: which captions of a batch a stage's curriculum shows at a step."""

from __future__ import annotations

import math

import numpy as np

START = 0.2  # share of the captions that the first step shows, at least


class Curriculum:
    """Competence-based curriculum (Platanios et al. 2019, arXiv:1903.09848) over a stage's first `steps` steps.

    A caption's difficulty is its place, from 0 to 1, among all captions by the mean of two ranks: of its length, and of
    how rare its words are (mean of -log relative frequency). A step shows the captions up to the learner's competence,
    which rises with the root of the steps from START to 1, and of every photo at least the simplest.

    ids: int64 [N, C, T] of all training captions as in Batch; eos: ends them and is no word of theirs; unk: stands for
    words that are each as rare as a word can be.
    """

    def __init__(self, ids: np.ndarray, steps: int, *, eos: int, unk: int) -> None:
        self.steps, self.eos = steps, eos
        lines = ids.reshape(-1, ids.shape[-1])
        lines = lines[lines[:, 0] >= 0]
        counts = np.bincount(lines[:, 1:][self._is_word(lines)], minlength=ids.max() + 1).astype(float)
        counts[unk] = 1
        self.rarity = -np.log(np.maximum(counts, 1) / counts.sum())  # [V]
        lengths, rarities = self._measures(lines)
        self.lengths, self.rarities = np.sort(lengths), np.sort(rarities)
        self.both = np.sort(self._ranks(lengths, rarities))

    def competence(self, step: int) -> float:
        """Share of the captions that `step` shows, in [START, 1]."""
        return min(1.0, math.sqrt(step / self.steps * (1 - START**2) + START**2))

    def difficulty(self, ids: np.ndarray) -> np.ndarray:
        """Captions [N, C, T] → [N, C] in (0, 1]; infinite where there is none."""
        lines = ids.reshape(-1, ids.shape[-1])
        of = _rank(self.both, self._ranks(*self._measures(lines)))
        return np.where(lines[:, 0] >= 0, of, np.inf).reshape(ids.shape[:2])

    def show(self, ids: np.ndarray, step: int) -> np.ndarray:
        """Captions [N, C, T] of some photos, with -1 in place of those that are too difficult yet."""
        competence = self.competence(step)
        if competence == 1:
            return ids
        difficulty = self.difficulty(ids)
        simplest = difficulty == difficulty.min(1, keepdims=True)
        return np.where(((difficulty <= competence) | simplest)[:, :, None], ids, -1)

    def _is_word(self, lines: np.ndarray) -> np.ndarray:
        return (lines[:, 1:] >= 0) & (lines[:, 1:] != self.eos)  # [L, T - 1]

    def _measures(self, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Length and mean rarity of captions [L, T]."""
        words = self._is_word(lines)
        lengths = words.sum(1)
        known = np.clip(lines[:, 1:], 0, len(self.rarity) - 1)
        return lengths, (self.rarity[known] * words).sum(1) / np.maximum(lengths, 1)

    def _ranks(self, lengths: np.ndarray, rarities: np.ndarray) -> np.ndarray:
        return (_rank(self.lengths, lengths) + _rank(self.rarities, rarities)) / 2


def _rank(among: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of the sorted numbers `among` that are no larger, less half of those that are equal."""
    below, upto = (np.searchsorted(among, values, side) for side in ("left", "right"))
    return (below + upto) / (2 * len(among))
