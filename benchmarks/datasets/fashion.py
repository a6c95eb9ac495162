"""Reader for the fashion product table (fashion.csv): captions are product titles, or sentences from the columns."""

from __future__ import annotations

from ...runtime.errors import UsageError
from ..metrics import ptb_tokenize
from .base import Dataset
from .checks import Row, build_dataset, clean_caption, require_folder
from .options import choice, parse_place
from .splits import split_together
from .tables import read_csv

USAGE = "fashion:DIR[?caption=title|columns|both]"
NEEDED = {
    "title": ("image", "producttitle"),
    "columns": ("image", "producttitle", "producttype", "gender", "colour", "usage"),
}
NOTHING = {"", "na", "n/a", "nan", "none", "unisex"}  # values that say nothing about the product
# What comes in pairs or has two legs keeps its plural: "a pair of jeans".
PAIRED = {
    "shoes", "heels", "flats", "sandals", "flops", "booties", "boots", "socks", "stockings",
    "shorts", "jeans", "leggings", "capris", "trousers", "pants", "pyjamas", "tights",
}  # fmt: skip
AFTER_COLOUR = {"sports", "party", "travel", "home"}  # nouns stand next to the product: "a blue sports top"
WORDS = {"tshirts": "t-shirt", "dresses": "dress"}  # the type's last word, where a plain "s" is not its plural
COLOURS = {"multi": "multicolored"}


def open_fashion(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Read `fashion.csv` and `images/`; ids are the images' names. An image may have several rows.

    caption: the product's title (default), a sentence composed from the columns, or both as two captions. Splits are by
    product, 80/10/10 by a hash of the title as the metrics tokenise it: no title and no copy of a photo is in two.
    """
    place, options = parse_place(argument, USAGE, ("caption",))
    kind = choice(options, "caption", ("title", "columns", "both"))
    folder = require_folder(place, USAGE)
    table = folder / "fashion.csv"
    if not table.is_file():
        raise UsageError(f"{folder} has no fashion.csv")

    problems: list[tuple[str, str]] = []
    captions: dict[str, dict[str, None]] = {}
    keys: dict[str, dict[str, None]] = {}
    names = "Image, ProductTitle" if kind == "title" else "Image, ProductTitle, ProductType, Gender, Colour, Usage"
    for where, columns in read_csv(table, NEEDED["title" if kind == "title" else "columns"], names):
        image, title = columns.get("image", "").strip(), clean_caption(columns.get("producttitle", ""))
        if not image:
            problems.append((where, "caption without an image"))
            continue
        said = [title] if kind != "columns" else []
        if kind != "title":
            said.append(compose(columns))
        captions.setdefault(image, {}).update(dict.fromkeys(filter(None, said)))
        keys.setdefault(image, {})[" ".join(ptb_tokenize(title)) or image] = None

    paths = {image: folder / "images" / image for image in captions}
    splits = split_together(paths, {image: tuple(found) for image, found in keys.items()})
    rows = [Row(splits[image], image, paths[image], tuple(found)) for image, found in captions.items()]
    return build_dataset("fashion", spec, rows, problems, skip_bad=skip_bad, verify=verify)


def compose(columns: dict[str, str]) -> str:
    """'a casual white top for girls' from ProductType, Colour, Usage and Gender; '' without a type."""
    said = {name: clean_caption(columns.get(name, "")).lower() for name in ("producttype", "colour", "usage", "gender")}
    kind, colour, usage, gender = ("" if value in NOTHING else value for value in said.values())
    if not kind:
        return ""
    *before, last = kind.split()
    paired = last in PAIRED
    if not paired:
        last = WORDS.get(last) or (last[:-1] if last.endswith("s") and not last.endswith("ss") else last)
    if usage in kind:  # "casual shoes" are casual
        usage = ""
    colour = COLOURS.get(colour, colour)
    words = [colour, usage] if usage in AFTER_COLOUR else [usage, colour]
    phrase = " ".join(filter(None, [*words, *before, last]))
    article = "a pair of" if paired else "an" if phrase[0] in "aeiou" else "a"
    return f"{article} {phrase} for {gender}" if gender else f"{article} {phrase}"
