"""All caption metrics of one system at once: tokenise, score, and keep the per-photo figures for intervals."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...runtime.errors import UsageError
from .bleu import bleu
from .bootstrap import bootstrap_mean
from .cider import cider
from .diversity import distinct_share, mean_length, repeated_share
from .ptb import ptb_tokenize
from .rouge import rouge_l


@dataclass(frozen=True)
class CaptionScores:
    """The corpus' figures. CIDEr is 0 to 10 (papers often print it × 100), the rest 0 to 1, `mean_length` in tokens.

    `per_photo_cider` and `per_photo_rouge_l` are float64 [photos] in the order of `ids`.
    """

    ids: tuple[Hashable, ...]
    bleu: tuple[float, ...]
    per_photo_cider: np.ndarray
    per_photo_rouge_l: np.ndarray
    distinct: float
    repeated_ngrams: float
    mean_length: float

    @property
    def cider(self) -> float:
        return float(self.per_photo_cider.mean())

    @property
    def cider_d(self) -> float:
        """The same number as `cider`: what the COCO evaluation calls CIDEr is CIDEr-D (see cider.py)."""
        return self.cider

    @property
    def rouge_l(self) -> float:
        return float(self.per_photo_rouge_l.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, CIDEr with its 95% bootstrap interval over photos; no per-photo figures."""
        return {
            "photos": len(self.ids),
            "cider": self.cider,
            "cider_interval": bootstrap_mean(self.per_photo_cider).to_dict(),
            "cider_d": self.cider_d,
            **{f"bleu_{n}": score for n, score in enumerate(self.bleu, 1)},
            "rouge_l": self.rouge_l,
            "distinct": self.distinct,
            "repeated_ngrams": self.repeated_ngrams,
            "mean_length": self.mean_length,
        }


def caption_metrics(candidates: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]) -> CaptionScores:
    """Score one caption per photo against the photo's references, as the COCO caption evaluation does.

    candidates: id → caption; references: id → captions. Both must hold the same ids, each with ≥ 1 reference: CIDEr's
    document frequencies come from exactly these references. Raises UsageError otherwise.
    """
    check_same_photos(candidates, references)
    ids = tuple(candidates)
    said = [ptb_tokenize(candidates[i]) for i in ids]
    wanted = [[ptb_tokenize(caption) for caption in references[i]] for i in ids]
    words = [_words(tokens) for tokens in said]
    reference_words = [[_words(tokens) for tokens in captions] for captions in wanted]
    return CaptionScores(
        ids=ids,
        bleu=bleu(words, reference_words),
        per_photo_cider=cider(words, reference_words),
        per_photo_rouge_l=rouge_l(said, wanted),
        distinct=distinct_share(said),
        repeated_ngrams=repeated_share(said),
        mean_length=mean_length(said),
    )


def _words(tokens: list[str]) -> list[str]:
    """The tokens as pycocoevalcap's CIDEr and BLEU see them: they part "1\u00a01/2", which is one token to ROUGE."""
    return " ".join(tokens).split() if any("\u00a0" in token for token in tokens) else tokens


def check_same_photos(candidates: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]) -> None:
    """Raise UsageError naming a photo with a caption and no reference, or the other way round."""
    if not candidates:
        raise UsageError("there are no captions to score")
    for i in candidates:
        if not references.get(i):
            raise UsageError(f"photo {i!r} has a caption but no references")
    missing = [i for i in references if i not in candidates]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(references)} photos with references have no caption, the first is {missing[0]!r}"
        )
