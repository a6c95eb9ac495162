"""ROUGE-L (Lin 2004) with pycocoevalcap's beta of 1.2: best precision and best recall over the references."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from .cider import Tokens

BETA = 1.2


def lcs_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence; a row of the table is the bits of one integer (Hyyrö 2004)."""
    positions: dict[Hashable, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for token in b:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """ROUGE-L (0 to 1) of each candidate, float64 [photos]; the mean is the corpus' figure.

    An empty caption counts as one empty token, as in pycocoevalcap, so it only matches an empty reference.
    """
    scores = np.zeros(len(candidates))
    for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
        tokens = candidate or [""]
        common = [(lcs_length(tokens, ref or [""]), len(ref) or 1) for ref in refs]
        precision = max(lcs for lcs, _ in common) / len(tokens)
        recall = max(lcs / size for lcs, size in common)
        if precision:
            scores[i] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return scores
