"""Sequence-level distillation: what teachers say of the training photos, computed once and kept, and the best of it
(Kim & Rush 2016, arXiv:1606.07947).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...benchmarks.datasets import Example
from ...benchmarks.metrics import CiderD
from ...runtime.progress import Progress
from ..data.batches import Photos
from ..data.cache import CHUNK, cache_key, writing
from ..settings import Stage
from ..tokenizer import caption_text
from .base import place
from .captioners import CaptionTeacher, Hypotheses


def teacher_captions(
    photos: Photos, teachers: Sequence[CaptionTeacher], stage: Stage, *, device: torch.device, progress: Progress
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """The teachers' captions that a stage learns of each photo, and figures of them (see `best_captions`), those of
    each teacher with its `path`."""
    beams = [generate(teacher, photos, stage.teacher_beam, device=device, progress=progress) for teacher in teachers]
    kept, figures = best_captions(beams, photos.examples, count=stage.teacher_captions, keep=stage.teacher_keep)
    pairs = zip(teachers, figures["teachers"], strict=True)
    return kept, {**figures, "teachers": [{"path": place(teacher.name), **own} for teacher, own in pairs]}


def figures_line(figures: dict[str, Any]) -> str:
    """The figures for people."""
    each = "; ".join(
        f"{Path(own['path']).name} {own['kept']:,} of {own['of']:,}, first of its beams {own['cider_first']:.3f}"
        for own in figures["teachers"]
    )
    return (
        f"{figures['kept']:,} of the teachers' {figures['of']:,} captions, on {figures['photos']:,} photos; "
        f"CIDEr-D {figures['cider_kept']:.3f}, of all {figures['cider_all']:.3f} ({each})"
    )


def with_captions(told: dict[str, Any], learnt: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is told of a teacher, and under `captions` its own figures of each stage that learnt its captions."""
    captions = [
        {"stage": row["stage"], **{key: value for key, value in own.items() if key != "path"}}
        for row in learnt.values()
        for own in row.get("teachers", ())
        if own["path"] == told["path"]
    ]
    return told | ({"captions": captions} if captions else {})


def generate(
    teacher: CaptionTeacher, photos: Photos, beam: int, *, device: torch.device, progress: Progress
) -> list[Hypotheses]:
    """The teacher's captions of every photo as it is, best first; what is in the cache is not computed again.

    The cache is KEY.jsonl, a line for each photo, flushed as it grows: a killed run goes on behind its last whole
    chunk, so that the search sees the same batches. The key knows the photos, not their captions.
    Raises EdgecapError where the cache cannot be written.
    """
    key = cache_key(kind="captions", teacher=teacher.settings, beam=beam, photos=photos.content)
    with writing() as folder:
        return _generate(folder / f"{key}.jsonl", teacher, photos, beam, device, progress)


def _generate(
    file: Path, teacher: CaptionTeacher, photos: Photos, beam: int, device: torch.device, progress: Progress
) -> list[Hypotheses]:
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    phase = f"captions of {photos.split} by {Path(teacher.name).name}"
    with FileLock(file.with_suffix(".lock")):
        found = _whole_chunks(file, len(photos))
        progress(phase, len(found), len(photos))
        with open(file, "a", encoding="utf-8") as lines:
            for start in range(len(found), len(photos), CHUNK):
                new = teacher.captions(photos.examples[start : start + CHUNK], beam, device)
                lines.write("".join(f"{json.dumps(each)}\n" for each in new))
                lines.flush()
                found += new
                progress(phase, len(found), len(photos))
    return found


def _whole_chunks(file: Path, total: int) -> list[Hypotheses]:
    """What a cache holds; what a killed process left of a chunk is cut off."""
    if not file.is_file():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    count = sum(line.endswith(b"\n") for line in lines)
    whole = lines[: count if count >= total else count // CHUNK * CHUNK]
    try:
        found = [[(str(text), float(logprob)) for text, logprob in json.loads(line)] for line in whole]
    except (ValueError, TypeError):  # not ours
        found = []
    found = found if len(found) <= total else []
    with open(file, "rb+") as kept:
        kept.truncate(sum(map(len, whole)) if found else 0)
    return found


def best_captions(
    beams: Iterable[Sequence[Hypotheses]], examples: Sequence[Example], *, count: int, keep: float
) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """Of what each teacher says of each photo, the captions to learn, and figures of them.

    A caption's score is its CIDEr-D against the photo's own captions, with the document frequencies of `examples`. Of
    each teacher's beam the `count` best are taken (as in Kim & Rush's sequence-level interpolation: the search's own
    favourites are often each other's paraphrases), and of all these, over photos and teachers, the best share `keep`: a
    photo that no teacher understood gets none. A share and not a least score, because CIDEr-D's size depends on the
    data. Captions that are empty, a photo's own, or another teacher's are left out first. Ties go to the earlier
    photo, teacher and place in the beam.

    Figures: how many were `kept` `of` all, of how many `photos`, and the mean CIDEr-D (0 to 10) of both, `cider_kept`
    and `cider_all`; `teachers`: of each its share in `kept` and `of`, and `cider_first`, the mean of the first captions
    of its beams, whatever became of them.
    """
    judge = CiderD([[caption_text(c).split() for c in example.captions] for example in examples])
    known = [{caption_text(c) for c in example.captions} | {""} for example in examples]
    places, texts, scores, sources, firsts = [], [], [], [], []
    for source, teacher in enumerate(beams):
        begun = [(photo, caption_text(captions[0][0])) for photo, captions in enumerate(teacher) if captions]
        first = judge.score([photo for photo, _ in begun], [plain.split() for _, plain in begun])
        firsts.append(float(np.mean(first)) if begun else 0.0)
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
                sources.append(source)
    order = sorted(range(len(texts)), key=lambda i: (-scores[i], places[i]))[: round(keep * len(texts))]
    kept: list[tuple[str, ...]] = [()] * len(examples)
    for i in sorted(order):
        kept[places[i]] += (texts[i],)
    kept_of = Counter(sources[i] for i in order)
    return kept, {
        "kept": len(order),
        "of": len(texts),
        "photos": sum(map(bool, kept)),
        "cider_kept": float(np.mean([scores[i] for i in order])) if order else 0.0,
        "cider_all": float(np.mean(scores)) if scores else 0.0,
        "teachers": [
            {"kept": kept_of[source], "of": sources.count(source), "cider_first": first}
            for source, first in enumerate(firsts)
        ],
    }
