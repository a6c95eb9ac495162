"""Reader for data sets of the Hugging Face hub (or of the same layout on disk), through the `datasets` package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...devices.local import cache_folder
from ...runtime.errors import EdgecapError, UsageError, need
from .base import Dataset
from .checks import Row, build_dataset, clean_caption, hash_fraction
from .options import parse_place, whole_number
from .splits import SPLIT_NAMES, split_of
from .streamed import Store, photo_bytes

USAGE = "hf:ID[:SPLIT][?limit=N,image=COLUMN,caption=COLUMN+COLUMN,config=NAME,revision=NAME]"
OPTIONS = ("limit", "image", "caption", "config", "revision")
LIKELY = ("text", "sentences", "sentence", "raw", "description", "title")  # where no column is called caption…


def open_hf(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Stream a data set once into files under the cache folder; later calls read those, without the network.

    ID is a hub id or a local folder. The photos are the column of type Image, the captions the text columns called
    caption…, or text, sentences and so on; `image=` and `caption=` name others. limit: rows read of each split.
    Splits are taken by their names. Where there is one alone, or SPLIT names one, photos go to train, val or test by a
    hash of their bytes, 80/10/10; where val is missing, a tenth of train is val; where test is, half of val is test.
    `Dataset.notes` says what was taken. What was streamed when a run was stopped is used by the next.
    """
    place, options = parse_place(argument, USAGE, OPTIONS)
    id, only = _parse_id(place)
    limit = whole_number(options, "limit")
    store = Store(cache_folder() / "hf" / _key(id, options))
    try:
        wanted = [only] if only else store.splits()
        if not wanted or not all(store.holds(split, limit) for split in wanted):
            wanted = _stream(id, only, options, limit, store, spec)
        found = {split: store.rows(split)[:limit] for split in wanted}
    except OSError as error:
        why = error.strerror or error
        raise EdgecapError(f"{store.folder} cannot be used ({why}): set EDGECAP_CACHE to another folder") from error

    places, note = _places(found, spec)
    problems: list[tuple[str, str]] = []
    captions: dict[tuple[str, str], dict[str, None]] = {}
    for split in places:
        for number, row in enumerate(found[split]):
            if row["image"] is None:
                problems.append((f"{split} row {number}", "missing image file"))
                continue
            texts = [text for text in map(clean_caption, row["captions"]) if text]
            captions.setdefault((_place(places, split, row["image"]), row["image"]), {}).update(dict.fromkeys(texts))
    rows = [Row(place, image, store.images / image, tuple(said)) for (place, image), said in captions.items()]
    return build_dataset("hf", spec, rows, problems, skip_bad=skip_bad, verify=verify, notes=(note,))


def _parse_id(place: str) -> tuple[str, str]:
    """'owner/name:test' → ("owner/name", "test")."""
    id, split = place, ""
    if not Path(place).expanduser().is_dir() and ":" in place:
        id, _, split = place.rpartition(":")
    if not id:
        raise UsageError(f"data set needs an id or a folder: write {USAGE}")
    folder = Path(id).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), split
    if folder.is_absolute() or id.startswith("."):
        raise UsageError(f"no such folder: {folder} (asked for by hf:{place})")
    return id, split


def _key(id: str, options: Mapping[str, str]) -> str:
    """The cache's name: what is read, and from where; of a folder also which files lie there now."""
    parts: list[Any] = [id, sorted((key, value) for key, value in options.items() if key != "limit")]
    if Path(id).is_dir():
        files = sorted(path for path in Path(id).rglob("*") if path.is_file())
        stats = [(path.relative_to(id).as_posix(), path.stat()) for path in files]
        parts += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _stream(
    id: str, only: str, options: Mapping[str, str], limit: int | None, store: Store, spec: str
) -> list[str]:  # fmt: skip
    """Bring the rows that are missing into the store; the names of the splits that were read."""
    need("datasets", extra="hf", command=f"reading {spec}")
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.utils.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # its retries, a line each: what failed in the end is told below
    try:
        loaded = datasets.load_dataset(id, options.get("config"), revision=options.get("revision"), streaming=True)
        streams = {name: loaded[name] for name in loaded}
    except Exception as error:  # of many kinds: absent, gated, offline, no data files, an old script
        raise UsageError(
            f"{spec} cannot be read ({_line(error)}): check the id and the connection, or give a folder with its files"
        ) from None
    if only and only not in streams:
        raise UsageError(f"{spec}: no split {only!r}; it has {', '.join(streams)}")
    if not only:
        # With splits that have a place here, the others ("extra", "unlabeled") are not worth streaming.
        known = [name for name in streams if name.lower() in SPLIT_NAMES]
        store.remember(known or list(streams))
    names = [only] if only else store.splits()
    for name in names:
        if store.holds(name, limit):
            continue
        number = store.count(name)
        rows = _rows(streams[name], name, number, options, spec)
        with store.writer(name) as write:
            while limit is None or number < limit:
                row = next(rows, None)
                if row is None:
                    write.end()
                    break
                write.row(*row)
                number += 1
    return names


