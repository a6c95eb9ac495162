"""Training and scoring of two towers: both frozen encoders' features are computed once, so that an epoch is quick."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ..benchmarks.datasets import Example
from ..benchmarks.retrieval import KS, WAYS, RetrievalScores
from ..benchmarks.retrieval import score_retrieval as rank
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from .checkpoint import Checkpoint
from .data.augment import mirrored_text
from .data.batches import Batch
from .data.cache import cache_key, cached_rows, load_pixels
from .data.material import Material
from .loop import Trainer
from .models.hub import reading
from .models.towers import TwoTowers
from .settings import Recipe, Stage
from .state import digest, model_tensors
from .tokenizer import caption_text, train_tokenizer

PHOTOS = 64  # embedded together
NAMES = {"image_to_text": "image → text", "text_to_image": "text → image"}


class TowersMaterial(Material):
    """A batch's `ids` are the text tower's vectors [N, 1, text dim] of one caption for each photo, another one in
    another step."""

    def __init__(self, recipe: Recipe, model: TwoTowers, tokenizer: Tokenizer, *args: Any) -> None:
        model.read_with(tokenizer)
        self.place: dict[str, int] = {}  # of each text, in the order in which they are met
        super().__init__(recipe, model, tokenizer, *args)
        # Texts of like length are read together: less padding.
        self.lines = sorted(self.place, key=lambda text: (len(text), text))
        order = np.empty(len(self.lines) + 1, np.int64)
        order[[self.place[text] for text in self.lines]] = np.arange(len(self.lines))
        order[-1] = -1
        self.own = [order[ids] for ids in self.own]

    def texts(self, examples: Sequence[Example], mirrored: bool, most: int) -> np.ndarray:
        """int64 [N, C, 1]: numbers of all captions, -1 where a photo has no more."""
        lines = [[_seen(caption, mirrored) for caption in captions] for captions in captions_of(examples)]
        numbers = np.full((len(lines), max(map(len, lines)), 1), -1, np.int64)
        for row, captions in enumerate(lines):
            numbers[row, : len(captions), 0] = [self.place.setdefault(text, len(self.place)) for text in captions]
        return numbers

    def open_photos(self, stage: Stage) -> None:
        """The captions' vectors, too; `owners`: whose photo each of the validation's is."""
        super().open_photos(stage)
        said = captions_of(self.val.examples)
        texts = [caption_text(caption) for captions in said for caption in captions]
        self.owners = np.repeat(np.arange(len(said)), [len(captions) for captions in said])
        with self.accelerator.main_process_first():
            self.vectors = text_vectors(self.model, self.lines, "captions of train", self.progress)
            self.val_vectors = np.array(text_vectors(self.model, texts, "captions of val", self.progress))

    def batch(self, ids: torch.Tensor, places: np.ndarray, views: np.ndarray) -> Batch:
        """As Material.batch, with vectors in place of numbers."""
        batch = super().batch(ids, places, views)
        vectors = torch.from_numpy(np.array(self.vectors[ids[:, :, 0].numpy()])).float()  # [N, 1, text dim]
        return dataclasses.replace(batch, ids=vectors.to(self.accelerator.device))


class TowersTrainer(Trainer):
    """Trains the bridge and the head of `model` on cached features of photos and captions.

    A validation ranks all captions of the validation photos; "recall" is the mean of recall@1, 5 and 10 both ways.
    """

    learns_from, metric = TowersMaterial, "recall"

    def score(self) -> dict[str, float]:
        """The mean recall, and recall@10 each way."""
        seen = self.material
        photos = embed_rows(self.model, seen.val_rows)
        with torch.inference_mode():
            vectors = torch.from_numpy(seen.val_vectors).float().to(self.accelerator.device)
            texts = self.model.project_texts(vectors).cpu().numpy()
        scores = rank(photos, texts, seen.owners)
        return {"recall": scores.mean_recall(), **{f"{way}_10": scores.recall(way, 10) for way in WAYS}}


def text_vectors(model: TwoTowers, texts: Sequence[str], phase: str, progress: Progress) -> np.ndarray:
    """What the frozen text tower makes of texts: float16 [N, text dim], memory-mapped, computed once."""
    tower, tokenizer = model.text.eval(), model.tokenizer
    key = cache_key(
        kind="texts",
        texts=_hash("\n".join(texts).encode()),
        tower=[digest(tensor) for tensor in model_tensors(tower).values()],
        settings=tower.settings(),
        pool=tower.pool,
        tokenizer=_hash(tokenizer.to_str().encode() if tokenizer else b""),
        tokens=model.tokens,
        max_length=model.max_length,
    )
    return cached_rows(
        key,
        len(texts),
        (tower.dim,),
        np.float16,
        lambda part: model.text_features(texts[part]).half().cpu().numpy(),
        report=lambda done: progress(phase, done, len(texts)),
    )


def captions_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Each photo's captions; UsageError where one has none."""
    for example in examples:
        if not example.captions:
            raise UsageError(f"task = retrieval needs a caption for every photo, and {example.id} has none")
    return [example.captions for example in examples]


