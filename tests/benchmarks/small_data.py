"""Small data sets of every kind that is a folder, drawn for the tests, and what opening a bad one says."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgecap.benchmarks.datasets import Dataset, open_dataset
from edgecap.runtime.errors import UsageError

# What every small folder holds: split → {photo: captions}
CONTENT = {
    "train": {"a.jpg": ["A red dog runs .", "a dog"], "b.jpg": ["two cats"]},
    "val": {"c.jpg": ["a bird on a wire"]},
    "test": {"d.jpg": ["the sea", "a wave breaks"]},
}


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    image.paste((shade, 255 - shade, 60), (5, 5, 20, 20))
    image.save(path, quality=90)


def draw_all(folder: Path) -> None:
    names = [name for photos in CONTENT.values() for name in photos]
    for i, name in enumerate(names):
        draw(folder / name, 50 * i)


def write_flickr8k(folder: Path) -> None:
    draw_all(folder / "images")
    lists = {"train": "trainImages", "val": "devImages", "test": "testImages"}
    lines = []
    for split, photos in CONTENT.items():
        (folder / f"Flickr_8k.{lists[split]}.txt").write_text("".join(f"{name}\n" for name in photos))
        lines += [f"{name}#{i}\t{text}" for name, texts in photos.items() for i, text in enumerate(texts)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")


def write_csv(folder: Path) -> None:
    draw_all(folder)
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        writer.writerows(
            (name, text, split) for split, photos in CONTENT.items() for name, texts in photos.items() for text in texts
        )


def write_jsonl(folder: Path) -> None:
    draw_all(folder / "images")
    lines = [
        json.dumps({"image": name, "captions": texts, "split": split})
        for split, photos in CONTENT.items()
        for name, texts in photos.items()
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def write_coco(folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    for split, photos in CONTENT.items():
        images, annotations = [], []
        for name, texts in photos.items():
            id = ord(name[0])
            draw(folder / f"{split}2014" / name, 2 * (id - 90))
            images.append({"id": id, "file_name": name})
            annotations += [{"image_id": id, "id": 0, "caption": text} for text in texts]
        file = folder / "annotations" / f"captions_{split}2014.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations}))


def write_karpathy(folder: Path) -> None:
    write_coco(folder)
    shutil.rmtree(folder / "annotations")
    images = [
        {
            "filepath": f"{split}2014",
            "filename": name,
            "split": "restval" if name == "b.jpg" else split,
            "cocoid": ord(name[0]),
            "sentences": [{"raw": text} for text in texts],
        }
        for split, photos in CONTENT.items()
        for name, texts in photos.items()
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))


def write_flickr30k(folder: Path) -> None:
    draw_all(folder / "flickr30k_images")
    lines = ["image_name| comment_number| comment"]
    for photos in CONTENT.values():
        lines += [f"{name}| {i}| {text}" for name, texts in photos.items() for i, text in enumerate(texts)]
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    images = [{"filename": name, "split": split} for split, photos in CONTENT.items() for name in photos]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flickr8k": ("flickr8k", write_flickr8k),
    "flickr30k": ("flickr30k", write_flickr30k),
    "csv": ("folder", write_csv),
    "jsonl": ("folder", write_jsonl),
    "coco": ("coco", write_coco),
    "karpathy": ("coco", write_karpathy),
}


def photo(folder: Path, name: str) -> Path:
    (found,) = folder.rglob(name)
    return found


def content(dataset: Dataset) -> dict[str, dict[str, list[str]]]:
    return {
        split: {example.path.name: list(example.captions) for example in examples if example.path}
        for split, examples in dataset.splits.items()
    }


def message(spec: str, **options: bool) -> str:
    """The one line that opening `spec` fails with."""
    with pytest.raises(UsageError) as caught:
        open_dataset(spec, **options)
    assert "\n" not in str(caught.value)
    return caught.value.message


def sizes(dataset: Dataset) -> dict[str, int]:
    """Photos per split."""
    return {split: len(examples) for split, examples in dataset.splits.items()}


def everything(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """Captions by id, of all splits."""
    return {example.id: example.captions for examples in dataset.splits.values() for example in examples}


def png(number: int) -> bytes:
    """A small photo's file, of other bytes for each number from 0 to 65535."""
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize((24, 18)).convert("RGB")
    image.paste((number % 256, number // 256, 60), (5, 5, 15, 15))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_command(*arguments: str) -> Result:
    """What `edgecap data` does."""
    from edgecap.cli import cli

    return CliRunner().invoke(cli, ["data", *arguments])
