"""Sequence-level distillation: what teachers say of the training photos, said once, kept on disk, and the best of it
(Kim & Rush 2016, arXiv:1606.07947).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...benchmarks.datasets import Example
from ...benchmarks.datasets.streamed import cache_folder
from ...benchmarks.metrics import CiderD
from ...runtime.errors import EdgecapError
from ..data.batches import Photos, Progress
from ..data.cache import CHUNK, cache_key
from ..settings import Stage
from ..tokenizer import caption_text
from .speakers import Said, Speaker


def taught(
    photos: Photos, speakers: Sequence[Speaker], stage: Stage, *, device: torch.device, progress: Progress
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """The teachers' captions that a stage learns of each photo, and figures of them (see `best_captions`)."""
    said = [spoken(speaker, photos, stage.teacher_beam, device=device, progress=progress) for speaker in speakers]
    return best_captions(said, photos.examples, count=stage.teacher_captions, keep=stage.teacher_keep)


def taught_line(figures: dict[str, Any]) -> str:
    """The figures for people."""
    return (
        f"{figures['kept']:,} of the teachers' {figures['of']:,} captions, on {figures['photos']:,} photos; "
        f"CIDEr-D {figures['cider_kept']:.3f}, of all {figures['cider_all']:.3f}"
    )


def spoken(speaker: Speaker, photos: Photos, beam: int, *, device: torch.device, progress: Progress) -> list[Said]:
    """The speaker's captions of every photo as it is, best first; what is in the cache is not said again.

    The cache is KEY.jsonl, a line for each photo, flushed as it grows: a killed run goes on behind its last whole line.
    Raises EdgecapError where the cache cannot be written.
    """
    parts = {name: value for name, value in photos.identity.items() if name != "preprocess"}  # that is the student's
    key = cache_key(
        kind="captions", teacher=speaker.sha256, settings=speaker.settings, beam=beam, total=len(photos), **parts
    )
    file = cache_folder() / f"{key}.jsonl"
    try:
        return _spoken(file, speaker, photos, beam, device, progress)
    except OSError as error:
        why = error.strerror or error
        raise EdgecapError(
            f"the cache in {file.parent} cannot be written ({why}): set EDGECAP_CACHE to another folder"
        ) from error


def _spoken(
    file: Path, speaker: Speaker, photos: Photos, beam: int, device: torch.device, progress: Progress
) -> list[Said]:
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    phase = f"captions of {photos.split} by {Path(speaker.name).name}"
    with FileLock(file.with_suffix(".lock")):
        said = _whole_lines(file, len(photos))
        progress(phase, len(said), len(photos))
        if len(said) == len(photos):
            return said
        speaker.to(device)
        with open(file, "a", encoding="utf-8") as lines:
            for start in range(len(said), len(photos), CHUNK):
                new = speaker.captions(photos.examples[start : start + CHUNK], beam)
                lines.write("".join(f"{json.dumps(each)}\n" for each in new))
                lines.flush()
                said += new
                progress(phase, len(said), len(photos))
        speaker.to("cpu")  # what trains next needs the room
    return said


def _whole_lines(file: Path, total: int) -> list[Said]:
    """What a cache holds; what a killed process left of a line is cut off."""
    if not file.is_file():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        said = [[(str(text), float(logprob)) for text, logprob in json.loads(line)] for line in whole.splitlines()]
    except (ValueError, TypeError):  # not ours
        said = []
    said = said if len(said) <= total else []
    with open(file, "rb+") as lines:
        lines.truncate(len(whole) if said else 0)
    return said


def best_captions(
    said: Iterable[Sequence[Said]], examples: Sequence[Example], *, count: int, keep: float
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """Of what each teacher said of each photo, the captions to learn, and figures of them.

    A caption's score is its CIDEr-D against the photo's own captions, with the document frequencies of `examples`. Of
    each teacher's beam the `count` best are taken (as in Kim & Rush's sequence-level interpolation: the search's own
    favourites are often each other's paraphrases), and of all these, over photos and teachers, the best share `keep`: a
    photo that no teacher understood gets none. A share and not a least score, because CIDEr-D's size depends on the
    data. Captions that are empty, a photo's own, or another teacher's are left out first. Ties go to the earlier
    photo, teacher and place in the beam.

    Figures: how many were `kept` `of` all, of how many `photos`, and the mean CIDEr-D (0 to 10) of both, `cider_kept`
    and `cider_all`.
    """
    judge = CiderD([[caption_text(c).split() for c in example.captions] for example in examples])
    known = [{caption_text(c) for c in example.captions} | {""} for example in examples]
    places, texts, scores = [], [], []
    for teacher in said:
        for photo, captions in enumerate(teacher):
            new = {}
            for text, _ in captions:
                plain = caption_text(text)
                if plain not in known[photo]:
                    known[photo].add(plain)
                    new[plain] = text
            found = judge.score([photo] * len(new), [plain.split() for plain in new])
            for i in np.argsort(-found, kind="stable")[:count]:
                places.append(photo)
                texts.append(list(new.values())[i])
                scores.append(found[i])
    order = sorted(range(len(texts)), key=lambda i: (-scores[i], places[i]))[: round(keep * len(texts))]
    kept: list[tuple[str, ...]] = [()] * len(examples)
    for i in sorted(order):
        kept[places[i]] += (texts[i],)
    return kept, {
        "kept": len(order),
        "of": len(texts),
        "photos": sum(map(bool, kept)),
        "cider_kept": float(np.mean([scores[i] for i in order])) if order else 0.0,
        "cider_all": float(np.mean(scores)) if scores else 0.0,
    }
