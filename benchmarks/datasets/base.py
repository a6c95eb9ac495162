"""What every data set looks like to the rest of edgecap: examples, splits and a fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """One photo and its reference captions. `id` is unique within the data set."""

    id: str
    captions: tuple[str, ...]
    path: Path | None = None  # None for a picture that is drawn on demand

    def load(self) -> Image:
        """The picture as PIL RGB, upright. EdgecapError, naming the file, where it cannot be decoded."""
        from ...runtime.preprocess import load_image

        return load_image(self.jpeg() if self.path is None else self.path, name=str(self.path or self.id))

    def jpeg(self) -> bytes:
        """A drawn picture as a JPEG file's bytes: whoever looks at it, in memory or in a file, sees the same pixels."""
        raise ValueError(f"{self.id} has neither a file nor a way to draw it")

    def jpeg_path(self, folder: Path) -> Path:
        """The picture's own file, or, where there is none, a JPEG of it written once into `folder`."""
        if self.path is not None:
            return self.path
        path = folder / f"{self.file_stem}.jpg"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(self.jpeg())
            partial.replace(path)  # never a half-written file under the final name
        return path

    @property
    def file_stem(self) -> str:
        """The id as a plain file name without its suffix."""
        stem = Path(self.id).with_suffix("").as_posix()
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)


@dataclass(frozen=True)
class Dataset:
    """Photos with captions in three splits.

    `fingerprint` is a SHA-256 over split membership, captions, file sizes and some bytes of some files (or, for
    drawn pictures, the generator's version and options): equal fingerprints mean the same data, wherever it lies.
    """

    name: str
    spec: str
    splits: Mapping[str, Sequence[Example]]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()  # (id, reason) of what was left out
    captioned: bool = True  # False: photos alone, for a teacher to caption
    notes: tuple[str, ...] = ()  # what the reader decided and the user should know, a line each


@dataclass(frozen=True)
class Reader:
    """One row of the table of readers: how the spec is written, what it reads, and the function that does."""

    usage: str
    help: str
    # (argument after the colon, whole spec, skip_bad, verify) -> Dataset
    open: Callable[[str, str, bool, bool], Dataset]
