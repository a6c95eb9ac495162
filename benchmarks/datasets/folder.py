"""Reader for a folder of photos with `captions.csv` or `captions.jsonl`: the way in for anyone's own data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...runtime.errors import UsageError
from .base import Dataset
from .checks import Row, build_dataset, clean_caption, read_lines, require_folder
from .splits import SPLIT_NAMES, split_together
from .tables import read_csv

USAGE = "folder:DIR"
Entry = tuple[str, Mapping[str, object]]  # (where, for messages; the columns by lower-case name)


def open_folder(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Read rows of image, caption and, optionally, split; an image may have several rows.

    Images are paths from the folder (or from its `images/`); they are the ids. In JSON lines, `caption` may also be a
    list, or be called `captions`; lines of `edgecap caption --json` (`source`, `text`) are read, too. Without a split
    column every image goes to train, val or test by a hash of its name, 80/10/10: it stays there when others are added,
    and copies of one photo stay together.
    """
    folder = require_folder(argument, USAGE)
    tables = [folder / name for name in ("captions.csv", "captions.jsonl") if (folder / name).is_file()]
    if len(tables) != 1:
        what = "both captions.csv and captions.jsonl: keep one" if tables else "no captions.csv or captions.jsonl"
        raise UsageError(f"{folder} has {what}")
    table = tables[0]
    entries: list[Entry] = list(
        read_csv(table, ("image", "caption"), "image and caption (split too)")
        if table.suffix == ".csv"
        else _read_jsonl(table)
    )

    problems: list[tuple[str, str]] = []
    captions: dict[str, list[str]] = {}
    places: dict[str, dict[str, None]] = {}  # image → its splits, in order
    with_split = {bool(_text(columns, "split")) for _, columns in entries}
    if len(with_split) > 1:
        where = next(where for where, columns in entries if not _text(columns, "split"))
        raise UsageError(f"{where}: no split, but other rows have one: give every row a split, or none")
    for where, columns in entries:
        image = (_text(columns, "image") or _text(columns, "source")).replace("\\", "/")
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
        places = {
            image: {split: None} for image, split in split_together(paths, {image: (image,) for image in paths}).items()
        }
    rows = [
        Row(split, image, paths[image], tuple(found)) for image, found in captions.items() for split in places[image]
    ]
    return build_dataset("folder", spec, rows, problems, skip_bad=skip_bad, verify=verify)


def _find(folder: Path, image: str) -> Path:
    # The last: `edgecap caption folder --json` names photos from where it ran.
    places = (folder / image, folder / "images" / image, folder / Path(image).name)
    return next((path for path in places if path.is_file()), places[0])


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


def _text(columns: Mapping[str, object], name: str) -> str:
    value = columns.get(name)
    return "" if value is None else str(value).strip()


def _captions(columns: Mapping[str, object], where: str) -> list[str]:
    value = next((columns[name] for name in ("caption", "captions", "text") if name in columns), None)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, str) for item in values):
        raise UsageError(f"{where}: caption must be text or a list of texts")
    return [caption for caption in map(clean_caption, values) if caption]
