"""Reader for COCO captions (Chen et al., 2015): annotation files and image folders, or Karpathy's split."""

from __future__ import annotations

from pathlib import Path

from ...runtime.errors import UsageError
from .base import Dataset
from .checks import Row, build_dataset, clean_caption, hash_fraction, read_json, require_folder

USAGE = "coco:DIR"
KARPATHY = "dataset_coco.json"
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
Found = tuple[list[Row], list[tuple[str, str]]]  # rows; (id, reason) of what has no place


def open_coco(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Read `annotations/captions_{train,val[,test]}*.json`; ids are the image ids.

    Without a test file the validation images are halved into val and test by a hash of their ids. Where
    `dataset_coco.json` (Karpathy & Fei-Fei, 2015) is in DIR or DIR/annotations, its splits are used.
    """
    folder = require_folder(argument, USAGE)
    for karpathy in (folder / KARPATHY, folder / "annotations" / KARPATHY):
        if karpathy.is_file():
            rows, problems = _read_karpathy(folder, karpathy)
            return build_dataset("coco", spec, rows, problems, skip_bad=skip_bad, verify=verify)

    files = {split: _annotation_file(folder, split) for split in ("train", "val", "test")}
    for split in ("train", "val"):
        if files[split] is None:
            raise UsageError(f"{folder} has no annotations/captions_{split}*.json and no {KARPATHY}")
    rows, problems = [], []
    for split, file in files.items():
        if file is not None:
            found, strays = _read_annotations(folder, file, split, halve=split == "val" and files["test"] is None)
            rows += found
            problems += strays
    return build_dataset("coco", spec, rows, problems, skip_bad=skip_bad, verify=verify)


def _annotation_file(folder: Path, split: str) -> Path | None:
    found = sorted((folder / "annotations").glob(f"captions_{split}*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{folder / 'annotations'} has several files for {split} ({names}): keep one year")
    return found[0] if found else None


def _read_annotations(folder: Path, file: Path, split: str, *, halve: bool) -> Found:
    data = read_json(file, ("images", "annotations"))
    try:
        names = {str(image["id"]): str(image["file_name"]) for image in data["images"]}
        captions: dict[str, list[str]] = {id: [] for id in names}
        problems = []
        for annotation in data["annotations"]:
            id, caption = str(annotation["image_id"]), clean_caption(annotation["caption"])
            if id not in captions:
                problems.append((f"{file.name} image {id}", "caption without an image"))
            elif caption:
                captions[id].append(caption)
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{file}: images need id and file_name, annotations need image_id and caption") from None
    year_folder = file.stem.removeprefix("captions_")  # captions_train2014.json ↔ train2014/
    folders = _image_folders(folder, year_folder, split)
    rows = []
    for id, name in names.items():
        place = ("val" if hash_fraction(id) < 0.5 else "test") if halve else split
        rows.append(Row(place, id, _find(folders, name), tuple(captions[id])))
    return rows, problems


def _read_karpathy(folder: Path, file: Path) -> Found:
    data = read_json(file, ("images",))
    rows = []
    folders: dict[tuple[str, str], list[Path]] = {}
    try:
        for image in data["images"]:
            written = image["split"]
            if written not in KARPATHY_SPLITS:
                raise UsageError(f"{file}: unknown split {written!r}: choose from {', '.join(KARPATHY_SPLITS)}")
            split, place = KARPATHY_SPLITS[written], image.get("filepath", "")
            if (place, split) not in folders:
                folders[place, split] = _image_folders(folder, place, split)
            captions = [clean_caption(sentence["raw"]) for sentence in image["sentences"]]
            id = str(image.get("cocoid", image["filename"]))
            rows.append(Row(split, id, _find(folders[place, split], image["filename"]), tuple(filter(None, captions))))
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{file}: each image needs filename, split and sentences with raw text") from None
    return rows, []


def _image_folders(folder: Path, first: str, split: str) -> list[Path]:
    """Where the images of a split may lie: train2014/, images/train2014/, train2017/, ..., images/, DIR."""
    names = dict.fromkeys(filter(None, (first, f"{split}2014", f"{split}2017", split)))
    places = [place / name for name in names for place in (folder, folder / "images")]
    return [place for place in (*places, folder / "images", folder) if place.is_dir()]


def _find(folders: list[Path], name: str) -> Path:
    return next((path for path in (place / name for place in folders) if path.is_file()), folders[0] / name)