@torch.inference_mode()
def embed_rows(model: TwoTowers, rows: np.ndarray) -> np.ndarray:
    """Photos from the frozen encoder's features [N, L, dim] → float32 [N, 512]."""
    model.eval()
    device = model.head.log_scale.device
    parts = []
    for start in range(0, len(rows), PHOTOS):
        features = torch.from_numpy(np.array(rows[start : start + PHOTOS])).float().to(device)
        parts.append(model.embed_photos(features=features).cpu().numpy())
    return np.concatenate(parts)


def open_texts(recipe: Recipe, captions: Iterable[str]) -> tuple[Tokenizer, Recipe]:
    """The tokenizer of the text tower's source, or without one a tokenizer learnt from the captions; and the recipe
    with the ids of what begins, ends and fills a text."""
    source = recipe.text.source
    if not source:
        return train_tokenizer(captions, recipe.tokenizer), recipe
    from transformers import AutoTokenizer

    with reading(source, "text") as place:
        loaded = AutoTokenizer.from_pretrained(place)
    if not getattr(loaded, "is_fast", False):
        raise UsageError(f"text {source}: its tokenizer has no fast form (tokenizer.json)")
    first = loaded.cls_token_id if loaded.cls_token_id is not None else loaded.bos_token_id
    last = loaded.sep_token_id if loaded.sep_token_id is not None else loaded.eos_token_id
    ids = {"bos": first, "eos": last, "pad": loaded.pad_token_id, "unk": loaded.unk_token_id}
    ids["pad"] = last if ids["pad"] is None else ids["pad"]
    ids["unk"] = ids["pad"] if ids["unk"] is None else ids["unk"]
    if first is None or last is None:
        raise UsageError(f"text {source}: its tokenizer names no token that begins or ends a text")
    tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = dataclasses.replace(recipe.tokenizer, kind="pretrained", source=source, ids=ids)
    return tokenizer, dataclasses.replace(recipe, tokenizer=settings)


def score_retrieval(loaded: Checkpoint, examples: Sequence[Example], progress: Progress = silent) -> dict[str, Any]:
    """Recall of a retrieval checkpoint on photos and all their captions, both ways (see RetrievalScores.to_dict)."""
    return retrieval_scores(loaded, examples, progress).to_dict()


@torch.inference_mode()
def retrieval_scores(loaded: Checkpoint, examples: Sequence[Example], progress: Progress) -> RetrievalScores:
    model, said = loaded.model.eval(), captions_of(examples)
    photos, texts = [], []
    for start in range(0, len(examples), PHOTOS // 4):
        part = slice(start, min(start + PHOTOS // 4, len(examples)))
        pixels = torch.from_numpy(load_pixels(examples[part], loaded.preprocess))
        photos.append(model.embed_photos(pixels=pixels).numpy())
        texts.append(model.embed_texts([caption_text(caption) for captions in said[part] for caption in captions]))
        progress("photos and captions", part.stop, len(examples))
    owners = np.repeat(np.arange(len(said)), [len(captions) for captions in said])
    return rank(np.concatenate(photos), torch.cat(texts).numpy(), owners)


def retrieval_lines(scores: Mapping[str, Any]) -> list[str]:
    """`score_retrieval` for people: recall@1, 5 and 10 each way, with the interval of the last, and chance."""
    lines = []
    for way, name in NAMES.items():
        rows = [scores[way][f"recall_{k}"] for k in KS]
        values = "   ".join(f"R@{k} {row['value']:.3f}" for k, row in zip(KS, rows, strict=True))
        interval = f"(95% {rows[-1]['low']:.3f} to {rows[-1]['high']:.3f})"
        lines.append(f"  {name}  {values} {interval}   median rank {scores[way]['median_rank']:.0f}")
        chance = "   ".join(f"R@{k} {row['chance']:.3f}" for k, row in zip(KS, rows, strict=True))
        lines.append(f"  {'by chance':<{len(name)}}  {chance}")
    return lines


def _seen(caption: str, mirrored: bool) -> str:
    text = caption_text(caption)
    return mirrored_text(text) if mirrored else text


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
