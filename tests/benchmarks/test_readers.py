"""The readers of fashion products and Flickr30k, and what readers with options share."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from edgecap.benchmarks.datasets import open_dataset
from edgecap.benchmarks.datasets.fashion import compose
from edgecap.benchmarks.datasets.splits import split_of
from edgecap.benchmarks.metrics import ptb_tokenize
from edgecap.runtime.errors import UsageError

from .small_data import data_command, draw, everything, message, png, sizes, write_flickr30k

# --- fashion ---------------------------------------------------------------------------------------------

COLUMNS = "ProductId,Gender,Category,SubCategory,ProductType,Colour,Usage,ProductTitle,Image".split(",")


def write_fashion(folder: Path, titles: int = 30, extra: list[list[str]] | None = None) -> Path:
    """Three photos of each product, their titles written in three ways that the metrics take for one."""
    rows = []
    for number in range(titles):
        for copy, title in enumerate(
            (f"Brand Girls Top {number}", f"brand girls top {number}.", f"Brand Girls  Top, {number}")
        ):
            name = f"{number}_{copy}.jpg"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / "images" / name).write_bytes(png(256 * copy + number))
            rows.append([name, "Girls", "Apparel", "Topwear", "Tops", "White", "Casual", title, name])
    with open(folder / "fashion.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows, *(extra or [])])
    return folder


def test_fashion_captions_are_titles_columns_or_both(tmp_path):
    write_fashion(tmp_path)
    title, columns, both = (
        everything(open_dataset(f"fashion:{tmp_path}{option}"))["4_1.jpg"]
        for option in ("", "?caption=columns", "?caption=both")
    )
    assert title == ("brand girls top 4.",)
    assert columns == ("a casual white top for girls",)
    assert both == title + columns
    prints = {open_dataset(f"fashion:{tmp_path}{o}").fingerprint for o in ("", "?caption=columns", "?caption=both")}
    assert len(prints) == 3 and open_dataset(f"fashion:{tmp_path}?caption=title").fingerprint in prints


def test_fashion_splits_by_product(tmp_path):
    """Titles that are one to the metrics, and copies of a photo under another title, stay on one side."""
    write_fashion(tmp_path)
    first = (tmp_path / "images" / "0_0.jpg").read_bytes()
    other = next(f"Jeans {i}" for i in range(99) if split_of(f"jeans {i}") != split_of("brand girls top 0"))
    (tmp_path / "images" / "copy.jpg").write_bytes(first)
    write_fashion(tmp_path, extra=[["x", "Men", "", "", "Jeans", "Blue", "Casual", other, "copy.jpg"]])
    dataset = open_dataset(f"fashion:{tmp_path}")
    assert sum(sizes(dataset).values()) == 91 and min(sizes(dataset).values()) >= 3
    where = {example.id: split for split, examples in dataset.splits.items() for example in examples}
    assert all(len({where[f"{number}_{copy}.jpg"] for copy in range(3)}) == 1 for number in range(30))
    assert where["copy.jpg"] == where["0_0.jpg"]
    # Photos and titles added later move none.
    write_fashion(tmp_path, titles=45)
    later = {e.id: split for split, examples in open_dataset(f"fashion:{tmp_path}").splits.items() for e in examples}
    alone = [id for id in where if id != "copy.jpg" and not id.startswith("0_")]
    assert {id: later[id] for id in alone} == {id: where[id] for id in alone}


@pytest.mark.parametrize(
    ("kind", "colour", "usage", "gender", "said"),
    [
        ("Tops", "White", "Casual", "Girls", "a casual white top for girls"),
        ("Tshirts", "Navy Blue", "Sports", "Men", "a navy blue sports t-shirt for men"),
        ("Casual Shoes", "Brown", "Casual", "Men", "a pair of brown casual shoes for men"),
        ("Flip Flops", "Orange", "NA", "Unisex", "a pair of orange flip flops"),
        ("Dresses", "Orange", "", "Women", "an orange dress for women"),
        ("Innerwear Vests", "Multi", "Ethnic", "Boys", "an ethnic multicolored innerwear vest for boys"),
        ("", "Orange", "Casual", "Women", ""),
    ],
)
def test_fashion_composes_a_sentence_from_the_columns(kind, colour, usage, gender, said):
    assert compose({"producttype": kind, "colour": colour, "usage": usage, "gender": gender}) == said


def test_fashion_bad_rows_are_named_or_skipped(tmp_path):
    extra = [
        ["x", "Men", "", "", "Jeans", "Blue", "Casual", "No photo", "gone.jpg"],
        ["x", "Men", "", "", "Jeans", "Blue", "Casual", "No name", ""],
        ["x", "Men", "", "", "Jeans", "Blue", "Casual", "", "9_0.jpg_untitled"],
        ["x", "Girls", "Apparel", "Topwear", "Tops", "White", "Casual", "Brand Girls Top 3", "3_0.jpg"],  # again
        ["x", "Men", "", "", "Jeans", "Blue", "Casual", "Broken", "broken.jpg"],
    ]
    write_fashion(tmp_path, extra=extra)
    draw(tmp_path / "images" / "9_0.jpg", 251)
    (tmp_path / "images" / "9_0.jpg").rename(tmp_path / "images" / "9_0.jpg_untitled")
    draw(tmp_path / "images" / "9_0.jpg", 252)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    assert "3 bad examples" in message(f"fashion:{tmp_path}")
    text = message(f"fashion:{tmp_path}", verify=True)
    assert "4 bad examples" in text and "fashion.csv:93: caption without an image" in text
    dataset = open_dataset(f"fashion:{tmp_path}", skip_bad=True)
    reasons = dict(dataset.skipped)
    assert reasons["gone.jpg"] == "missing image file"
    assert reasons["9_0.jpg_untitled"] == "image without captions"
    assert "broken.jpg" in reasons["broken.jpg"] and len(reasons) == 4
    assert everything(dataset)["3_0.jpg"] == ("Brand Girls Top 3",)
    # Composed from the columns, the photo without a title has its caption.
    columns = open_dataset(f"fashion:{tmp_path}?caption=columns", skip_bad=True)
    assert everything(columns)["9_0.jpg_untitled"] == ("a pair of casual blue jeans for men",)


def test_fashion_bad_tables_and_options_are_one_line(tmp_path):
    write_fashion(tmp_path)
    spec = f"fashion:{tmp_path}"
    assert "caption='alt' is none of title, columns, both" in message(f"{spec}?caption=alt")
    assert "has no option 'captions=title'" in message(f"{spec}?captions=title")
    assert "no such folder" in message(f"{spec}/nowhere?caption=title")
    table = tmp_path / "fashion.csv"
    good = table.read_text()
    table.write_text(good.replace("Colour", "Color"))
    assert "Colour" in message(f"{spec}?caption=both")
    assert len(everything(open_dataset(spec))) == 90  # titles need no colour
    table.write_text(good.replace("ProductTitle", "Title"))
    assert "Image, ProductTitle" in message(spec)
    table.write_bytes(good.encode() + b"x,Men,,,Jeans,Blue,Casual,caf\xe9,a.jpg\n")
    assert "UTF-8" in message(spec)
    table.unlink()
    assert "no fashion.csv" in message(spec)


def test_a_folder_whose_name_holds_a_question_mark_has_no_options(tmp_path):
    folder = tmp_path / "what?caption=columns"
    folder.mkdir()
    write_fashion(folder)
    assert everything(open_dataset(f"fashion:{folder}"))["4_1.jpg"] == ("brand girls top 4.",)


def test_real_fashion_has_no_title_in_two_splits():
    root = Path(os.environ.get("EDGECAP_DATA", Path(__file__).parents[2] / ".." / "shared"))
    folder = root / "data" / "fashion"
    if not folder.is_dir():
        pytest.skip(f"no fashion data at {folder}: set EDGECAP_DATA to the folder that holds data/fashion")
    dataset = open_dataset(f"fashion:{folder}?caption=both")
    assert sizes(dataset) == {"train": 1922, "val": 263, "test": 237} and dataset.skipped == ()
    splits: dict[str, set[str]] = {}
    for split, examples in dataset.splits.items():
        for example in examples:
            splits.setdefault(" ".join(ptb_tokenize(example.captions[0])), set()).add(split)
            assert len(example.captions) == 2
    assert len(splits) > 1800 and all(len(places) == 1 for places in splits.values())


# --- flickr30k -------------------------------------------------------------------------------------------


def test_flickr30k_reads_the_row_without_its_delimiter(tmp_path):
    write_flickr30k(tmp_path)
    table = tmp_path / "results.csv"
    table.write_text(table.read_text().replace("a.jpg| 1| a dog", "a.jpg| 1   a dog"))
    dataset = open_dataset(f"flickr30k:{tmp_path}")
    assert everything(dataset)["a.jpg"] == ("A red dog runs .", "a dog")
    assert dataset.notes == ("splits: dataset_flickr30k.json",)


def test_flickr30k_without_karpathys_file_splits_by_name(tmp_path):
    names = [f"{number}.jpg" for number in range(400)]
    (tmp_path / "images").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "images" / name).write_bytes(b"not looked into" + str(number).encode())
    lines = ["image_name| comment_number| comment", *(f"{name}| 0| a thing" for name in names)]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    dataset = open_dataset(f"flickr30k:{tmp_path}")
    counts = sizes(dataset)
    assert sum(counts.values()) == 400 and 3 <= counts["val"] <= 25 and 3 <= counts["test"] <= 25
    assert "hash" in dataset.notes[0]
    result = data_command(f"flickr30k:{tmp_path}")
    assert result.exit_code == 0 and "by hash of the file name" in result.output


def test_flickr30k_lies_as_its_archives_unpack(tmp_path):
    write_flickr30k(tmp_path / "flat")
    inner = tmp_path / "nested" / "flickr30k_images"
    inner.mkdir(parents=True)
    (tmp_path / "flat" / "flickr30k_images").rename(inner / "flickr30k_images")
    (tmp_path / "flat" / "results.csv").rename(inner / "results.csv")
    (tmp_path / "flat" / "dataset_flickr30k.json").rename(tmp_path / "nested" / "dataset_flickr30k.json")
    assert sizes(open_dataset(f"flickr30k:{tmp_path / 'nested'}")) == {"train": 2, "val": 1, "test": 1}


def test_flickr30k_bad_files_are_one_line(tmp_path):
    write_flickr30k(tmp_path)
    spec, table = f"flickr30k:{tmp_path}", tmp_path / "results.csv"
    good = table.read_text()
    table.write_text(good + "e.jpg, 0, commas\n")
    assert "results.csv:8: expected" in message(spec)
    table.write_text(good + "ghost.jpg| 0| a ghost\n" + good.splitlines()[1] + "\n")  # and a repeated line
    assert "ghost.jpg: caption without an image" in message(spec)
    dataset = open_dataset(spec, skip_bad=True)
    assert len(dataset.skipped) == 1 and everything(dataset)["a.jpg"] == ("A red dog runs .", "a dog")
    table.write_text(good.replace("two cats", " "))
    assert "b.jpg: image without captions" in message(spec)
    table.write_text("image,caption\n")
    assert "first line" in message(spec)
    table.write_bytes(good.encode() + b"a.jpg| 2| caf\xe9\n")
    assert "UTF-8" in message(spec)
    table.write_text(good)
    (tmp_path / "dataset_flickr30k.json").write_text('{"images": [{"filename": "a.jpg", "split": "restval"}]}')
    assert "unknown split 'restval'" in message(spec)
    (tmp_path / "dataset_flickr30k.json").write_text('{"images": [3]}')
    assert "filename and split" in message(spec)


# --- what they share -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["fashion", "hf", "openimages"])
def test_options_that_are_not_there_are_named(reader, tmp_path):
    with pytest.raises(UsageError, match=f"{reader} has no option 'colour=3': choose from "):
        open_dataset(f"{reader}:{tmp_path / 'x'}?colour=3")
