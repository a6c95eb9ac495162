"""CIDEr as the COCO caption evaluation computes it, over any tokens: words to report, token ids to reward.

Which CIDEr: Vedantam, Zitnick and Parikh (2015, arXiv:1411.5726) define CIDEr and CIDEr-D. pycocoevalcap's
class `Cider`, whose figure the field reports as "CIDEr", *is* CIDEr-D: tf-idf clipped to the reference's, a
Gaussian penalty (sigma 6) on the difference in length, and the factor 10. So here `cider` and CIDEr-D are one
number, and the paper's unclipped CIDEr is not computed. As there, words are not stemmed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import exp, log, sqrt

import numpy as np

from ...runtime.errors import UsageError

N = 4  # n-grams of 1 to N tokens
SIGMA = 6.0
PENALTY = [exp(-(difference**2) / (2 * SIGMA**2)) for difference in range(256)]  # 0.0 from 231 on

Tokens = Sequence[Hashable]
# Where one n-gram occurs among a photo's references: ((place, times), ...), place = (n - 1) * references + reference.
Occurrences = tuple[tuple[int, int], ...]


def ngram_counts(tokens: Tokens) -> Counter:
    """How often each n-gram of 1 to 4 tokens (a tuple, for one token too) occurs in `tokens`."""
    b, c, d = tokens[1:], tokens[2:], tokens[3:]  # zip ends with the shortest
    grams = [
        *zip(tokens, strict=False),
        *zip(tokens, b, strict=False),
        *zip(tokens, b, c, strict=False),
        *zip(tokens, b, c, d, strict=False),
    ]
    return Counter(grams)


class CiderD:
    """CIDEr-D against a fixed corpus of references: what depends on the references alone is done once.

    references: per photo, its reference captions, each a sequence of hashable tokens (words or ids). Document
        frequencies (in how many photos' references an n-gram occurs) are taken from this whole corpus.
    For a reward in which the end of the sentence counts, end the references with the end-of-sentence id, and
    those candidates that emitted it: without it a captioner learns to stop in mid-sentence.

    Raises UsageError for an empty corpus or a photo without references.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        if not references:
            raise UsageError("CIDEr needs at least one photo with references, and the corpus is empty")
        frequency: dict[tuple, int] = {}
        interned: dict[tuple, tuple] = {}  # equal n-grams and equal occurrences are one object each: 3x less memory
        found: list[dict[tuple, Occurrences]] = []
        for photo, captions in enumerate(references):
            if not captions:
                raise UsageError(f"photo {photo} of the CIDEr corpus has no references")
            places: dict[tuple, tuple] = {}
            for j, caption in enumerate(captions):
                for gram, count in ngram_counts(caption).items():
                    at = ((len(gram) - 1) * len(captions) + j, count)
                    places[gram] = (*places[gram], at) if gram in places else (at,)
            shared: dict[tuple, Occurrences] = {}
            for gram, where in places.items():
                gram = interned.setdefault(gram, gram)
                frequency[gram] = frequency.get(gram, 0) + 1
                shared[gram] = interned.setdefault(where, where)
            found.append(shared)

        # Squared idf: an n-gram's weight enters a product of two tf-idf vectors, and a norm, as its square.
        self._unseen = log(len(references)) ** 2  # of an n-gram that no reference has
        self._weight = {gram: log(len(references) / df) ** 2 for gram, df in frequency.items()}
        self._photos = [
            (occurrences, [len(caption) for caption in captions], self._norms(occurrences, len(captions)))
            for occurrences, captions in zip(found, references, strict=True)
        ]

    def _norms(self, occurrences: dict[tuple, Occurrences], references: int) -> list[float]:
        """Norms of the references' tf-idf vectors, at the places that Occurrences speaks of."""
        squares = [0.0] * (N * references)
        for gram, where in occurrences.items():
            weight = self._weight[gram]
            for place, tf in where:
                squares[place] += tf * tf * weight
        return [sqrt(square) for square in squares]

    def __len__(self) -> int:
        return len(self._photos)

    def references(self, photo: int) -> tuple[Mapping[tuple, Occurrences], Sequence[int]]:
        """Where the n-grams of a photo's references occur, and how many tokens those have."""
        occurrences, lengths, _ = self._photos[photo]
        return occurrences, lengths

    def score(self, photos: Iterable[int], candidates: Iterable[Tokens]) -> np.ndarray:
        """CIDEr-D (0 to 10) of each candidate against the references of the photo beside it in `photos`.

        photos: indices into the corpus, repeated at will. Returns float64 [candidates].
        """
        return np.array([self._one(i, c) for i, c in zip(photos, candidates, strict=True)], dtype=np.float64)

    def _one(self, photo: int, candidate: Tokens) -> float:
        occurrences, lengths, norms = self._photos[photo]
        weight_of, unseen, find = self._weight.get, self._unseen, occurrences.get
        squares = [0.0] * (N + 1)
        dots = [0.0] * len(norms)
        for gram, tf in ngram_counts(candidate).items():
            weight = weight_of(gram, unseen)
            squares[len(gram)] += tf * tf * weight
            where = find(gram)
            if where is not None:
                for place, reference_tf in where:
                    dots[place] += weight * reference_tf * (tf if tf < reference_tf else reference_tf)

        length, count, total = len(candidate), len(lengths), 0.0
        penalties = [PENALTY[min(abs(length - other), 255)] for other in lengths]
        for n in range(N):
            here = slice(n * count, (n + 1) * count)
            cosines = 0.0
            for dot, norm, penalty in zip(dots[here], norms[here], penalties, strict=True):
                if dot:
                    cosines += penalty * dot / norm
            if cosines:
                total += cosines / sqrt(squares[n + 1])
        return 10.0 * total / (N * count)


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr of each candidate, float64 [photos]; document frequencies are of these references."""
    return CiderD(references).score(range(len(references)), candidates)
