"""Reader for Flickr30k (Young et al., 2014): results.csv and the photo folder, with Karpathy's split where it is."""

from __future__ import annotations

import re
from pathlib import Path

from ...runtime.errors import UsageError
from .base import SPLITS, Dataset
from .checks import Row, build_dataset, clean_caption, read_json, read_lines, require_folder
from .splits import split_of

USAGE = "flickr30k:DIR"
KARPATHY = "dataset_flickr30k.json"
FOLDERS = ("flickr30k_images/flickr30k_images", "flickr30k_images", "images")
HEADER = ["image_name", "comment_number", "comment"]
PHOTOS, HELD_OUT = 31783, 1000  # all photos, and how many of them val and test have each
# The published file has one row, of 2199044548.jpg, without the delimiter behind the number.
UNPARTED = re.compile(r"\s*(\d+)\s+(\S.*)")


def open_flickr30k(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Read `results.csv` (`image_name| comment_number| comment`); ids are file names.

    Where `dataset_flickr30k.json` (Karpathy & Fei-Fei, 2015: 29,000/1,014/1,000) lies in DIR, its splits are used and
    photos that it leaves out are unused. Else a photo goes to train, val or test by a hash of its name, in the shares
    29,783 : 1,000 : 1,000. `Dataset.notes` says which.
    """
    folder = require_folder(argument, USAGE)
    places = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    if not places:
        raise UsageError(f"{folder} has no photo folder: expected one of {', '.join(FOLDERS)}")
    table = next((path for path in (folder / "results.csv", places[-1] / "results.csv") if path.is_file()), None)
    captions = _read_captions(table or folder / "results.csv")
    photos = next((place for place in places if (place / next(iter(captions), "")).is_file()), places[0])

    if (folder / KARPATHY).is_file():
        splits = _read_karpathy(folder / KARPATHY)
        note = f"splits: {KARPATHY}"
    else:
        splits = {name: split_of(name, 1 - 2 * HELD_OUT / PHOTOS, HELD_OUT / PHOTOS) for name in captions}
        note = f"splits: by hash of the file name (no {KARPATHY})"
    rows = [Row(split, name, photos / name, tuple(captions.get(name, ()))) for name, split in splits.items()]
    problems = [
        (name, "caption without an image")
        for name in captions
        if name not in splits and not (photos / name).is_file()
    ]  # fmt: skip
    return build_dataset("flickr30k", spec, rows, problems, skip_bad=skip_bad, verify=verify, notes=(note,))


def _read_captions(table: Path) -> dict[str, list[str]]:
    lines = read_lines(table)
    if [name.strip() for name in lines[0].split("|")] != HEADER:
        raise UsageError(f"{table}: the first line must be {'| '.join(HEADER)}")
    captions: dict[str, list[str]] = {}
    seen = set()
    for number, line in enumerate(lines[1:], 2):
        if not line or line in seen:  # repeated lines are the same caption, number included
            continue
        seen.add(line)
        name, *rest = line.split("|", 2)
        if len(rest) == 1 and (parts := UNPARTED.fullmatch(rest[0])):
            rest = list(parts.groups())
        if len(rest) != 2 or not name.strip() or not rest[0].strip().isdecimal():
            raise UsageError(f"{table}:{number}: expected 'photo.jpg| 0| caption', found {line[:60]!r}")
        found = captions.setdefault(name.strip(), [])
        if caption := clean_caption(rest[1]):
            found.append(caption)
    return captions


def _read_karpathy(file: Path) -> dict[str, str]:
    try:
        splits = {str(image["filename"]): image["split"] for image in read_json(file, ("images",))["images"]}
    except (KeyError, TypeError):
        raise UsageError(f"{file}: each image needs filename and split") from None
    for split in splits.values():
        if split not in SPLITS:
            raise UsageError(f"{file}: unknown split {split!r}: choose from {', '.join(SPLITS)}")
    return splits
