"""A data set in a few numbers, and a sample of it to look at."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .base import Dataset

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")  # quicker than the metrics' tokenizer, and only to give an impression


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Per split: photos, captions, different words, the captions' mean length in words; of val and test also
    `new_words`, the share of their running words that never occur in train."""
    known: set[str] = set()
    splits: dict[str, dict[str, float]] = {}
    for split, examples in dataset.splits.items():
        counts = Counter(len(example.captions) for example in examples)
        words = Counter(
            word for example in examples for text in example.captions for word in WORD.findall(text.lower())
        )
        captions = sum(number * photos for number, photos in counts.items())
        row: dict[str, float] = {
            "photos": len(examples),
            "captions": captions,
            "fewest_captions": min(counts, default=0),
            "most_captions": max(counts, default=0),
            "words": len(words),
            "mean_length": round(words.total() / max(1, captions), 2),
        }
        if split == "train":
            known = set(words)
        elif words:
            new = sum(number for word, number in words.items() if word not in known)
            row["new_words"] = round(new / words.total(), 4)
        splits[split] = row
    return {
        "data": dataset.spec,
        "reader": dataset.name,
        "fingerprint": dataset.fingerprint,
        "splits": splits,
        "notes": list(dataset.notes),
        "skipped": [{"id": id, "reason": reason} for id, reason in dataset.skipped],
    }


def write_sample(dataset: Dataset, count: int, folder: Path) -> list[Path]:
    """Write `count` photos of each split, spread evenly over it, as JPEG with a `captions.jsonl`.

    What it writes can be read back as `folder:DIR`. Of photos alone there is no `captions.jsonl`: it is for what
    `edgecap caption --json` will say of them. Returns the photos' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, lines = [], []
    for split, examples in dataset.splits.items():
        count_here = min(count, len(examples))
        for i in range(count_here):
            example = examples[i * len(examples) // count_here]
            path = folder / f"{split}_{example.file_stem}.jpg"
            if example.path is None:
                path.write_bytes(example.jpeg())
            else:
                example.load().save(path, format="JPEG", quality=95, subsampling=0)
            paths.append(path)
            lines.append(json.dumps({"image": path.name, "split": split, "captions": example.captions}))
    if dataset.captioned:
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths
