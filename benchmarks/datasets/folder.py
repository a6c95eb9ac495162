"""Reader for a folder of photos with `captions.csv` or `captions.jsonl`: the way in for anyone's own data."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from ...runtime.errors import UsageError
from .base import Dataset
from .checks import (
    Row,
    build_dataset,
    clean_caption,
    hash_fraction,
    identical_files,
    read_lines,
    require_folder,
)

USAGE = "folder:DIR"
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
Entry = tuple[str, dict[str, object]]  # (where, for messages; the columns by lower-case name)


def open_folder(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Read rows of image, caption and, optionally, split; an image may have several rows.

    Images are paths from the folder (or from its `images/`); they are the ids. In JSON lines, `caption` may
    also be a list, or be called `captions`. Without a split column every image goes to train, val or test by
    a hash of its name, 80/10/10: it stays there when others are added, and copies of one photo stay together.
    """
    folder = require_folder(argument, USAGE)
    tables = [folder / name for name in ("captions.csv", "captions.jsonl") if (folder / name).is_file()]
    if len(tables) != 1:
        what = "both captions.csv and captions.jsonl: keep one" if tables else "no captions.csv or captions.jsonl"
        raise UsageError(f"{folder} has {what}")
    table = tables[0]
    entries = list(_read_csv(table) if table.suffix == ".csv" else _read_jsonl(table))

    problems: list[tuple[str, str]] = []
    captions: dict[str, list[str]] = {}
    places: dict[str, dict[str, None]] = {}  # image → its splits, in order
    with_split = {bool(_text(columns, "split")) for _, columns in entries}
    if len(with_split) > 1:
        where = next(where for where, columns in entries if not _text(columns, "split"))
        raise UsageError(f"{where}: no split, but other rows have one: give every row a split, or none")
    for where, columns in entries:
        image = _text(columns, "image").replace("\\", "/")
        if not image:
            problems.append((where, "caption without an image"))
            continue
        found = captions.setdefault(image, [])
        found += [caption for caption in _captions(columns, where) if caption not in found]
        if with_split == {True}:
            written = _text(columns, "split").lower()
            if written not in SPLIT_NAMES:
                raise UsageError(f"{where}: unknown split {written!r}: choose from train, val, test")
            places.setdefault(image, {})[SPLIT_NAMES[written]] = None

    paths = {image: _find(folder, image) for image in captions}
    if with_split != {True}:
        places = {image: {split: None} for image, split in _split_by_hash(paths).items()}
    rows = [
        Row(split, image, paths[image], tuple(found)) for image, found in captions.items() for split in places[image]
    ]
    return build_dataset("folder", spec, rows, problems, skip_bad=skip_bad, verify=verify)


def split_of(key: str, train: float = 0.8, val: float = 0.1) -> str:
    """The split a key falls into by its hash alone."""
    fraction = hash_fraction(key)
    return "train" if fraction < train else "val" if fraction < train + val else "test"


def _split_by_hash(paths: dict[str, Path]) -> dict[str, str]:
    images = sorted(paths)
    leader = {image: image for image in images}
    # Copies under other names must not end up on both sides: all follow the first of them.
    present = [(paths[image], paths[image].stat().st_size, image) for image in images if paths[image].is_file()]
    for group in identical_files(present):
        for i in group:
            leader[present[i][2]] = present[group[0]][2]
    return {image: split_of(leader[image]) for image in images}


def _find(folder: Path, image: str) -> Path:
    path = folder / image
    inside = folder / "images" / image
    return inside if not path.is_file() and inside.is_file() else path


def _read_csv(table: Path) -> Iterator[Entry]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            header = [name.strip().lower() for name in next(reader, [])]
            for need in ("image", "caption"):
                if need not in header:
                    raise UsageError(f"{table}: the first line must name the columns image and caption (split too)")
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield f"{table.name}:{reader.line_num}", dict(zip(header, fields, strict=False))
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {table}: it is not UTF-8 text") from None
    except csv.Error as error:
        raise UsageError(f"cannot read {table}: {error}") from None


def _read_jsonl(table: Path) -> Iterator[Entry]:
    for number, line in enumerate(read_lines(table), 1):
        if not line:
            continue
        where = f"{table.name}:{number}"
        try:
            columns = json.loads(line)
        except ValueError:
            columns = None
        if not isinstance(columns, dict):
            raise UsageError(f"{table}:{number}: expected a JSON object with image and caption")
        yield where, {key.lower(): value for key, value in columns.items()}


def _text(columns: dict[str, object], name: str) -> str:
    value = columns.get(name)
    return "" if value is None else str(value).strip()


def _captions(columns: dict[str, object], where: str) -> list[str]:
    value = columns.get("caption", columns.get("captions"))
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, str) for item in values):
        raise UsageError(f"{where}: caption must be text or a list of texts")
    return [caption for caption in map(clean_caption, values) if caption]
