"""Captions of a split and what they are worth: speed without quality beside it says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError
from .metrics import caption_metrics, paired_bootstrap

if TYPE_CHECKING:
    from .datasets import Dataset
    from .metrics import CaptionScores

WORTHLESS = 0.02  # CIDEr that weights without training may reach: its interval's upper end is below


@dataclass(frozen=True)
class Photo:
    """One photo on the bench: a file on disk and what people said about it."""

    id: str
    path: str
    references: tuple[str, ...]


def split_photos(dataset: Dataset, split: str, limit: int | None, folder: Path) -> Iterable[Photo]:
    """The first `limit` photos of a split as files; drawn ones are written to `folder`.

    A generator, because drawing takes time worth a progress bar. Raises UsageError for a split that is not
    there or empty.
    """
    if split not in dataset.splits:
        raise UsageError(f"{dataset.spec} has no split {split!r}; it has {', '.join(dataset.splits)}")
    examples = dataset.splits[split]
    if not len(examples):
        raise UsageError(f"the {split} split of {dataset.spec} is empty")
    for example in islice(examples, limit):
        yield Photo(example.id, str(example.jpeg_path(folder).resolve()), tuple(example.captions))


def score(captions: Sequence[str], photos: Sequence[Photo]) -> CaptionScores:
    """Score one caption per photo, in the photos' order."""
    ids = [photo.id for photo in photos]
    said = dict(zip(ids, captions, strict=True))
    return caption_metrics(said, {photo.id: photo.references for photo in photos})


def quality_record(scores: CaptionScores, first: CaptionScores | None) -> dict[str, Any]:
    """What a row says about quality; against `first` (the baseline, same photos) as a difference with its
    interval.
    """
    record = scores.to_dict()
    if first is not None and first is not scores:
        difference = paired_bootstrap(scores.per_photo_cider, first.per_photo_cider)
        record["cider_over_first"] = difference.to_dict()
    return record


def worthless(quality: Mapping[str, Any]) -> bool:
    """Whether a row's quality is that of weights which nobody trained."""
    return quality["cider_interval"]["high"] < WORTHLESS


def identical_share(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Share of photos (ids of both) with the same caption text."""
    shared = [i for i in a if i in b]
    return sum(a[i]["text"] == b[i]["text"] for i in shared) / len(shared) if shared else 0.0
