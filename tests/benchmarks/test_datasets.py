"""Every reader against small folders drawn here: what it reads, and the one line it says of bad data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edgecap.benchmarks.datasets import READERS, SPLITS, open_dataset
from edgecap.benchmarks.datasets.splits import split_of
from edgecap.runtime.errors import EdgecapError

from .small_data import (
    CONTENT,
    WRITERS,
    content,
    draw,
    draw_all,
    message,
    photo,
    write_coco,
    write_csv,
    write_flickr8k,
)


def test_every_reader_has_a_writer_here():
    elsewhere = {"scenes", "fashion", "hf", "openimages"}  # test_scenes.py, test_readers.py
    assert {reader for reader, _ in WRITERS.values()} | elsewhere == set(READERS)


# --- good data -----------------------------------------------------------------------------------------


def test_reads_splits_captions_and_pictures(any_folder):
    spec, folder = any_folder
    dataset = open_dataset(spec, verify=True)
    assert content(dataset) == CONTENT
    assert dataset.spec == spec and dataset.skipped == () and set(dataset.splits) == set(SPLITS)
    example = dataset.splits["val"][0]
    assert example.load().size == (40, 30) and example.load().mode == "RGB"
    assert example.jpeg_path(folder / "elsewhere") == photo(folder, "c.jpg")
    ids = [example.id for examples in dataset.splits.values() for example in examples]
    assert len(set(ids)) == len(ids)


def test_fingerprint_stays_and_changes_with_the_data(any_folder):
    spec, folder = any_folder
    before = open_dataset(spec).fingerprint
    assert open_dataset(spec).fingerprint == before
    assert open_dataset(spec, skip_bad=True).fingerprint == before
    shutil.copytree(folder, folder.with_name("copy"))  # with times of its own
    os.utime(photo(folder.with_name("copy"), "a.jpg"), (1, 1))
    assert open_dataset(spec.replace(str(folder), str(folder.with_name("copy")))).fingerprint == before
    data = bytearray(photo(folder, "a.jpg").read_bytes())
    data[len(data) // 2] ^= 1
    photo(folder, "a.jpg").write_bytes(data)
    changed = open_dataset(spec).fingerprint
    draw(photo(folder, "a.jpg"), 201)
    redrawn = open_dataset(spec).fingerprint
    captions = [path for path in folder.rglob("*") if path.suffix in (".txt", ".csv", ".jsonl", ".json")]
    for path in captions:
        path.write_text(path.read_text().replace("two cats", "three cats"))
    reworded = open_dataset(spec).fingerprint
    assert len({before, changed, redrawn, reworded}) == 4


def test_bom_and_windows_newlines_are_tolerated(any_folder):
    spec, folder = any_folder
    for path in folder.rglob("*"):
        if path.suffix in (".txt", ".csv", ".jsonl"):
            text = path.read_bytes().decode().replace("\r\n", "\n")
            path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        elif path.suffix == ".json":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert content(open_dataset(spec)) == CONTENT


def test_flickr8k_tolerates_repeated_lines_spaces_and_unlisted_photos(tmp_path):
    write_flickr8k(tmp_path)
    (tmp_path / "images").rename(tmp_path / "Flicker8k_Dataset")
    tokens = tmp_path / "Flickr8k.token.txt"
    lines = tokens.read_text().splitlines()
    draw(tmp_path / "Flicker8k_Dataset" / "unlisted.jpg", 9)
    extra = ["", lines[0], "unlisted.jpg#0\tin no list", "2258277193_586949ec62.jpg.1#0\tnever existed"]
    tokens.write_text("\n".join(line + "  " for line in lines + extra))
    train = tmp_path / "Flickr_8k.trainImages.txt"
    train.write_text(train.read_text() + "a.jpg  \n\n")
    assert content(open_dataset(f"flickr8k:{tmp_path}")) == CONTENT


def test_folder_without_splits_hashes_names_and_keeps_copies_together(tmp_path):
    names = [f"photo{i:03d}.jpg" for i in range(120)]
    for i, name in enumerate(names):
        draw(tmp_path / name, 2 * i)
    # A copy whose own name would put it on the other side
    copy = next(f"photo{i}.jpg" for i in range(1000, 2000) if split_of(f"photo{i}.jpg") != split_of(names[0]))
    shutil.copy(tmp_path / names[0], tmp_path / copy)
    rows = ["image,caption\n", *(f"{name},a thing\n" for name in [copy, *names])]
    (tmp_path / "captions.csv").write_text("".join(rows))
    dataset = open_dataset(f"folder:{tmp_path}")
    place = {example.id: split for split, examples in dataset.splits.items() for example in examples}
    assert place[copy] == place[names[0]]
    assert {name: place[name] for name in names} == {name: split_of(name) for name in names}
    sizes = {split: len(examples) for split, examples in dataset.splits.items()}
    assert 80 <= sizes["train"] <= 112 and sizes["val"] >= 4 and sizes["test"] >= 4
    # Adding photos moves none
    (tmp_path / "captions.csv").write_text("".join(rows[:90]))
    fewer = open_dataset(f"folder:{tmp_path}")
    assert all(place[e.id] == split for split, examples in fewer.splits.items() for e in examples)


def test_coco_without_a_test_file_halves_val(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "annotations" / "captions_test2014.json").unlink()
    file = tmp_path / "annotations" / "captions_val2014.json"
    for id in range(40):
        draw(tmp_path / "val2014" / f"{id}.jpg", 3 * id)
    images = [{"id": id, "file_name": f"{id}.jpg"} for id in range(40)]
    annotations = [{"image_id": id, "caption": f"thing {id}"} for id in range(40)]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    dataset = open_dataset(f"coco:{tmp_path}")
    val, test = ({e.id for e in dataset.splits[split]} for split in ("val", "test"))
    assert val | test == {str(id) for id in range(40)} and not val & test
    assert 10 <= len(val) <= 30


# --- bad data: each is an error that names it, or is skipped and counted ----------------------------------


def break_missing(folder: Path) -> None:
    photo(folder, "b.jpg").unlink()


def break_empty(folder: Path) -> None:
    photo(folder, "b.jpg").write_bytes(b"")


def break_truncated(folder: Path) -> None:
    path = photo(folder, "b.jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_not_an_image(folder: Path) -> None:
    photo(folder, "b.jpg").write_text("<html>404</html>")


def break_copy_of_test(folder: Path) -> None:
    shutil.copy(photo(folder, "d.jpg"), photo(folder, "b.jpg"))


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (break_missing, "missing image file"),
        (break_empty, "empty image file"),
        (break_truncated, "b.jpg"),
        (break_not_an_image, "b.jpg"),
        (break_copy_of_test, "identical bytes"),
    ],
)
def test_bad_photo_is_an_error_or_skipped(any_folder, breaking, reason):
    spec, folder = any_folder
    breaking(folder)
    text = message(spec, verify=True)
    assert "1 bad example " in text and reason in text and "--skip-bad" in text
    dataset = open_dataset(spec, skip_bad=True)
    assert [example.path.name for example in dataset.splits["train"]] == ["a.jpg"]
    ((id, why),) = dataset.skipped
    assert reason in why and id in ("b.jpg", "98")
    assert content(dataset)["test"] == CONTENT["test"]  # of two copies the training one goes


def test_broken_photo_fails_when_loaded_if_not_verified(any_folder):
    spec, folder = any_folder
    break_truncated(folder)
    example = next(e for e in open_dataset(spec).splits["train"] if e.path.name == "b.jpg")
    with pytest.raises(EdgecapError, match="b.jpg"):
        example.load()


def test_many_bad_photos_are_counted_and_the_first_named(tmp_path):
    write_csv(tmp_path)
    with open(tmp_path / "captions.csv", "a") as file:
        file.writelines(f"gone{i}.jpg,lost,train\n" for i in range(9))
    text = message(f"folder:{tmp_path}")
    assert "9 bad examples" in text and "gone0.jpg" in text and "and 6 more" in text and len(text) < 400


def test_empty_split_is_an_error(any_folder):
    spec, folder = any_folder
    photo(folder, "c.jpg").unlink()
    text = message(spec, skip_bad=True)
    assert "val split is empty" in text and "1 bad example" in text


def test_photo_without_captions(tmp_path):
    write_flickr8k(tmp_path / "flickr")
    tokens = tmp_path / "flickr" / "Flickr8k.token.txt"
    tokens.write_text(tokens.read_text().replace("b.jpg#0\ttwo cats", "b.jpg#0\t "))
    write_csv_folder = tmp_path / "csv"
    write_csv(write_csv_folder)
    table = write_csv_folder / "captions.csv"
    table.write_text(table.read_text().replace("two cats", ""))
    write_coco(tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "captions_train2014.json"
    data = json.loads(file.read_text())
    data["annotations"] = [row for row in data["annotations"] if row["caption"] != "two cats"]
    file.write_text(json.dumps(data))
    for spec in (
        f"flickr8k:{tmp_path / 'flickr'}",
        f"folder:{write_csv_folder}",
        f"coco:{tmp_path / 'coco'}",
    ):
        assert "image without captions" in message(spec)
        assert len(open_dataset(spec, skip_bad=True).splits["train"]) == 1


def test_caption_without_an_image(tmp_path):
    write_flickr8k(tmp_path / "flickr")
    with open(tmp_path / "flickr" / "Flickr8k.token.txt", "a") as file:
        file.write("nowhere.jpg#0\ta ghost\n")
    write_csv(tmp_path / "csv")
    with open(tmp_path / "csv" / "captions.csv", "a") as file:
        file.write(",a ghost,train\n")
    write_coco(tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "captions_train2014.json"
    data = json.loads(file.read_text())
    data["annotations"].append({"image_id": 12345, "caption": "a ghost"})
    file.write_text(json.dumps(data))
    for name, spec in (
        ("nowhere.jpg", "flickr8k:flickr"),
        ("captions.csv:", "folder:csv"),
        ("12345", "coco:coco"),
    ):
        reader, _, folder = spec.partition(":")
        text = message(f"{reader}:{tmp_path / folder}")
        assert name in text and "caption without an image" in text
        assert len(open_dataset(f"{reader}:{tmp_path / folder}", skip_bad=True).splits["train"]) == 2


def test_same_name_in_two_splits(tmp_path):
    write_flickr8k(tmp_path / "flickr")
    with open(tmp_path / "flickr" / "Flickr_8k.trainImages.txt", "a") as file:
        file.write("d.jpg\n")
    write_csv(tmp_path / "csv")
    with open(tmp_path / "csv" / "captions.csv", "a") as file:
        file.write("d.jpg,again,train\n")
    for spec in (f"flickr8k:{tmp_path / 'flickr'}", f"folder:{tmp_path / 'csv'}"):
        assert "d.jpg: the same image is in test and train" in message(spec)
        dataset = open_dataset(spec, skip_bad=True)
        assert {e.id for e in dataset.splits["train"]} == {"a.jpg", "b.jpg"}
        assert {e.id for e in dataset.splits["test"]} == {"d.jpg"}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("photo,text\na.jpg,x\n", "image and caption"),
        ("", "image and caption"),
        (
            "image,caption,split\na.jpg,x,training\nb.jpg,y,holdout\n",
            "captions.csv:3: unknown split 'holdout'",
        ),
        ("image,caption,split\na.jpg,x,train\nb.jpg,y,\n", "captions.csv:3: no split"),
        (b"image,caption\na.jpg,caf\xe9\n", "UTF-8"),
    ],
)
def test_bad_csv(tmp_path, table, expected):
    draw_all(tmp_path)
    path = tmp_path / "captions.csv"
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    assert expected in message(f"folder:{tmp_path}")


@pytest.mark.parametrize("line", ["[1]", "{", '{"image": "a.jpg", "caption": 3}'])
def test_bad_jsonl_names_the_line(tmp_path, line):
    draw_all(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n\n' + line)
    assert "captions.jsonl:3" in message(f"folder:{tmp_path}")


def test_bad_coco_files(tmp_path):
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "captions_val2014.json"
    good = file.read_text()
    for bad, expected in [
        ("[]", "expected lists"),
        ("{", "not JSON"),
        (good.replace("file_name", "n"), "need id"),
    ]:
        file.write_text(bad)
        assert expected in message(f"coco:{tmp_path}") and file.name in message(f"coco:{tmp_path}")
    file.write_text(good)
    shutil.copy(file, file.with_name("captions_val2017.json"))
    assert "keep one year" in message(f"coco:{tmp_path}")
    shutil.rmtree(tmp_path / "annotations")
    assert "captions_train*.json" in message(f"coco:{tmp_path}")


def test_bad_flickr8k_files(tmp_path):
    write_flickr8k(tmp_path)
    tokens = tmp_path / "Flickr8k.token.txt"
    good = tokens.read_text()
    tokens.write_text(good + "a line without a number\n")
    assert "Flickr8k.token.txt:7: expected" in message(f"flickr8k:{tmp_path}")
    tokens.unlink()
    assert "cannot read" in message(f"flickr8k:{tmp_path}") and tokens.name in message(f"flickr8k:{tmp_path}")
    shutil.rmtree(tmp_path / "images")
    assert "Flicker8k_Dataset" in message(f"flickr8k:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "flikr8k:x", "scenes2", ":x"])
def test_unknown_reader_lists_the_choices(spec):
    text = message(spec)
    assert all(reader.usage in text for reader in READERS.values())


@pytest.mark.parametrize("reader", [name for name in READERS if name != "scenes"])
def test_absent_folder_is_one_line(reader, tmp_path):
    assert "no such folder" in message(f"{reader}:{tmp_path / 'nowhere'}")
    assert READERS[reader].usage in message(reader)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in message(f"{reader}:{tmp_path / 'empty'}")


# --- real photos -----------------------------------------------------------------------------------------


def test_real_flickr8k_has_its_official_counts():
    root = Path(os.environ.get("EDGECAP_DATA", Path(__file__).parents[2] / ".." / "shared"))
    folder = root / "data" / "flickr8k"
    if not folder.is_dir():
        pytest.skip(f"no Flickr8k at {folder}: set EDGECAP_DATA to the folder that holds data/flickr8k")
    dataset = open_dataset(f"flickr8k:{folder}")
    assert {split: len(examples) for split, examples in dataset.splits.items()} == {
        "train": 6000, "val": 1000, "test": 1000,
    }  # fmt: skip
    assert all(len(e.captions) == 5 for examples in dataset.splits.values() for e in examples)
    assert dataset.skipped == ()
    assert dataset.splits["test"][0].load().mode == "RGB"
