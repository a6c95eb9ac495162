"""Both ends of every ONNX target: the trunk as ONNX Runtime takes it, and the files with what the manifest says.

Between them `onnx_quantized` gives each graph its precision and ONNX Runtime's own operators.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import onnx

from .artifact import Artifact, Source
from .graph import PassResult, save, split, split_to
from .merge import merge_projections
from .products import unflatten_products
from .trunk import OPSET_ATTENTION, OnnxPair

MIN_ENGINE = {18: "1.18", OPSET_ATTENTION: "1.23"}  # ONNX Runtime; 1.18 reads IR version 10
LARGE = 32 * 2**20  # bytes of a graph whose weights become a file of their own


def onnx_trunk(source: Source) -> OnnxPair:
    """The fp32 graphs, a fresh copy: in a decoder with a KV cache, products of rows as they lie, and projections that
    read one tensor merged."""
    pair = source.trunk()
    if pair.session.get("kv"):
        done = [*changed(unflatten_products(pair.decoder)), *changed(merge_projections(pair.decoder))]
        pair.passes += [result.on("decoder") for result in done]
    return pair


def onnx_artifact(pair: OnnxPair) -> Artifact:
    """The graphs of a pair, as they are."""
    graphs, files = written(pair)
    return Artifact(files, graphs, pair.session, requires(pair.encoder, pair.decoder), pair.passes)


def written(pair: OnnxPair) -> tuple[dict[str, Any], dict[str, bytes | Path]]:
    """The manifest's "graphs" and the files of a pair, large weights beside their graph."""
    graphs = pair.graphs()
    files: dict[str, bytes | Path] = {}
    for name, graph in graphs.items():
        model = getattr(pair, name)
        if pair.external is None and model.ByteSize() < LARGE:
            files[graph["file"]] = save(model)
            continue
        graph["weights"] = f"{name}.bin"
        if pair.external is None:
            files[graph["file"]], files[graph["weights"]] = split(model, graph["weights"])
        else:
            path = Path(mkdtemp(dir=pair.external.folder)) / graph["weights"]
            files[graph["file"]], files[graph["weights"]] = split_to(model, path), path
    return graphs, files


def requires(*models: onnx.ModelProto) -> dict[str, str]:
    """The manifest's "requires" of these graphs."""
    opset = max(entry.version for model in models for entry in model.opset_import if not entry.domain)
    return {"onnxruntime": MIN_ENGINE.get(opset, MIN_ENGINE[OPSET_ATTENTION])}


def changed(result: PassResult) -> list[PassResult]:
    """The result, if its pass found anything to do."""
    return [result] if any(result.cost.values()) else []
