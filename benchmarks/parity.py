"""The same bundle on two machines: the captions' tokens, and the logits where both are made to say the same words."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.progress import Progress
from .runner import Running, WorkerFailed

if TYPE_CHECKING:
    from .device import Device
    from .quality import Photo
    from .subjects import Subject

MIN_COSINE = 0.99  # of the logits of any token, where precision is below fp32


def native_parity(
    native: Device,
    other: Device,
    subjects: Sequence[Subject],
    photos: Sequence[Photo],
    *,
    threads: int,
    timeout: float,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Every bundle on both devices, which must see the same files. By its name: "photos", "same_tokens" and
    "same_captions" (of them), "min_cosine" and "mean_cosine" of teacher-forced logits over all tokens of all photos,
    and "ok": fp32 gives the same tokens, lower precisions cosines of 0.99 and more. Or "error", the reason in one line.
    """
    found = {}
    bundles = [subject for subject in subjects if subject.kind == "bundle" and not subject.fused]
    done = 0
    for subject in bundles:
        rows = []
        try:
            with native.start(subject, threads) as a, other.start(subject, threads) as b:
                for worker in (a, b):
                    worker.ask("load", timeout=timeout, **subject.load_request(threads))
                for photo in photos:
                    rows.append(_one(a, b, photo.path, timeout))
                    progress("against native", done := done + 1, len(bundles) * len(photos))
        except WorkerFailed as failure:
            found[subject.name] = {"ok": False, "error": str(failure)}
            continue
        found[subject.name] = _summary(rows, subject.facts.get("precision"))
    return found


def _one(a: Running, b: Running, photo: str, timeout: float) -> tuple[bool, bool, np.ndarray]:
    """(same tokens, same caption, cosines [T + 1]) of one photo, the second machine made to say the first one's."""
    with tempfile.TemporaryDirectory(prefix="edgecap-against-") as folder:
        files = [str(Path(folder) / name) for name in ("a.npy", "b.npy")]
        first = a.ask("forced", photo=photo, ids=None, logits=files[0], timeout=timeout)
        second = b.ask("forced", photo=photo, ids=first["ids"], logits=files[1], timeout=timeout)
        x, y = (np.load(file, allow_pickle=False).astype(np.float64) for file in files)  # [T + 1, vocabulary]
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines = (x * y).sum(axis=1) / np.maximum(norms, 1e-30)
    return first["ids"] == second["ids"], first["text"] == second["text"], cosines


def _summary(rows: Sequence[tuple[bool, bool, np.ndarray]], precision: str | None) -> dict[str, Any]:
    cosines = np.concatenate([row[2] for row in rows])
    same, least, mean = sum(row[0] for row in rows), float(cosines.min()), float(cosines.mean())
    sound = math.isfinite(mean)  # not so where logits are no numbers
    return {
        "photos": len(rows),
        "same_tokens": same,
        "same_captions": sum(row[1] for row in rows),
        "min_cosine": least if sound else None,
        "mean_cosine": mean if sound else None,
        "ok": sound and (same == len(rows) if precision == "fp32" else least >= MIN_COSINE),
        "error": None,
    }
