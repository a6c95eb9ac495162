"""Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002), with pycocoevalcap's closest reference length and smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from .cider import N, Tokens, ngram_counts

# pycocoevalcap's constants: they only keep an empty corpus from dividing by zero.
TINY, SMALL = 1e-15, 1e-9


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, ...]:
    """BLEU-1..4 (0 to 1) of the corpus. The brevity penalty's reference length is, per photo, the length closest to the
    candidate's (the shorter one when two are as close)."""
    matched, possible = [0] * (N + 1), [0] * (N + 1)
    length = reference_length = 0
    for candidate, refs in zip(candidates, references, strict=True):
        size = len(candidate)
        length += size
        reference_length += min((abs(len(ref) - size), len(ref)) for ref in refs)[1]
        ceiling: dict[tuple, int] = {}  # most times an n-gram occurs in one reference
        for ref in refs:
            for gram, count in ngram_counts(ref).items():
                if count > ceiling.get(gram, 0):
                    ceiling[gram] = count
        for gram, count in ngram_counts(candidate).items():
            possible[len(gram)] += count
            matched[len(gram)] += min(count, ceiling.get(gram, 0))

    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(1, N + 1):
        product *= (matched[n] + TINY) / (possible[n] + SMALL)
        scores.append(brevity * product ** (1 / n))
    return tuple(scores)
