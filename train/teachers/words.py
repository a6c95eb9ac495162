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
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from ...benchmarks.datasets import Example
from ...runtime.errors import UsageError
from ..checkpoint import Checkpoint
from ..data.augment import View
from ..data.batches import MANY, Photos, Progress, encode_captions, encoder_digest
from ..data.cache import cache_key, cached_rows, load_pixels
from ..data.features import FeatureExtractor
from ..lora import count_parameters
from ..models import CaptionModel
from ..start import load_again
from ..tokenizer import caption_text, token_ids

KNOWN = 0.95  # least share of the captions' words that a teacher must know
CUTS = ("normalizer", "pre_tokenizer", "decoder")  # with the model's type: how a tokenizer cuts text


class Teacher:
    """A captioner whose words and memory another one learns from; `tokenizer` and `ids` are that one's.

    Raises UsageError where the two cut text differently.
    """

    def __init__(
        self, loaded: Checkpoint, tokenizer: tokenizers.Tokenizer, ids: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.path, self.sha256, self.preprocess = loaded.path, loaded.sha256, loaded.preprocess
        self.recipe, self.metrics, self.tokens = loaded.recipe, loaded.metrics, loaded.tokens
        self.parameters = count_parameters(loaded.model)
        self._model: CaptionModel | None = _frozen(loaded.model)
        self.tokenizer, self.special = tokenizer, token_ids(tokenizer, ids)
        theirs, ours = loaded.tokenizer.inner, tokenizer.get_vocab(with_added_tokens=True)
        known = theirs.get_vocab(with_added_tokens=True)
        self.ids = np.full(self.special["vocab_size"], -1)  # our id → the teacher's, -1: it does not know the word
        for word, i in ours.items():
            self.ids[i] = known.get(word, -1)
        self.ids[self.ids == self.tokens["eos"]] = -1
        self.ids[self.special["eos"]] = self.tokens["eos"]
        unsaid = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.missing = sorted(word for word, i in ours.items() if self.ids[i] < 0 and i not in unsaid)
        if _cuts(theirs) != _cuts(tokenizer):
            raise self._cuts_differently()

    def model(self, device: torch.device) -> CaptionModel:
        """Its model on the device, loaded again where it was forgotten."""
        if self._model is None:
            self._model = _frozen(load_again(str(self.path), self.sha256, "teacher").model)
        return self._model.to(device)

    def forget(self) -> None:
        """Give its memory back until it is needed again."""
        self._model = None

    def told(self) -> dict[str, Any]:
        """What a run's metrics say of it; cider: of its own validation."""
        best = self.metrics.get("best") or {}
        return {
            "path": str(self.path.resolve()),
            "sha256": self.sha256,
            "recipe": self.recipe.name,
            "parameters": self.parameters,
            "cider": best.get("cider"),
        }

    def line(self) -> str:
        """The same for people."""
        told = self.told()
        scored = "" if told["cider"] is None else f", validation CIDEr {told['cider']:.4f}"
        line = f"teacher {self.path}: {self.recipe.name}, {self.parameters / 1e6:,.2f} M parameters{scored}"
        if self.missing:
            line += f"; does not know {len(self.missing):,} of {len(self.ids):,} words, {self.missing[0]!r} among them"
        return line

    def check(self, examples: Sequence[Example], max_length: int) -> None:
        """Let it say one of the captioner's longest captions; UsageError where it cannot teach by `examples`."""
        if self.missing:
            self._check_words(caption_text(text) for example in examples for text in example.captions)
        ids = encode_captions(examples[:1], self.tokenizer, max_length=max_length, captions=1, ids=self.special)
        pixels = torch.from_numpy(load_pixels(examples[:1], self.preprocess))
        model = self.model(torch.device("cpu"))
        with torch.inference_mode():
            self.logits(model, model.memory(pixels=pixels), ids)

    def _check_words(self, captions: Iterable[str]) -> None:
        counts: Counter[int] = Counter()
        for encoding in self.tokenizer.encode_batch(list(captions), add_special_tokens=False):
            counts.update(encoding.ids)
        unknown = self.special.get("unk")
        said = sum(count for i, count in counts.items() if i != unknown)
        known = sum(count for i, count in counts.items() if i != unknown and self.ids[i] >= 0)
        if known < said and _cuts(self.tokenizer)["type"] != "WordLevel":  # it has other pieces for the same text
            raise self._cuts_differently()
        if known < KNOWN * said:
            raise UsageError(
                f"the teacher {self.path} does not know {self.missing[0]!r} and {len(self.missing) - 1:,} more of the "
                f"captioner's words, {1 - known / said:.0%} of what the captions say: it cannot teach it word by word"
            )

    def _cuts_differently(self) -> UsageError:
        return UsageError(
            f"the teacher {self.path} cuts text into other words than the captioner: it cannot teach it word by word, "
            "but by its captions (stages.N.teacher_captions)"
        )

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
        photos, view = photos.shown_in(self.preprocess), View(mirrored=mirrored)
        shape = (*ids.shape[1:2], ids.shape[2] - 1, min(top_k, len(self.ids)))
        dtype = np.dtype([("id", "<u2" if len(self.ids) <= 2**16 else "<u4"), ("logp", "<f2")])

        @functools.cache
        def look() -> Callable[[slice], np.ndarray]:
            """What its encoder gives of a part of the photos: float16 [n, L, dim]."""
            encoder = self.model(device).encoder
            known = photos.known(encoder_digest(encoder, self.recipe.encoder.kind), view=view)
            if known is not None:  # another captioner with this encoder has looked already
                return lambda part: np.array(known[part])
            extractor = FeatureExtractor(encoder, encoder)
            return lambda part: extractor(photos.load(part, view), many=len(ids) >= MANY)

        @torch.inference_mode()
        def compute(part: slice) -> np.ndarray:
            model, features = self.model(device), torch.from_numpy(look()(part)).to(device)
            logits = self.logits(model, model.memory(features=features.float()), ids[part])
            logp, words = (logits / temperature).log_softmax(-1).topk(shape[-1])  # [K, k]
            rows, keep = np.zeros((len(ids[part]), *shape), dtype), ids[part][:, :, 1:] >= 0
            rows["id"][keep], rows["logp"][keep] = words.cpu().numpy(), logp.cpu().numpy()
            return rows

        base = (self.metrics.get("base") or {}).get("sha256")  # of adapters
        key = cache_key(
            kind="words", teacher=self.sha256, base=base, flip=mirrored, top_k=shape[-1],
            parts={name: getattr(self.recipe, name) for name in ("encoder", "bridge", "decoder", "lora")},
            temperature=temperature, ids=_hash(ids), words=_hash(self.ids), **photos.identity,
        )  # fmt: skip
        report = lambda done: progress(f"words of {self.path.name}{view}", done, len(ids))  # noqa: E731
        return cached_rows(key, len(ids), shape, dtype, compute, report=report)


@dataclass(frozen=True)
class Taught:
    """What the teachers say of a stage's captions. ids: the captions of all photos, as they are and, if there is such
    a view, mirrored; rows: for each teacher what `Teacher.rows` gave of each."""

    ids: Sequence[np.ndarray]
    rows: Sequence[Sequence[np.ndarray]]

    def of(self, ids: np.ndarray, places: np.ndarray, mirrored: np.ndarray) -> dict[str, Tensor]:
        """For captions [N, C, T] drawn from those of the photos at `places`, mirrored or not: `words`, ids int64, and
        their log-probabilities `taught`, [teachers, K, k] for the batch's K targets."""
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
            "words": torch.from_numpy(picked["id"].astype(np.int64)),
            "taught": torch.from_numpy(picked["logp"].astype(np.float32)),
        }


def _frozen(model: CaptionModel) -> CaptionModel:
    return model.eval().requires_grad_(False)


def _cuts(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """What decides how a tokenizer cuts text, besides its vocabulary."""
    tree = json.loads(tokenizer.to_str())
    return {"type": tree["model"]["type"], **{part: tree.get(part) for part in CUTS}}


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
