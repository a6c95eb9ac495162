"""Which split a photo belongs to: what splits are called elsewhere, and splits of our own by hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .checks import hash_fraction, identical_files

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def split_of(key: str, train: float = 0.8, val: float = 0.1) -> str:
    """The split a key falls into by its hash alone."""
    fraction = hash_fraction(key)
    return "train" if fraction < train else "val" if fraction < train + val else "test"


def split_together(photos: Mapping[str, Path], keys: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The split of each photo (id → file) by a hash of its first key, 80/10/10.

    Photos that share a key, or are copies of one file, go together, by the first of all their keys in alphabetical
    order: neither can end up on both sides.
    """
    first = {key: key for of_photo in keys.values() for key in of_photo}

    def root(key: str) -> str:
        while first[key] != key:
            key = first[key]
        return key

    def join(a: str, b: str) -> None:
        a, b = sorted((root(a), root(b)))
        first[b] = a

    for of_photo in keys.values():
        for key in of_photo[1:]:
            join(of_photo[0], key)
    ids = sorted(photos)
    present = [(photos[id], photos[id].stat().st_size, root(keys[id][0])) for id in ids if photos[id].is_file()]
    for group in identical_files(present):
        for i in group[1:]:
            join(present[group[0]][2], present[i][2])
    return {id: split_of(root(keys[id][0])) for id in ids}
