"""A small bundle that says it was made from a certain checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..runtime.graphs import write_gru_bundle

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
