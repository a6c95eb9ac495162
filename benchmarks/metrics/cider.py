"""CIDEr, as the COCO caption evaluation computes it, over any tokens: words to report, token ids to reward.

Which CIDEr: Vedantam, Zitnick and Parikh (2015, arXiv:1411.5726) define CIDEr and CIDEr-D. pycocoevalcap's class
`Cider`, whose figure the field reports as "CIDEr", *is* CIDEr-D: tf-idf clipped to the reference's, a Gaussian
penalty (sigma 6) on the difference in length, and the factor 10. So here `cider` and CIDEr-D are one number, and the
paper's unclipped CIDEr is not computed. As there, words are not stemmed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from math import exp, log, sqrt

import numpy as np

from ...runtime.errors import UsageError

N = 4  # n-grams of 1 to N tokens
SIGMA = 6.0

Tokens = Sequence[Hashable]
# For one n-gram and one photo: ((reference index, times it occurs there), ...). Few distinct ones exist, so they are shared.
Occurrences = tuple[tuple[int, int], ...]


def ngram_counts(tokens: Tokens, n: int) -> Counter:
    """How often each n-gram (a tuple; for n = 1 too) occurs in `tokens`."""
    return Counter(zip(*(tokens[k:] for k in range(n)), strict=False))


class CiderD:
    """CIDEr-D against a fixed corpus of references: everything that depends on the references alone is done once.

    references: per photo, its reference captions, each a sequence of hashable tokens (words or ids). Document
        frequencies (in how many photos' references an n-gram occurs) are taken from this whole corpus.
    For a reward in which the end of the sentence counts, end the references with the end-of-sentence id, and those
    candidates that emitted it: without it a captioner learns to stop in mid-sentence.

    Raises UsageError for an empty corpus or a photo without references.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        if not references:
            raise UsageError("CIDEr needs at least one photo with references, and the corpus is empty")
        frequency: Counter = Counter()
        interned: dict[
            tuple, tuple
        ] = {}  # one object per n-gram and per occurrence pattern keeps 30,000 captions small
        photos: list[tuple[dict[tuple, Occurrences], list[int]]] = []
        for index, captions in enumerate(references):
            if not captions:
                raise UsageError(f"photo {index} of the CIDEr corpus has no references")
            found: dict[tuple, list[tuple[int, int]]] = {}
            for j, caption in enumerate(captions):
                for n in range(1, N + 1):
                    for gram, count in ngram_counts(caption, n).items():
                        found.setdefault(gram, []).append((j, count))
            frequency.update(found.keys())
            patterns = {}
            for gram, where in found.items():
                pattern = tuple(where)
                patterns[interned.setdefault(gram, gram)] = interned.setdefault(pattern, pattern)
            photos.append((patterns, [len(caption) for caption in captions]))

        self._unseen = log(len(references))  # idf of an n-gram no reference has
        self._idf: dict[tuple, float] = {gram: self._unseen - log(df) for gram, df in frequency.items()}
        # Per photo: occurrences, references' lengths, and per n the references' tf-idf norms.
        self._photos = [
            (patterns, lengths, self._norms(patterns, len(lengths))) for patterns, lengths in photos
        ]

    def _norms(self, patterns: dict[tuple, Occurrences], count: int) -> list[list[float]]:
        squares = [[0.0] * count for _ in range(N)]
        idf = self._idf
        for gram, where in patterns.items():
            row, weight = squares[len(gram) - 1], idf[gram]
            for j, tf in where:
                row[j] += (tf * weight) ** 2
        return [[sqrt(square) for square in row] for row in squares]

    def __len__(self) -> int:
        return len(self._photos)

    def score(self, photos: Iterable[int], candidates: Iterable[Tokens]) -> np.ndarray:
        """CIDEr-D (0 to 10) of each candidate against the references of the photo with the same position in `photos`.

        photos: indices into the corpus, repeated at will. Returns float64 [candidates].
        """
        return np.array([self._one(i, c) for i, c in zip(photos, candidates, strict=True)], dtype=np.float64)

    def _one(self, photo: int, candidate: Tokens) -> float:
        patterns, lengths, norms = self._photos[photo]
        idf, unseen = self._idf.get, self._unseen
        find = patterns.get
        penalties = None
        total = 0.0
        for n in range(1, N + 1):
            square = 0.0
            dots = [0.0] * len(lengths)
            matched = False
            for gram, tf in ngram_counts(candidate, n).items():
                weight = idf(gram, unseen)
                weight *= weight  # both sides carry one idf
                square += tf * tf * weight
                where = find(gram)
                if where is not None:
                    matched = True
                    for j, reference_tf in where:
                        dots[j] += weight * reference_tf * (tf if tf < reference_tf else reference_tf)
            if not matched:
                break  # no n-gram in common, so no longer one either
            if square == 0.0:
                continue
            if penalties is None:
                length = len(candidate)
                penalties = [exp(-((length - other) ** 2) / (2 * SIGMA**2)) for other in lengths]
            norm = sqrt(square)
            for dot, other, penalty in zip(dots, norms[n - 1], penalties, strict=True):
                if dot:
                    total += penalty * dot / (norm * other)
        return 10.0 * total / (N * len(lengths))


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr of each candidate, float64 [photos], with document frequencies from these references; the mean is the corpus' figure."""
    return CiderD(references).score(range(len(references)), candidates)
