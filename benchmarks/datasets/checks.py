"""From rows of (split, id, file, captions) to a Dataset: every check that readers of files share."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import EdgecapError, UsageError
from .base import SPLITS, Dataset, Example

PROBE_BYTES = 4096  # enough compressed data to tell photos of one size apart without reading them whole
PROBED = 512  # at most so many files of a data set, evenly spread, are opened for its fingerprint


@dataclass(frozen=True)
class Row:
    """One photo as a reader found it; `path` may not exist."""

    split: str
    id: str
    path: Path
    captions: tuple[str, ...]


def require_folder(argument: str, usage: str) -> Path:
    """The folder a spec names, or one line saying what is wrong with it."""
    if not argument:
        raise UsageError(f"data set needs a folder: write {usage}")
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder} (asked for by {usage.split(':')[0]}:{argument})")
    return folder


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without line ends; BOM, Windows newlines and blank edges are tolerated."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {path}: it is not UTF-8 text") from None
    return [line.strip() for line in text.split("\n")]


def read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a file, in which `keys` name lists; UsageError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"cannot read {path}: it is not JSON") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise UsageError(f"{path} is no caption file: expected lists called {' and '.join(keys)}")
    return data


def clean_caption(caption: str) -> str:
    """The caption on one line with single spaces."""
    return " ".join(caption.split())


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same on every machine, forever."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def identical_files(sizes: Sequence[tuple[Path, int, str]]) -> list[list[int]]:
    """Groups (of positions) of files with the same bytes, among (path, size, split label).

    A group is looked for only where files of one size carry more than one label; files are told apart by a
    probe from their middle, and only those that still agree are hashed whole.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for i, (_, size, _) in enumerate(sizes):
        by_size[size].append(i)

    def several_labels(group: list[int]) -> bool:
        return len({sizes[i][2] for i in group}) > 1

    def split_by(group: list[int], key) -> list[list[int]]:
        parts: dict[bytes, list[int]] = defaultdict(list)
        for i in group:
            parts[key(*sizes[i][:2])].append(i)
        return [part for part in parts.values() if several_labels(part)]

    found = []
    for group in filter(several_labels, by_size.values()):
        for alike in split_by(group, _probe):
            found += split_by(alike, _digest)
    return found


def _probe(path: Path, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(max(0, (size - PROBE_BYTES) // 2))
        return file.read(PROBE_BYTES)


def _digest(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def build_dataset(
    name: str,
    spec: str,
    rows: Iterable[Row],
    problems: Iterable[tuple[str, str]] = (),
    *,
    skip_bad: bool,
    verify: bool,
    captioned: bool = True,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Check the rows and make the data set.

    Bad rows: no file, an empty file, one that does not decode (only with `verify`), no captions, a photo that
    is also in another split (by id or by bytes; the copy in test, then val, stays). `problems` are
    (id, reason) that the reader found itself. UsageError names them, unless `skip_bad` drops them. A split
    that is left empty is a UsageError either way. `captioned` False: photos alone, of which one in any split is enough.
    """
    bad = list(problems)
    # Held-out splits first: of a photo that is in two splits, the training copy is the one that goes.
    ordered = sorted(rows, key=lambda row: -SPLITS.index(row.split))
    seen: dict[str, Row] = {}
    kept: list[tuple[Row, int]] = []  # with the file's size
    for row in ordered:
        if row.id in seen:
            bad.append((row.id, f"the same image is in {seen[row.id].split} and {row.split}"))
            continue
        seen[row.id] = row
        size = _size(row.path)
        if size is None:
            bad.append((row.id, "missing image file"))
        elif size == 0:
            bad.append((row.id, "empty image file"))
        elif captioned and not row.captions:
            bad.append((row.id, "image without captions"))
        else:
            kept.append((row, size))

    dropped: set[int] = set()
    for group in identical_files([(row.path, size, row.split) for row, size in kept]):
        first = kept[group[0]][0]
        for i in group[1:]:
            row = kept[i][0]
            if row.split != first.split:
                dropped.add(i)
                bad.append((row.id, f"the same image (identical bytes) is {first.id} in {first.split}"))
    kept = [found for i, found in enumerate(kept) if i not in dropped]

    if verify:
        undecodable = dict(_undecodable([Example(row.id, row.captions, row.path) for row, _ in kept]))
        bad += undecodable.items()
        kept = [found for found in kept if found[0].id not in undecodable]

    if bad and not skip_bad:
        raise _refused(spec, bad)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    digest = hashlib.sha256()
    kept.sort(key=lambda found: (SPLITS.index(found[0].split), found[0].id))
    for i, (row, size) in enumerate(kept):
        splits[row.split].append(Example(row.id, row.captions, row.path))
        # No times: a copy of the data is the same data. Photos made anew seldom keep their size, and never all of it.
        digest.update(json.dumps([row.split, row.id, row.captions, size]).encode() + b"\n")
        if i % (len(kept) // PROBED + 1) == 0:
            digest.update(_probe(row.path, size))
    for split, examples in splits.items():
        if not examples and (captioned or not kept):
            left_out = f" after leaving out {describe_problems(bad)}" if bad else ""
            raise UsageError(
                f"{spec}: the {split} split is empty{left_out}: "
                "train, val and test each need at least one photo with captions"
            )
    return Dataset(name, spec, splits, digest.hexdigest(), tuple(bad), captioned, notes)


def require_decodable(examples: Iterable[Example], spec: str) -> None:
    """Decode all photos that are files now, before long work on them; UsageError naming those that cannot be."""
    bad = _undecodable([example for example in examples if example.path is not None])
    if bad:
        raise _refused(spec, bad)


def _refused(spec: str, bad: Sequence[tuple[str, str]]) -> UsageError:
    return UsageError(f"{spec}: {describe_problems(bad)}: mend the data, or leave these out with --skip-bad")


def describe_problems(bad: Sequence[tuple[str, str]], show: int = 3) -> str:
    """'12 bad examples (a.jpg: missing image file; ...; and 9 more)'."""
    named = "; ".join(f"{id}: {reason}" for id, reason in bad[:show])
    more = f"; and {len(bad) - show} more" if len(bad) > show else ""
    return f"{len(bad)} bad example{'s' if len(bad) > 1 else ''} ({named}{more})"


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size if path.name else None
    except (OSError, ValueError):
        return None


def _undecodable(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """(id, reason) of those that cannot be decoded."""

    def reason(example: Example) -> str | None:
        try:
            example.load()
        except EdgecapError as error:
            return error.message
        return None

    # Pillow decodes outside the GIL, so threads use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(reason, examples)
        return [(example.id, why) for example, why in zip(examples, reasons, strict=True) if why]
