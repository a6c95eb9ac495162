"""Streamed examples as files on disk: training wants any photo at any time, a stream gives each once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MAGIC = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"GI": ".gif", b"BM": ".bmp"}
END = {"end": True}  # the last line of a split that was streamed to its end


def photo_bytes(value: Any) -> bytes | None:
    """The file that a row of `datasets` holds as {"bytes": …, "path": …}; None where there is none."""
    data, path = (value or {}).get("bytes"), (value or {}).get("path")
    if data or not path:
        return data or None
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:  # paths may be chained: zip://a.jpg::https://…
            return file.read()
    except FileNotFoundError:
        return None


class Store:
    """Rows of image and captions, a file of lines for each split, and the photos named by their contents.

    A photo is in place before the line that names it is written, and half a line at the end of a file is cut off by
    the next writer: a killed run leaves nothing that is not whole, and the next goes on behind its last row.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"

    def splits(self) -> list[str]:
        """The names of the data set's splits, where they are known by now."""
        file = self.folder / "splits.json"
        return json.loads(file.read_text()) if file.is_file() else []

    def remember(self, splits: Sequence[str]) -> None:
        """Keep the splits' names for `splits`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / "splits.json", json.dumps(list(splits)).encode())

    def rows(self, split: str) -> list[dict[str, Any]]:
        """{"image": file name in `images` or None, "captions": [...]} of every row stored."""
        return [row for row in self._lines(split) if row != END]

    def count(self, split: str) -> int:
        """How many rows of a split are stored."""
        return len(self.rows(split))

    def holds(self, split: str, limit: int | None) -> bool:
        """Whether `limit` rows of a split are stored, or all there are."""
        lines = self._lines(split)
        return lines[-1:] == [END] or (limit is not None and len(lines) >= limit)

    @contextmanager
    def writer(self, split: str) -> Iterator[Writer]:
        """Add rows behind those stored; one process at a time."""
        from filelock import FileLock

        self.images.mkdir(parents=True, exist_ok=True)
        path = self._path(split)
        before = self.count(split)
        with FileLock(f"{path}.lock"), open(path, "ab+") as file:
            file.seek(0)
            whole = file.read().rpartition(b"\n")
            file.truncate(len(whole[0] + whole[1]))
            if self.count(split) != before:
                raise OSError("another run wrote here meanwhile: start again")
            yield Writer(self.images, file)

    def _path(self, split: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in split)
        return self.folder / f"{safe}.jsonl"

    def _lines(self, split: str) -> list[dict[str, Any]]:
        path = self._path(split)
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
        return [json.loads(line) for line in whole.split(b"\n") if line]


class Writer:
    """Appends to one split of a Store."""

    def __init__(self, images: Path, file: IO[bytes]) -> None:
        self._images, self._file = images, file

    def row(self, photo: bytes | None, captions: Sequence[str]) -> None:
        """Store a photo (its file's bytes) and its captions; None or no bytes: a photo that is missing."""
        name = None
        if photo:
            name = hashlib.sha256(photo).hexdigest()[:24] + MAGIC.get(photo[:2], ".img")
            if not (self._images / name).exists():
                _replace(self._images / name, photo)
        self._line({"image": name, "captions": list(captions)})

    def end(self) -> None:
        """There are no more rows."""
        self._line(END)

    def _line(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
