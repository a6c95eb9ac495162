"""Reader for Flickr8k as Hodosh et al. (2013) published it: token file, three split lists, photo folder."""

from __future__ import annotations

from ...runtime.errors import UsageError
from .base import Dataset
from .checks import Row, build_dataset, clean_caption, read_lines, require_folder

USAGE = "flickr8k:DIR"
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
FOLDERS = ("images", "Flicker8k_Dataset", "Flickr8k_Dataset")  # the archive itself spells it "Flicker8k"
# The published token file has five captions of a file that never existed.
KNOWN_STRAY = {"2258277193_586949ec62.jpg.1"}


def open_flickr8k(argument: str, spec: str, skip_bad: bool, verify: bool) -> Dataset:
    """Read `Flickr8k.token.txt` (`photo.jpg#0<TAB>caption`) and the official lists; ids are file names."""
    folder = require_folder(argument, USAGE)
    photos = next((folder / name for name in FOLDERS if (folder / name).is_dir()), None)
    if photos is None:
        raise UsageError(f"{folder} has no photo folder: expected one of {', '.join(FOLDERS)}")

    captions: dict[str, list[str]] = {}
    tokens = folder / "Flickr8k.token.txt"
    seen = set()
    for number, line in enumerate(read_lines(tokens), 1):
        if not line or line in seen:  # repeated lines are the same caption, number included
            continue
        seen.add(line)
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not mark or not name:
            raise UsageError(f"{tokens}:{number}: expected 'photo.jpg#0<TAB>caption', found {line[:60]!r}")
        if caption := clean_caption(caption):
            captions.setdefault(name, []).append(caption)

    rows = []
    listed: set[str] = set()
    for split, file_name in LISTS.items():
        names = dict.fromkeys(line for line in read_lines(folder / file_name) if line)
        listed.update(names)
        rows += [Row(split, name, photos / name, tuple(captions.get(name, ()))) for name in names]
    # Photos in no list are just unused (the official lists leave some out); captions of no photo are a fault.
    problems = [
        (name, "caption without an image")
        for name in captions
        if name not in listed and name not in KNOWN_STRAY and not (photos / name).is_file()
    ]
    return build_dataset("flickr8k", spec, rows, problems, skip_bad=skip_bad, verify=verify)
