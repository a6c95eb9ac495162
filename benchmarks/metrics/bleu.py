"""Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002), with pycocoevalcap's closest reference length and smoothing; and
the smoothed BLEU-4 of single sentences, to reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, prod

import numpy as np

from .cider import CiderD, N, Tokens, ngram_counts

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
        reference_length += _closest(size, map(len, refs))
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


def sentence_bleu(corpus: CiderD, photos: Iterable[int], candidates: Iterable[Tokens]) -> np.ndarray:
    """BLEU-4 (0 to 1) of each candidate by itself, float64 [candidates], against the references of the photo beside it
    in `photos` (indices into the corpus).

    Smoothed as in Lin & Och 2004 (ORANGE, COLING; method 2 of Chen & Cherry 2014, WMT): 1 is added to the number of
    n-grams of 2 to 4 tokens and to those that match, so that a sentence that shares pairs with its references, but
    nothing longer, is worth more than one that shares single words.
    """
    return np.array([_sentence(corpus, i, c) for i, c in zip(photos, candidates, strict=True)], dtype=np.float64)


def _sentence(corpus: CiderD, photo: int, candidate: Tokens) -> float:
    occurrences, lengths = corpus.references(photo)
    matched, possible = [0] * (N + 1), [0] * (N + 1)
    for gram, count in ngram_counts(candidate).items():
        possible[len(gram)] += count
        if where := occurrences.get(gram):
            matched[len(gram)] += min(count, max(times for _, times in where))
    if not matched[1]:
        return 0.0
    size = len(candidate)
    brevity = min(1.0, exp(1 - _closest(size, lengths) / size))
    more = prod((matched[n] + 1) / (possible[n] + 1) for n in range(2, N + 1))
    return brevity * (matched[1] / possible[1] * more) ** (1 / N)


def _closest(size: int, lengths: Iterable[int]) -> int:
    """The length that is closest to `size`, the shorter one of two."""
    return min((abs(length - size), length) for length in lengths)[1]
