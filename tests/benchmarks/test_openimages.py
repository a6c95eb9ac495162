"""The reader of Open Images: with FiftyOne where it is installed, else with a stand-in of its importer."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from edgecap.benchmarks.datasets import SPLITS, open_dataset
from edgecap.benchmarks.datasets.openimages import compose as compose_boxes
from edgecap.runtime.errors import MissingExtra

from .small_data import data_command, draw, everything, message, sizes

BOXES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CLASSES = {"/m/1": "Dog", "/m/2": "Person", "/m/3": "Human face", "/m/4": "Apple"}


def write_openimages(folder: Path) -> Path:
    """DIR/SPLIT/{data,labels,metadata}, as FiftyOne downloads Open Images: in train three photos, else one each."""
    boxes = {
        "train": {"t0": [("/m/1", 0.5, 0), ("/m/2", 0.2, 0), ("/m/2", 0.2, 0)], "t1": [("/m/4", 0.3, 1)], "t2": []},
        "validation": {"v0": [("/m/1", 0.5, 0), ("/m/3", 0.9, 0)]},
        "test": {"e0": [("/m/2", 0.5, 0)]},
    }
    for number, (split, photos) in enumerate(boxes.items()):
        lines = [BOXES]
        for at, (id, found) in enumerate(photos.items()):
            draw(folder / split / "data" / f"{id}.jpg", 60 * number + 9 * at)
            lines += [
                f"{id},xclick,{label},1,0.1,{0.1 + side},0,{side},0,0,{group},0,0" for label, side, group in found
            ]
        for name, text in (
            ("labels/detections.csv", "\n".join(lines)),
            ("metadata/classes.csv", "\n".join(f"{key},{name}" for key, name in CLASSES.items())),
            ("metadata/hierarchy.json", "{}"),
        ):
            (folder / split / name).parent.mkdir(exist_ok=True)
            (folder / split / name).write_text(text + "\n")
    return folder


class StandInImporter:
    """Stands for fiftyone.utils.openimages.OpenImagesV7DatasetImporter where FiftyOne is not installed."""

    def __init__(self, dataset_dir, label_types=None, classes=None, include_id=True, max_samples=None):
        assert label_types == ["detections"] and not include_id
        self.folder, self.classes, self.most = Path(dataset_dir), classes, max_samples

    def setup(self):
        self.names = dict(csv.reader(open(self.folder / "metadata" / "classes.csv")))
        self.boxes = list(csv.DictReader(open(self.folder / "labels" / "detections.csv")))

    def __iter__(self):
        found = []
        for path in sorted((self.folder / "data").iterdir()):
            boxes = [
                types.SimpleNamespace(
                    label=self.names[row["LabelName"]],
                    bounding_box=[0.1, 0, float(row["XMax"]) - float(row["XMin"]), float(row["YMax"])],
                    IsGroupOf=row["IsGroupOf"] == "1",
                )
                for row in self.boxes
                if row["ImageID"] == path.stem
            ]
            if not self.classes or {box.label for box in boxes} & set(self.classes):
                found.append((str(path), None, types.SimpleNamespace(detections=boxes) if boxes else None))
        return iter(found[: self.most])


@pytest.fixture
def fiftyone(monkeypatch):
    """The real package where it is installed, else a stand-in with the interface of its Open Images importer."""
    if importlib.util.find_spec("fiftyone"):
        from fiftyone.utils import openimages

        return openimages
    package, utils, module = (types.ModuleType(f"fiftyone{tail}") for tail in ("", ".utils", ".utils.openimages"))
    for loaded in (package, utils, module):
        loaded.__spec__ = importlib.util.spec_from_loader(loaded.__name__, None)
        monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    utils.openimages = module
    module.OpenImagesV7DatasetImporter = StandInImporter
    module.download_open_images_split = lambda *_, **__: None
    return module


def test_openimages_captions_come_from_the_boxes(tmp_path, fiftyone):
    spec = f"openimages:{write_openimages(tmp_path)}"
    dataset = open_dataset(spec, verify=True)
    assert everything(dataset) == {
        "t0": ("a photo of a dog and two people",),
        "t1": ("a photo of several apples",),
        "v0": ("a photo of a dog",),
        "e0": ("a photo of a person",),
    }
    assert sizes(dataset) == {"train": 2, "val": 1, "test": 1}
    assert dataset.notes == ("1 photos without boxes are left out",)
    assert data_command(spec).exit_code == 0
    dogs = open_dataset(f"{spec}?classes=Dog+Person")
    assert set(everything(dogs)) == {"t0", "v0", "e0"}


def test_openimages_photos_alone_are_for_a_teacher(tmp_path, fiftyone):
    spec = f"openimages:{write_openimages(tmp_path / 'set')}?captions=none"
    assert "photos alone, no captions" in message(spec)  # what train, eval and bench say
    dataset = open_dataset(spec, photos_alone=True)
    assert not dataset.captioned and everything(dataset) == dict.fromkeys(("t0", "t1", "t2", "v0", "e0"), ())
    look = tmp_path / "look"
    result = data_command(spec, "--sample", "9", "-o", str(look))
    assert result.exit_code == 0 and "5 photos written" in result.output, result.output
    assert not (look / "captions.jsonl").exists() and len(list(look.glob("*.jpg"))) == 5
    # What `edgecap caption look --json` prints, run from elsewhere, makes the folder a data set.
    lines = [json.dumps({"source": f"look/{path.name}", "text": f"saying {path.stem}"}) for path in look.glob("*.jpg")]
    (look / "captions.jsonl").write_text("\n".join(lines))
    assert len(_folder_rows(look)) == 5


def _folder_rows(folder: Path) -> dict[str, tuple[str, ...]]:
    """All photos of a folder, whatever splits their hashes give: the same lines with splits written."""
    table = folder / "captions.jsonl"
    rows = [json.loads(line) | {"split": SPLITS[i % 3]} for i, line in enumerate(table.read_text().splitlines())]
    table.write_text("\n".join(map(json.dumps, rows)))
    return everything(open_dataset(f"folder:{folder}"))


def test_openimages_downloads_only_with_a_limit(tmp_path, fiftyone, monkeypatch):
    asked = []

    def download(folder, split, **options):
        asked.append((Path(folder).name, split, options))
        if len(asked) == 1:
            write_openimages(tmp_path / "zoo" / "open-images-v7")

    monkeypatch.setattr(fiftyone, "download_open_images_split", download)
    monkeypatch.setenv("FIFTYONE_DATASET_ZOO_DIR", str(tmp_path / "zoo"))
    text = message("openimages:")
    assert "no such folder" in text and "limit=N" in text and not asked
    dataset = open_dataset("openimages:?limit=1")
    assert sizes(dataset) == {"train": 1, "val": 1, "test": 1}
    options = {"version": "v7", "label_types": ["detections"], "classes": None, "max_samples": 1}
    assert asked == [(split, split, options) for split in ("train", "validation", "test")]

    def unreachable(*_, **__):
        raise ConnectionError("Failed to resolve 'storage.googleapis.com'\nand more")

    monkeypatch.setattr(fiftyone, "download_open_images_split", unreachable)
    assert "cannot be downloaded (Failed to resolve" in message("openimages:?limit=2")


def test_openimages_bad_data_are_one_line(tmp_path, fiftyone):
    folder = write_openimages(tmp_path / "set")
    spec = f"openimages:{folder}"
    assert "captions='yes' is none of labels, none" in message(f"{spec}?captions=yes")
    (tmp_path / "empty").mkdir()
    assert "has no train/data" in message(f"openimages:{tmp_path / 'empty'}")
    photo = folder / "train" / "data" / "t1.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    assert "t1" in message(spec, verify=True)
    assert [id for id, _ in open_dataset(spec, skip_bad=True).skipped] == ["t1"]
    (folder / "test" / "metadata" / "classes.csv").unlink()
    (folder / "test" / "labels" / "detections.csv").write_text("")
    assert "the test split in" in message(spec) and "cannot be read" in message(spec)


def test_openimages_missing_package_is_one_line(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fiftyone" else real(name, *rest)
    )
    with pytest.raises(MissingExtra, match=r"pip install 'edgecap\[openimages\]'"):
        open_dataset(f"openimages:{write_openimages(tmp_path)}")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["Dog"], "a photo of a dog"),
        (["Dog"] * 3, "a photo of three dogs"),
        (["Dog"] * 9, "a photo of several dogs"),
        (["Apple", "Human arm"], "a photo of an apple"),
        (["Food", "Knife", "Knife"], "a photo of two knives and food"),
        (["Christmas tree"] * 2 + ["Toy"] * 2 + ["Box"] * 2, "a photo of two boxes, two christmas trees and two toys"),
        (["Human face"], ""),
    ],
)
def test_openimages_caption_of_labels(labels, said):
    boxes = [types.SimpleNamespace(label=label, bounding_box=[0, 0, 0.5, 0.5]) for label in labels]
    assert compose_boxes(boxes) == said


def test_openimages_names_the_largest_things_first():
    sides = {"Car": 0.2, "Tree": 0.9, "Bird": 0.05, "House": 0.5}
    boxes = [types.SimpleNamespace(label=name, bounding_box=[0, 0, side, side]) for name, side in sides.items()]
    assert compose_boxes(boxes) == "a photo of a tree, a house and a car"
