"""Captioners that teach another one word by word: what they say of its captions is computed once and kept on disk.

A teacher sees the photos as they are, and mirrored, through its own preprocessing and encoder; of each target word of
each caption its likeliest words are kept with their log-probabilities. The rest of its probability is known by its sum
alone: see `distill.divergence` for what is made of that.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from ...benchmarks.datasets import Example
from ...runtime.errors import UsageError
from ...runtime.preprocess import Preprocess
from ...runtime.progress import Progress
from ..checkpoint import CheckpointInfo, identity, require_captioner
from ..data.augment import View
from ..data.batches import MANY, Photos, encode_captions, encoder_digest
from ..data.cache import cache_key, cached_rows, load_pixels
from ..data.features import FeatureExtractor
from ..models import CaptionModel
from ..tokenizer import caption_text, token_ids
from .base import Lazy, Teacher

KNOWN = 0.95  # least share of the captions' words that a teacher must know, or of its pieces of them that must be ours
TEXTS = 4096  # captions cut at once
MOST = 2**24  # logits at once: 64 MB, and their like a few times
CUTS = ("normalizer", "pre_tokenizer", "decoder")  # with the model's type: how a tokenizer cuts text


class WordsRefused(UsageError):
    """A teacher's words do not fit the captioner's; its captions would."""

    def __init__(self, name: str, why: str) -> None:
        self.why = why
        super().__init__(
            f"the teacher {name} {why}: it cannot teach it word by word, but by its captions "
            "(stages.N.teacher_captions)"
        )


class WordTeacher(Teacher):
    """A captioner whose words and memory another one learns from; `tokenizer` and `ids` are that one's.

    Raises WordsRefused where the two cut text differently by their make; `check` looks at what they make of captions.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        model: Lazy,
        tokenizer: tokenizers.Tokenizer,
        ids: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__(str(require_captioner(info).path), info.sha256, model)
        self.describe(info)
        self.encoder, self.preprocess, self.tokens = info.recipe.encoder.kind, info.preprocess, info.tokens
        self.identity, self.theirs = identity(info), info.tokenizer.inner
        self.tokenizer, self.special = tokenizer, token_ids(tokenizer, ids)
        ours, known = (words.get_vocab(with_added_tokens=True) for words in (tokenizer, self.theirs))
        self.ids = np.full(self.special["vocab_size"], -1)  # our id → the teacher's, -1: it does not know the word
        for word, i in ours.items():
            self.ids[i] = known.get(word, -1)
        self.ids[self.ids == self.tokens["eos"]] = -1
        self.ids[self.special["eos"]] = self.tokens["eos"]
        unsaid = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.missing = sorted(word for word, i in ours.items() if self.ids[i] < 0 and i not in unsaid)
        if self.missing:
            self.note = f"; does not know {len(self.missing):,} of {len(self.ids):,} words, {self.missing[0]!r} first"
        if _cuts(self.theirs) != _cuts(tokenizer):
            raise self._cuts_differently()

    def check(self, examples: Sequence[Example], max_length: int) -> None:
        """Let it say one of the captioner's longest captions; WordsRefused where it cannot teach by `examples`."""
        captions = [caption_text(text) for example in examples for text in example.captions]
        if _cuts(self.tokenizer)["type"] != "WordLevel":
            self._check_pieces(captions)
        elif self.missing:
            self._check_words(captions)
        ids = encode_captions(examples[:1], self.tokenizer, max_length=max_length, captions=1, ids=self.special)
        model = self.model.get()
        with torch.inference_mode():
            self.logits(model, self._memory(model, examples), ids)

    def check_match(self, examples: Sequence[Example], model: CaptionModel, preprocess: Preprocess) -> None:
        """UsageError where the captioner's memory of a photo has another shape than the teacher's."""
        pixels, training = torch.from_numpy(load_pixels(examples[:1], preprocess)), model.training
        with torch.inference_mode():
            own = model.eval().memory(pixels=pixels.to(next(model.parameters()).device)).shape[1:]
            its = self._memory(self.model.get(), examples).shape[1:]
        model.train(training)
        if own != its:
            raise UsageError(
                f"match: the captioner sees a photo as {own[0]} × {own[1]} numbers and the teacher {self.name} as "
                f"{its[0]} × {its[1]}: leave match at 0"
            )

    def _memory(self, model: CaptionModel, examples: Sequence[Example]) -> Tensor:
        """Of the first photo."""
        return model.memory(pixels=torch.from_numpy(load_pixels(examples[:1], self.preprocess)))

    def _check_pieces(self, captions: Sequence[str]) -> None:
        """WordsRefused where more than a few of the pieces that the teacher cuts the captions into are not ours: it
        would be asked about texts as it never reads them. A pruned tokenizer cuts rare words alone differently."""
        total = same = 0
        for start in range(0, len(captions), TEXTS):
            texts = captions[start : start + TEXTS]
            pairs = (words.encode_batch(texts, add_special_tokens=False) for words in (self.tokenizer, self.theirs))
            for ours, theirs in zip(*pairs, strict=True):
                mapped = zip(self.ids[ours.ids].tolist(), ours.offsets, strict=True)
                pieces = set(zip(theirs.ids, theirs.offsets, strict=True))
                total, same = total + len(pieces), same + len(pieces.intersection(mapped))
        if same < KNOWN * total:
            raise self._cuts_differently()

    def _check_words(self, captions: Iterable[str]) -> None:
        counts: Counter[int] = Counter()
        for encoding in self.tokenizer.encode_batch(list(captions), add_special_tokens=False):
            counts.update(encoding.ids)
        unknown = self.special.get("unk")
        said = sum(count for i, count in counts.items() if i != unknown)
        known = sum(count for i, count in counts.items() if i != unknown and self.ids[i] >= 0)
        if known < KNOWN * said:
            raise WordsRefused(
                self.name,
                f"does not know {self.missing[0]!r} and {len(self.missing) - 1:,} more of the captioner's words, "
                f"{1 - known / said:.0%} of what the captions say",
            )

    def _cuts_differently(self) -> UsageError:
        return WordsRefused(self.name, "cuts text into other words than the captioner")

    def logits(self, model: CaptionModel, memory: Tensor, ids: np.ndarray) -> Tensor:
        """Its logits [K, V] for our words at the K targets of ids [N, C, T] (see Batch), with its memory of the photos;
        -inf where it does not know a word."""
        there = ids[:, :, :-1]
        inputs = np.where(there >= 0, self.ids[there], 0)
        inputs = np.where(inputs >= 0, inputs, self.tokens["unk"])
        inputs[:, :, 0] = self.tokens["bos"]
        keep = torch.from_numpy(ids[:, :, 1:] >= 0).to(memory.device)
        logits = model.decoder(memory, torch.from_numpy(inputs).to(memory.device), keep).float()  # [K, theirs]
        own = torch.from_numpy(self.ids).to(memory.device)
        return logits[:, own.clamp(min=0)].masked_fill(own < 0, -torch.inf)

    def rows(
        self,
        photos: Photos,
        ids: np.ndarray,
        *,
        mirrored: bool,
        temperature: float,
        top_k: int,
        device: torch.device,
        progress: Progress,
    ) -> np.ndarray:
        """What it says of the captions ids int64 [N, C, T] of the photos (of mirrored ones, if so), memory-mapped:
        [N, C, T - 1, k] of (id, logp), the k likeliest of our words at each target, zeros where there is none."""
        content, photos, view = photos.content, photos.shown_in(self.preprocess), View(mirrored=mirrored)
        shape = (*ids.shape[1:2], ids.shape[2] - 1, min(top_k, len(self.ids)))
        dtype = np.dtype([("id", "<u2" if len(self.ids) <= 2**16 else "<u4"), ("logp", "<f2")])

        @functools.cache
        def look() -> Callable[[slice], np.ndarray]:
            """What its encoder gives of a part of the photos: float16 [n, L, dim]."""
            encoder = self.model.get(device).encoder
            known = photos.known(encoder_digest(encoder, self.encoder), view=view, device=device)
            if known is not None:  # another captioner with this encoder has looked already
                return lambda part: np.array(known[part])
            extractor = FeatureExtractor(encoder, encoder)
            return lambda part: extractor(photos.load(part, view), many=len(ids) >= MANY)

        @torch.inference_mode()
        def compute(part: slice) -> np.ndarray:
            model, features, words = self.model.get(device), torch.from_numpy(look()(part)), ids[part]
            keep = words[:, :, 1:] >= 0
            rows = np.zeros((len(words), *shape), dtype)
            vocab = max(len(self.ids), self.tokens["vocab_size"])
            step = max(1, MOST // (keep[0].size * vocab))  # photos whose logits are not too many at once
            for i in range(0, len(words), step):
                few = slice(i, i + step)
                if keep[few].any():
                    memory = model.memory(features=features[few].to(device).float())
                    logp = (self.logits(model, memory, words[few]) / temperature).log_softmax(-1)
                    logp, likeliest = logp.topk(shape[-1])  # [K, k]
                    rows["id"][few][keep[few]] = likeliest.cpu().numpy()
                    rows["logp"][few][keep[few]] = logp.cpu().numpy()
            return rows

        key = cache_key(
            kind="words", teacher=self.identity, flip=mirrored, top_k=shape[-1], temperature=temperature,
            ids=_hash(ids), words=_hash(self.ids), photos=content,
        )  # fmt: skip
        report = lambda done: progress(f"words of {Path(self.name).name}{view}", done, len(ids))  # noqa: E731
        return cached_rows(key, len(ids), shape, dtype, compute, report=report)


@dataclass(frozen=True)
class TeacherTopK:
    """What the teachers say of a stage's captions. ids: the captions of all photos, as they are and, if there is such
    a view, mirrored; rows: for each teacher what `WordTeacher.rows` gave of each."""

    ids: Sequence[np.ndarray]
    rows: Sequence[Sequence[np.ndarray]]

    def of(self, ids: np.ndarray, places: np.ndarray, mirrored: np.ndarray) -> dict[str, Tensor]:
        """For captions [N, C, T] drawn from those of the photos at `places`, mirrored or not: `teacher_ids` int64 of
        the likeliest words and their log-probabilities `teacher_logp`, [teachers, K, k] for the batch's K targets."""
        photos = [(int(flip), place) for flip, place in zip(mirrored, places, strict=True)]
        drawn_from = np.stack([self.ids[flip][place] for flip, place in photos])  # [N, all, T]
        same = (ids[:, :, None] == drawn_from[:, None]).all(3)  # [N, C, all]
        slots, keep = same.argmax(2), ids[:, :, 1:] >= 0
        picked = np.stack(
            [
                np.stack([rows[flip][place][slots[i]] for i, (flip, place) in enumerate(photos)])[keep]
                for rows in self.rows
            ]
        )
        return {
            "teacher_ids": torch.from_numpy(picked["id"].astype(np.int64)),
            "teacher_logp": torch.from_numpy(picked["logp"].astype(np.float32)),
        }


def _cuts(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """What decides how a tokenizer cuts text, besides its vocabulary."""
    tree = json.loads(tokenizer.to_str())
    return {"type": tree["model"]["type"], **{part: tree.get(part) for part in CUTS}}


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
