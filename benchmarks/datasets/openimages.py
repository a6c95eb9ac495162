"""Reader for Open Images (Kuznetsova et al., 2020) through FiftyOne: captions from its boxes, or photos alone."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...runtime.errors import UsageError, need
from .base import Dataset
from .checks import Row, build_dataset
from .options import choice, parse_place, whole_number

USAGE = "openimages:[DIR][?limit=N,classes=NAME+NAME,captions=labels|none]"
SPLITS_THERE = {"train": "train", "validation": "val", "test": "test"}
MOST_KINDS = 3  # things a caption names: those that cover most of the photo
NUMBERS = ("no", "one", "two", "three", "four", "five")
PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese",
    "knife": "knives", "loaf": "loaves", "shelf": "shelves", "bookshelf": "bookshelves", "leaf": "leaves",
    "sheep": "sheep", "fish": "fish", "deer": "deer", "aircraft": "aircraft",
}  # fmt: skip
UNCOUNTED = {"clothing", "furniture", "food", "jeans", "glasses", "goggles", "scissors", "shorts", "trousers"}
PARTS = ("human ",)  # "Human face", "Human arm": boxes within a person's box


def open_openimages(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Read DIR/{train,validation,test}/{data,labels,metadata}, the layout in which FiftyOne downloads Open Images V7.

    DIR is by default where FiftyOne keeps it (~/fiftyone/open-images-v7). limit: at most so many photos of each split,
    and those that are not there are downloaded; without it nothing is. classes: only photos that show one of them.
    captions: "labels" composes one caption from the boxes (photos without boxes are left out), "none" gives photos
    alone for a teacher to caption. Ids are Open Images' own.
    """
    place, options = parse_place(argument, USAGE, ("limit", "classes", "captions"))
    limit = whole_number(options, "limit")
    labelled = choice(options, "captions", ("labels", "none")) == "labels"
    classes = options["classes"].split("+") if "classes" in options else None
    home = os.environ.get("FIFTYONE_DATASET_ZOO_DIR") or Path.home() / "fiftyone"
    folder = Path(place).expanduser() if place else Path(home) / "open-images-v7"
    if limit is None and not folder.is_dir():
        raise UsageError(f"no such folder: {folder}: name one, or have photos downloaded there: {USAGE}")
    if limit is None and not any((folder / name / "data").is_dir() for name in SPLITS_THERE):
        raise UsageError(f"{folder} has no train/data, validation/data or test/data: add ?limit=N to download some")
    need("fiftyone", extra="openimages", command=f"reading {spec}")

    rows, bare = [], 0
    for there, split in SPLITS_THERE.items():
        for path, boxes in _read(folder / there, there, classes, limit, spec):
            caption = compose(boxes) if labelled else ""
            if labelled and not caption:
                bare += 1
                continue
            rows.append(Row(split, path.stem, path, (caption,) if caption else ()))
    notes = (f"{bare} photos without boxes are left out",) if bare else ()
    return build_dataset(
        "openimages", spec, rows, skip_bad=skip_bad, verify=verify, captioned=labelled, notes=notes
    )  # fmt: skip


def _read(
    folder: Path, split: str, classes: list[str] | None, limit: int | None, spec: str
) -> Iterable[tuple[Path, list[Any]]]:
    """(photo, its FiftyOne detections) of one split."""
    from fiftyone.utils import openimages

    logging.getLogger("fiftyone").setLevel(logging.ERROR)
    asked = {"label_types": ["detections"], "classes": classes, "max_samples": limit}
    try:
        if limit is not None:
            openimages.download_open_images_split(str(folder), split, version="v7", **asked)
        if not (folder / "data").is_dir():
            return []
        importer = openimages.OpenImagesV7DatasetImporter(str(folder), include_id=False, **asked)
        importer.setup()
        return [(Path(path), list(label.detections) if label else []) for path, _, label in importer]
    except Exception as error:  # the package raises many kinds, from the network's to pandas'
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        done = "downloaded" if limit is not None else "read"
        raise UsageError(f"{spec}: the {split} split in {folder} cannot be {done} ({why})") from None


def compose(boxes: Iterable[Any]) -> str:
    """'a photo of a dog and two people' from detections (label; bounding_box x, y, width, height in 0..1; IsGroupOf).

    Things are named in the order of the area their boxes cover, at most MOST_KINDS of them; parts of people are not.
    '' without boxes.
    """
    counts: Counter[str] = Counter()
    areas: dict[str, float] = defaultdict(float)
    crowds = set()
    for box in boxes:
        name = box.label.lower()
        if name.startswith(PARTS):
            continue
        counts[name] += 1
        areas[name] += box.bounding_box[2] * box.bounding_box[3]
        if getattr(box, "IsGroupOf", False):
            crowds.add(name)
    largest = sorted(counts, key=lambda name: (-areas[name], name))[:MOST_KINDS]
    things = [_counted(name, counts[name], crowd=name in crowds) for name in largest]
    if not things:
        return ""
    listed = f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]
    return f"a photo of {listed}"


def _counted(name: str, count: int, *, crowd: bool) -> str:
    if name.split()[-1] in UNCOUNTED:
        return name
    if crowd or count >= len(NUMBERS):
        return f"several {plural(name)}"
    if count > 1:
        return f"{NUMBERS[count]} {plural(name)}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """'christmas tree' → 'christmas trees'."""
    *before, last = name.split()
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])
