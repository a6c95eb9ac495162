"""The record of a bench run: everything needed to judge and repeat a figure, as one JSON object."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..devices import Profile
from ..runtime.errors import UsageError

FORMAT, VERSION = "edgecap-bench", 1
PACKAGES = ("edgecap", "numpy", "pillow", "onnxruntime", "tokenizers")


def build(
    *,
    profile: Profile,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    measured: Mapping[str, Any],
    facts: Mapping[str, Any],
    limits: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Put a record together: device, versions, settings, data, and what suite.run measured.

    facts: what the device said of itself before anything was measured (see Device.facts). limits: what it can do at
    most, measured in the same run (see limits.limits).
    """
    device = {key: value for key, value in facts.items() if key != "versions"}
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"name": profile.name, "kind": profile.kind, **device},
        "versions": dict(facts["versions"]),
        "settings": dict(settings) | {"omp_wait_policy": "passive"},
        "data": dict(data),
        "limits": None if limits is None else dict(limits),
        "reference": measured["reference"],
        "stopped": measured["stopped"],  # why some rows are missing: "interrupted", or None
        "problems": measured["problems"],  # what failed after the rounds, a line each
        "rows": measured["rows"],
    }


def machine_load() -> float | None:
    """Processes that wanted a core, on average over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def package_versions() -> dict[str, str | None]:
    """Of Python and what a bundle runs with, in this process's environment."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def dumps(record: Mapping[str, Any], *, indent: int | None = 1) -> str:
    return json.dumps(record, indent=indent, ensure_ascii=False, allow_nan=False)


def write(record: Mapping[str, Any], path: Path) -> None:
    """Write a record; what was at `path` stays whole until the new one is."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write the record to {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def append(record: Mapping[str, Any], path: Path) -> None:
    """Add a record as one line to a history (JSON lines), without the captions; one write, so never half a
    line.
    """
    rows = [{key: value for key, value in row.items() if key != "captions"} for row in record["rows"]]
    line = dumps(dict(record) | {"rows": rows}, indent=None) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"cannot add to the history {path}: {error.strerror}") from error


def read(path: Path) -> dict[str, Any]:
    """A record from its file, or the last one of a history. Raises UsageError in one line for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not a text'}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    found = parse(text) or parse(lines[-1] if lines else "")
    if found is None:
        raise UsageError(f"{path} is not a record of edgecap bench, of version {VERSION}")
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """The records of a history, oldest first; none where there is no such file. Lines that are no records are passed
    over. Raises UsageError where it cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return [found for line in lines if (found := parse(line)) is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"the history {path} cannot be read: {error.strerror}") from error


_ROW = {"name", "kind", "status", "error", "sha256", "bytes", "decoding", "latency", "memory", "cold_start", "quality"}
_TEXTS = ("name", "kind", "status")


def parse(text: str) -> dict[str, Any] | None:
    """A record from its JSON; None where that is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        return None
    rows = found.get("rows")
    whole = all(isinstance(found.get(key), dict) for key in ("device", "settings", "data", "versions"))
    whole = whole and isinstance(found.get("created"), str) and _numbers(found.get("limits"))
    return found if whole and isinstance(rows, list) and all(map(_sound, rows)) else None


def _sound(row: Any) -> bool:
    """Whether a row's parts have the shapes that comparing records relies on."""
    if not isinstance(row, dict) or not row.keys() >= _ROW or not isinstance(row["decoding"], dict):
        return False
    parts = [
        row.get(key) or {} for key in ("latency", "cold_start", "rounds", "captions", "bytes", "memory", "quality")
    ]
    if not all(isinstance(part, dict) for part in parts) or not all(isinstance(row[key], str) for key in _TEXTS):
        return False
    _, cold, rounds, captions, size, memory, quality = parts
    return (
        all(isinstance(times, list) and _numbers(times) for times in (*rounds.values(), cold.get("runs", [])))
        and all(isinstance(said, dict) and _number(said.get("cider", 0.0)) for said in captions.values())
        and _numbers([size.get("total"), memory.get("peak_rss")])
        and (not quality or _number(quality.get("cider")))
    )


def _numbers(values: Any) -> bool:
    """Whether these are numbers or None, in a list or a table, or nothing at all."""
    if values is None or not isinstance(values, list | dict):
        return values is None
    return all(value is None or _number(value) for value in (values.values() if isinstance(values, dict) else values))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e18 < value < 1e18


def check_writable(path: Path) -> None:
    """Raise UsageError now, and not after minutes of measuring, when nothing can be written at `path`."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write to {path}: it is a folder, or its folder cannot be written to")
