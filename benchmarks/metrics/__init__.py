"""Caption metrics equal to pycocoevalcap's, without Java: CIDEr, BLEU, ROUGE-L, diversity, and bootstrap intervals."""

from __future__ import annotations

from .bleu import sentence_bleu
from .bootstrap import Interval, bootstrap_mean, paired_bootstrap
from .captions import CaptionScores, caption_metrics
from .cider import CiderD
from .ptb import ptb_tokenize

__all__ = [
    "CaptionScores",
    "CiderD",
    "Interval",
    "bootstrap_mean",
    "caption_metrics",
    "paired_bootstrap",
    "ptb_tokenize",
    "sentence_bleu",
]
