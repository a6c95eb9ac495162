"""Memory-mapped arrays computed once and kept on disk: photos as pixels, and the frozen encoder's features.

A cache is three files beside each other: KEY.npy (the array), KEY.json (how many rows are done) and KEY.lock. Rows are
flushed before the count is raised, so a killed run continues where it stopped and never trusts a half-written row.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...benchmarks.datasets import Example
from ...devices.local import cache_folder
from ...runtime.errors import EdgecapError
from ...runtime.preprocess import Preprocess, load_image

CHUNK = 16  # rows computed together: larger batches fall out of the processor's caches
FLUSH = 512  # rows between two flushes to the disk
DRAWN = 8  # pictures that tell one set of drawn ones from another


def cache_key(**parts: Any) -> str:
    """A name for what the rows depend on: 20 hex digits over the sorted parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def cached_rows(
    key: str,
    total: int,
    shape: tuple[int, ...],
    dtype: Any,
    compute: Callable[[slice], np.ndarray],
    *,
    report: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """The array [total, *shape] as a read-only memory map; `compute(slice)` gives the missing rows, in chunks.

    `report` is told how many rows are done. Raises EdgecapError when the disk is too small or cannot be written.
    """
    with writing() as folder:
        return _cached_rows(folder, key, total, shape, dtype, compute, report)


@contextmanager
def writing() -> Iterator[Path]:
    """The cache's folder; inside the block EdgecapError where it cannot be written."""
    folder = cache_folder()
    try:
        yield folder
    except OSError as error:
        why = error.strerror or error
        raise EdgecapError(
            f"the cache in {folder} cannot be written ({why}): set EDGECAP_CACHE to another folder"
        ) from error


def _cached_rows(
    folder: Path,
    key: str,
    total: int,
    shape: tuple[int, ...],
    dtype: Any,
    compute: Callable[[slice], np.ndarray],
    report: Callable[[int], None],
) -> np.ndarray:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    array, progress = folder / f"{key}.npy", folder / f"{key}.json"
    with FileLock(folder / f"{key}.lock"):
        done = _rows_done(array, progress, total, shape, dtype)
        if done == 0:
            needed = total * int(np.prod(shape)) * np.dtype(dtype).itemsize
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise EdgecapError(
                    f"the cache needs {needed / 1e9:.1f} GB in {folder} and {free / 1e9:.1f} GB are free: "
                    "make room or set EDGECAP_CACHE to another disk"
                )
            progress.unlink(missing_ok=True)
            np.lib.format.open_memmap(array, "w+", dtype, (total, *shape)).flush()
            _allocate(array)
        report(done)
        if done < total:
            rows = np.load(array, mmap_mode="r+")
            for start in range(done, total, CHUNK):
                part = slice(start, min(start + CHUNK, total))
                rows[part] = compute(part)
                if part.stop % FLUSH == 0 or part.stop == total:
                    rows.flush()
                    _write_json(progress, {"rows": part.stop, "total": total})
                report(part.stop)
    return np.load(array, mmap_mode="r")


def whole_rows(key: str, total: int) -> np.ndarray | None:
    """What `cached_rows` computed for this key before, memory-mapped; None where that is not whole."""
    folder = cache_folder()
    array, progress = folder / f"{key}.npy", folder / f"{key}.json"
    try:
        rows = np.load(array, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return rows if _rows_done(array, progress, total, rows.shape[1:], rows.dtype) == total else None


def photos_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over what photos are: their ids and their files' sizes, or, of drawn ones, DRAWN of the pictures."""
    sizes = [(example.id, example.path.stat().st_size if example.path else None) for example in examples]
    digest = hashlib.sha256(json.dumps(sizes).encode())
    drawn = [example for example in examples if example.path is None]
    for example in drawn[:: max(1, len(drawn) // DRAWN)][:DRAWN]:
        digest.update(example.jpeg())
    return digest.hexdigest()


def load_pixels(
    examples: Sequence[Example],
    preprocess: Preprocess,
    *,
    flip: bool = False,
    change: Callable[[int, Image.Image], Image.Image] | None = None,
) -> np.ndarray:
    """Photos decoded and resized, on two threads: uint8 [N, H, W, 3]; `flip` mirrors them left to right. Where they
    keep their sizes: a list of uint8 [H, W, 3].

    change: gives another photo for the i-th of the examples, before it is resized.
    """

    def one(i: int) -> np.ndarray:
        example = examples[i]
        if change is None:
            # Files as the runtime opens them; drawn pictures as they are.
            return preprocess.load(example.path) if example.path else preprocess(example.load())
        return preprocess(change(i, load_image(example.path or example.load(), target=preprocess.size)))

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        found = list(pool.map(one, range(len(examples))))
    if preprocess.mode == "keep":
        return found  # type: ignore[return-value]
    pixels = np.stack(found)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if flip else pixels


def _rows_done(array: Path, progress: Path, total: int, shape: tuple[int, ...], dtype: Any) -> int:
    try:
        count = int(json.loads(progress.read_text())["rows"])
        rows = np.load(array, mmap_mode="r")
        whole = rows.shape == (total, *shape) and rows.dtype == dtype
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return min(count, total) if whole else 0


def _allocate(path: Path) -> None:
    """Take the room of a sparse file on the disk now: a full disk under a memory map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")  # under the lock: one writer, and what a killed one left is used again
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
