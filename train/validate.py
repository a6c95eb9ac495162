"""Captions of a split from the torch model, by the same decoding and metrics as on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from tokenizers import Tokenizer

from ..benchmarks.datasets import Example
from ..benchmarks.metrics import CaptionScores, caption_metrics
from ..runtime.decode import DecodeOptions, decode, never_said
from .models import CaptionModel, TorchSession
from .tokenizer import caption_text, token_ids

BATCH = 16  # larger batches of pixels fall out of the caches


class CachedSession(TorchSession):
    """A session that starts from what a frozen encoder, or its lower blocks, gave of the photos."""

    def __init__(self, model: CaptionModel, sees: str) -> None:
        super().__init__(model)
        self.sees = sees

    @torch.inference_mode()
    def start(self, pixels: np.ndarray, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        return self.start_from(self.model.photo(**{self.sees: self._tensor(pixels).float()}), prompt_ids)


def caption_rows(
    model: CaptionModel,
    tokenizer: Tokenizer,
    rows: np.ndarray | Callable[[slice], np.ndarray],
    total: int,
    options: DecodeOptions,
    *,
    sees: str = "pixels",
    ids: Mapping[str, int] = MappingProxyType({}),
    report: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Best caption per row: of what the model `sees`, pixels uint8 [N, H, W, 3], features [N, L, dim] or its trunk's,
    an array or a function of a slice.

    ids: the special ids of a pretrained tokenizer.
    """
    session = TorchSession(model) if sees == "pixels" else CachedSession(model, sees)
    special = token_ids(tokenizer, ids)
    suppress = never_said(special)
    captions = []
    for start in range(0, total, BATCH):
        part = slice(start, min(start + BATCH, total))
        batch = rows(part) if callable(rows) else np.array(rows[part])
        for best in decode(session, batch, options, eos_id=special["eos"], suppress=suppress):
            captions.append(tokenizer.decode(list(best[0].token_ids), skip_special_tokens=True).strip())
        report(part.stop)
    return captions


def most_frequent_caption(examples: Sequence[Example]) -> str:
    """The caption that is said most often of the examples (ties: alphabetically), in `caption_text` form."""
    counts = Counter(caption_text(caption) for example in examples for caption in example.captions)
    return min(counts, key=lambda text: (-counts[text], text))


def score_captions(captions: Sequence[str], examples: Sequence[Example]) -> CaptionScores:
    """The metrics of one caption per example."""
    said = {example.id: caption for example, caption in zip(examples, captions, strict=True)}
    return caption_metrics(said, {example.id: example.captions for example in examples})