def _rows(
    stream: Any, split: str, start: int, options: Mapping[str, str], spec: str
) -> Iterator[tuple[bytes | None, list[str]]]:
    """(the photo's file, captions) of a stream from row `start`; EdgecapError, saying where, when it breaks off."""
    import datasets

    number = start
    try:
        features = stream.features or _guess(next(iter(stream), {}))
        image, texts = _columns(_kinds(features), options, spec)
        if isinstance(features[image], datasets.Image):
            stream = stream.cast_column(image, datasets.Image(decode=False))  # the file's own bytes
        for row in stream.skip(start):
            yield photo_bytes(row[image]), [text for column in texts for text in _texts(row[column])]
            number += 1
    except EdgecapError:
        raise
    except Exception as error:  # whatever the package's many sources raise halfway
        why = _line(error)
        raise EdgecapError(
            f"{spec}: reading stopped in {split} at row {number} ({why}): run it again to go on"
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _guess(row: Mapping[str, Any]) -> dict[str, Any]:
    """Features of a stream that declares none, from its first row."""
    import datasets

    return {
        name: {"bytes": None} if isinstance(value, dict) and "bytes" in value
        else datasets.Image() if hasattr(value, "convert")
        else datasets.Value("string") if isinstance(value, str)
        else datasets.List(datasets.Value("string")) if isinstance(value, list) and value and isinstance(value[0], str)
        else datasets.Value("null")
        for name, value in row.items()
    }  # fmt: skip


def _kinds(features: Mapping[str, Any]) -> dict[str, str]:
    """Column → "image", "text" or ""."""
    import datasets

    def kind(feature: Any) -> str:
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
            return "image"
        inner = getattr(feature, "feature", feature)  # of a list
        return "text" if isinstance(inner, datasets.Value) and "string" in inner.dtype else ""

    return {name: kind(feature) for name, feature in features.items()}


def _columns(kinds: Mapping[str, str], options: Mapping[str, str], spec: str) -> tuple[str, list[str]]:
    """The photos' column and the captions' columns; UsageError where they are not plain to see."""
    has = f"it has {', '.join(f'{name} ({kind})' if kind else name for name, kind in kinds.items())}"
    images = [options["image"]] if "image" in options else [name for name, kind in kinds.items() if kind == "image"]
    if len(images) != 1 or kinds.get(images[0]) != "image":
        raise UsageError(f"{spec}: name the column of the photos with ?image=COLUMN; {has}")
    texts = [name for name, kind in kinds.items() if kind == "text"]
    if "caption" in options:
        chosen = options["caption"].split("+")
    else:
        chosen = [name for name in texts if name.lower().startswith("caption")]
        chosen = chosen or [name for likely in LIKELY for name in texts if name.lower() == likely][:1]
        chosen = chosen or (texts if len(texts) == 1 else [])
    if not chosen or not set(chosen) <= set(texts):
        raise UsageError(f"{spec}: name the columns of the captions with ?caption=COLUMN+COLUMN; {has}")
    return images[0], chosen


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]


def _places(found: Mapping[str, Any], spec: str) -> tuple[dict[str, str], str]:
    """Split there → rule for where its photos go here, and that in words."""
    if len(found) == 1:
        (name,) = found
        return {name: "hash"}, f"splits: {name} cut 80/10/10 by hash of the photos"
    places = {name: SPLIT_NAMES[name.lower()] for name in found if name.lower() in SPLIT_NAMES}
    there = set(places.values())
    if "train" not in there or len(there) == 1:
        raise UsageError(f"{spec}: no train, val and test among its splits {', '.join(found)}: name one behind a colon")
    for name, place in places.items():
        if place == "train" and "val" not in there:
            places[name] = "train and val"
        elif place == "val" and "test" not in there:
            places[name] = "val and test"
    return places, f"splits: {', '.join(f'{name} is {place}' for name, place in places.items())}"


def _place(places: Mapping[str, str], split: str, image: str) -> str:
    rule = places[split]
    if rule == "hash":
        return split_of(image)
    if rule == "train and val":
        return "train" if hash_fraction(image) < 0.9 else "val"
    if rule == "val and test":
        return "val" if hash_fraction(image) < 0.5 else "test"
    return rule
