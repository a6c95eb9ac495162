"""What edgecap keeps in its cache folder: all of it can be made again, nothing of it goes away by itself."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .local import cache_folder

# What lies below these folders of the cache, and else in it.
KINDS = {
    "peers": "peers of the bench, prepared (edgecap bench --peers)",
    "devices/wheels": "wheels for devices behind ssh and for arm64",
    "devices": "arm64's Python (--device emulated-arm64)",
    "browser": "certificates of the bench's page",
    "hf": "data sets that were streamed (hf:)",
    "": "photos and encoders' features for training",
}
FOLDERS = {"peers", "hf", "devices", "devices/wheels"}  # whose entries are of their own
ROWS = re.compile(r"([0-9a-f]{20})\.(?:npy|json|lock)")  # of train/data/cache.py
DAY = 86_400.0  # s


@dataclass(frozen=True)
class Entry:
    """One thing in the cache that can be deleted by itself."""

    kind: str  # a key of KINDS
    name: str  # below the cache folder
    paths: tuple[Path, ...]
    bytes: int
    used: float  # seconds since 1970: last written, or read where the file system notes that


def entries() -> list[Entry]:
    """Everything in the cache, the largest first; none where there is no cache."""
    root = cache_folder()
    return sorted(_below(root, root), key=lambda entry: (-entry.bytes, entry.name))


def remove(found: Sequence[Entry]) -> None:
    """Delete entries. Raises OSError."""
    for entry in found:
        for path in entry.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _below(folder: Path, root: Path) -> Iterator[Entry]:
    """What is edgecap's own below a folder: whoever points the cache at a folder of theirs loses nothing."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.relative_to(root).as_posix()
        if name in FOLDERS and not path.is_symlink():
            yield from _below(path, root)
        elif folder != root or name in KINDS:
            groups.setdefault(path.name, []).append(path)
        elif found := ROWS.fullmatch(name):
            groups.setdefault(found[1], []).append(path)
    kind = "" if folder == root else folder.relative_to(root).as_posix()
    for name, paths in groups.items():
        stats = [file.lstat() for path in paths for file in _files(path)]
        place = f"{kind}/{name}".removeprefix("/")
        used = max((max(one.st_mtime, one.st_atime) for one in stats), default=0.0)
        size = sum(one.st_size for one in stats)
        yield Entry(place if place in KINDS else kind, place, tuple(paths), size, used)


def _files(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)
