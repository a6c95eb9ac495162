"""Photos with captions: one table of readers, one way to open them all."""

from __future__ import annotations

from ...runtime.errors import UsageError
from . import coco, fashion, flickr8k, flickr30k, folder, huggingface, openimages, scenes
from .base import SPLITS, Dataset, Example, Reader

__all__ = ["READERS", "SPLITS", "Dataset", "Example", "Reader", "open_dataset"]

READERS: dict[str, Reader] = {
    "scenes": Reader(scenes.USAGE, "built-in labelled scenes, drawn from a seed", scenes.open_scenes),
    "flickr8k": Reader(flickr8k.USAGE, "Flickr8k: token file, three lists, photos", flickr8k.open_flickr8k),
    "flickr30k": Reader(flickr30k.USAGE, "Flickr30k: results.csv, photos", flickr30k.open_flickr30k),
    "folder": Reader(folder.USAGE, "a folder with captions.csv or captions.jsonl", folder.open_folder),
    "coco": Reader(coco.USAGE, "COCO captions: annotations/*.json, image folders", coco.open_coco),
    "fashion": Reader(fashion.USAGE, "fashion products: fashion.csv, images/", fashion.open_fashion),
    "hf": Reader(huggingface.USAGE, "a data set of the Hugging Face hub, or a local one", huggingface.open_hf),
    "openimages": Reader(openimages.USAGE, "Open Images through FiftyOne", openimages.open_openimages),
}


def open_dataset(
    spec: str, *, skip_bad: bool = False, verify: bool | None = None, photos_alone: bool = False
) -> Dataset:
    """Open `NAME` or `NAME:ARGUMENT` (see READERS).

    `skip_bad` leaves bad examples out (they are in `Dataset.skipped`) instead of failing. `verify` decodes
    every image now instead of when it is loaded; by default that is done where bad ones are to be skipped,
    because they must be known beforehand. `photos_alone`: photos without captions will do. UsageError, one
    line, for a spec that names no reader, and for data that are not as they should be.
    """
    name, _, argument = spec.strip().partition(":")
    reader = READERS.get(name)
    if reader is None:
        choices = ", ".join(reader.usage for reader in READERS.values())
        raise UsageError(f"unknown data set {spec!r}: choose from {choices}")
    dataset = reader.open(argument, spec, skip_bad, skip_bad if verify is None else verify)
    if not (dataset.captioned or photos_alone):
        raise UsageError(
            f"{spec} holds photos alone, no captions to learn from or to score against: write the photos with "
            "edgecap data --sample, caption them with edgecap caption --json, and use the folder"
        )
    return dataset
