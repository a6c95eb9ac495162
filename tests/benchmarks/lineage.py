"""Small bundles that say what they were made from, and settings of a bench that takes seconds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from edgecap.benchmarks.suite import Settings

from ..runtime.graphs import write_gru_bundle

DATA = "scenes:train=1,val=1,test=12,size=32"
QUICK = Settings(rounds=3, min_runs=6, min_seconds=0.01, warmup=2, cold_starts=1, limit_seconds=0.01, timeout=120)
RECIPE = {
    "name": "small",
    "encoder": {"kind": "mobilenet_v2"},
    "bridge": {"kind": "linear"},
    "decoder": {"kind": "gru"},
    "prompt": {"chat": ""},
}


def write_bundle_of(path: Path, sha256: str, *, recipe: dict[str, Any] | None = None, **manifest: Any) -> Path:
    """The GRU bundle of the runtime's tests with this lineage, and other entries of its manifest."""
    checkpoint = {"sha256": sha256, "recipe": recipe or RECIPE, "metrics": {}}
    data = "scenes:train=1,val=1,test=4,size=32"
    write_gru_bundle(path, 0, lineage={"data": data, "checkpoint": checkpoint, "passes": []})
    change(path, **manifest)
    return path


def change(path: Path, **entries: Any) -> None:
    """Replace entries of a bundle's manifest."""
    file = path / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def write_two(path: Path) -> Path:
    """runs/first.edgecap and, written later, runs/second.edgecap in a working folder."""
    lineage = {"lineage": {"data": DATA, "passes": []}}
    write_gru_bundle(path / "runs" / "first.edgecap", 0, **lineage)
    write_gru_bundle(path / "runs" / "second.edgecap", 1, **lineage)
    later = time.time_ns() + 10**9
    os.utime(path / "runs" / "second.edgecap" / "bundle.json", ns=(later, later))
    return path
