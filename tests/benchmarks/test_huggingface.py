"""The reader of 🤗 data sets, offline: data sets of the hub's own layouts, made here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from edgecap.benchmarks.datasets import open_dataset
from edgecap.runtime.errors import EdgecapError, MissingExtra

from .small_data import data_command, everything, message, png, sizes


def write_parquet(folder: Path, splits: dict[str, list[dict]]) -> Path:
    """A data set as the hub keeps them: columns of type Image and text in data/SPLIT-00000-of-00001.parquet."""
    datasets = pytest.importorskip("datasets")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        table = datasets.Dataset.from_dict(columns)
        for name in columns:
            if name.startswith(("image", "photo")):
                table = table.cast_column(name, datasets.Image())
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def photo_rows(start: int, count: int) -> list[dict]:
    return [
        {"image": {"bytes": png(number), "path": None}, "caption": [f"thing {number}", f"object {number}"]}
        for number in range(start, start + count)
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    return tmp_path / "cache"


def test_hf_reads_splits_photos_and_captions(tmp_path, cache):
    rows = {"train": photo_rows(0, 6), "validation": photo_rows(6, 2), "test": photo_rows(8, 3)}
    folder = write_parquet(tmp_path / "set", rows)
    dataset = open_dataset(f"hf:{folder}", verify=True)
    assert sizes(dataset) == {"train": 6, "val": 2, "test": 3}
    assert {example.captions for example in dataset.splits["val"]} == {
        ("thing 6", "object 6"),
        ("thing 7", "object 7"),
    }
    # The file's own bytes, not decoded and encoded again
    assert {e.path.read_bytes() for e in dataset.splits["val"]} == {png(6), png(7)}
    assert dataset.notes == ("splits: train is train, validation is val, test is test",)
    assert sizes(open_dataset(f"hf:{folder}?limit=2")) == {"train": 2, "val": 2, "test": 2}
    result = data_command(f"hf:{folder}", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["splits"]["train"]["captions"] == 12


def test_hf_is_streamed_once_and_goes_on_where_it_stopped(tmp_path, cache, monkeypatch):
    import edgecap.benchmarks.datasets.huggingface as huggingface

    folder = write_parquet(tmp_path / "set", {"train": photo_rows(0, 30)})
    whole = open_dataset(f"hf:{folder}").fingerprint
    (cache / "hf").rename(cache / "before")

    read = Counter()
    real = huggingface.photo_bytes

    def counting(value, breaks_at=None):
        read["rows"] += 1
        if read["rows"] == breaks_at:
            raise ConnectionResetError("the line is dead")
        return real(value)

    monkeypatch.setattr(huggingface, "photo_bytes", lambda value: counting(value, breaks_at=13))
    with pytest.raises(EdgecapError, match="stopped in train at row 12 .*the line is dead.*run it again"):
        open_dataset(f"hf:{folder}")
    (store,) = (cache / "hf").iterdir()
    with open(store / "train.jsonl", "ab") as file:
        file.write(b'{"image": "half a li')  # what a killed run may leave
    read.clear()
    monkeypatch.setattr(huggingface, "photo_bytes", counting)
    assert open_dataset(f"hf:{folder}").fingerprint == whole and read["rows"] == 18
    # From now on neither the package nor the network is needed.
    monkeypatch.setattr(huggingface, "_stream", None)
    assert open_dataset(f"hf:{folder}").fingerprint == whole
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize(
    ("there", "note", "expected"),
    [
        (("train",), "train cut 80/10/10", (40, 90, 1, 30)),
        (("train", "test"), "train is train and val, test is test", (40, 60, 1, 20)),
        (("train", "validation"), "validation is val and test", (60, 60, 20, 40)),
    ],
)
def test_hf_makes_the_splits_that_are_missing(tmp_path, cache, there, note, expected):
    folder = write_parquet(tmp_path / "set", {name: photo_rows(60 * i, 60) for i, name in enumerate(there)})
    dataset = open_dataset(f"hf:{folder}")
    assert note in dataset.notes[0]
    fewest_train, most_train, fewest_val, most_val = expected
    counts = sizes(dataset)
    assert sum(counts.values()) == 60 * len(there)
    assert fewest_train <= counts["train"] <= most_train and fewest_val <= counts["val"] <= most_val
    named = open_dataset(f"hf:{folder}:train")
    assert sum(sizes(named).values()) == 60 and "cut 80/10/10" in named.notes[0]


def test_hf_finds_columns_or_is_told_them(tmp_path, cache):
    rows = [
        {
            "image": {"bytes": png(i), "path": None},
            "photo": {"bytes": png(100 + i), "path": None},
            "caption_0": f"one {i}",
            "caption_1": f"two {i}",
            "url": f"http://{i}",
        }
        for i in range(40)
    ]
    spec = f"hf:{write_parquet(tmp_path / 'set', {'train': rows})}"
    assert "?image=COLUMN" in message(spec) and "photo (image)" in message(spec)
    both = open_dataset(f"{spec}?image=photo")
    assert everything(both)[both.splits["test"][0].id][0].startswith("one")
    assert all(len(captions) == 2 for captions in everything(both).values())
    one = open_dataset(f"{spec}?image=image,caption=url,limit=35")
    assert sum(sizes(one).values()) == 35 and all(c[0].startswith("http") for c in everything(one).values())
    assert "?caption=COLUMN" in message(f"{spec}?image=image,caption=alt")
    assert "no split 'test'; it has train" in message(f"{spec}:test?image=image")
    assert "limit='0'" in message(f"{spec}?limit=0")


def test_hf_image_folder_with_a_row_per_caption(tmp_path, cache):
    pytest.importorskip("datasets")
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    lines = ["file_name,text"]
    for number in range(40):
        (folder / f"{number}.png").write_bytes(png(number))
        lines.append(f"{number}.png,thing {number}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    dataset = open_dataset(f"hf:{tmp_path / 'set'}")
    digest = hashlib.sha256(png(7)).hexdigest()[:24]
    assert everything(dataset)[f"{digest}.png"] == ("thing 7",)
    rows = [{"image": {"bytes": png(i // 2), "path": None}, "text": f"saying {i}"} for i in range(80)]
    pairs = open_dataset(f"hf:{write_parquet(tmp_path / 'pairs', {'train': rows})}")
    assert len(everything(pairs)) == 40 and everything(pairs)[f"{digest}.png"] == ("saying 14", "saying 15")


def test_hf_bad_rows_are_named_or_skipped(tmp_path, cache):
    rows = {"train": photo_rows(0, 9), "validation": photo_rows(20, 3), "test": photo_rows(30, 3)}
    rows["train"][1]["image"] = None
    rows["train"][2]["caption"] = [" ", ""]
    rows["train"][3]["image"]["bytes"] = png(3)[:60]
    rows["train"].append(rows["train"][4])  # twice the same
    rows["train"].append(rows["test"][0])
    spec = f"hf:{write_parquet(tmp_path / 'set', rows)}"
    text = message(spec, verify=True)
    assert "4 bad examples" in text and "train row 1: missing image file" in text
    dataset = open_dataset(spec, skip_bad=True)
    assert sizes(dataset) == {"train": 6, "val": 3, "test": 3}
    reasons = " ".join(reason for _, reason in dataset.skipped)
    assert "image without captions" in reasons and "the same image is in test and train" in reasons


def test_hf_that_cannot_be_read_is_one_line(tmp_path, cache, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in message(f"hf:{tmp_path / 'empty'}")
    assert "no such folder" in message(f"hf:{tmp_path / 'nowhere'}") and "write hf:ID" in message("hf")
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nLocalEntryNotFoundError")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    text = message("hf:owner/name:test")
    assert "hf:owner/name:test cannot be read (Couldn't reach" in text and "check the id and the connection" in text
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else real(name, *rest)
    )
    with pytest.raises(MissingExtra, match=r"pip install 'edgecap\[hf\]'"):
        open_dataset("hf:owner/name")


def test_hf_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    folder = write_parquet(tmp_path / "set", {"train": photo_rows(0, 3)})
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "file"))
    with pytest.raises(EdgecapError, match="set EDGECAP_CACHE to another folder"):
        open_dataset(f"hf:{folder}")
