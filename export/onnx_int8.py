"""Target onnx-int8: both graphs in QDQ int8, calibrated but for large decoders, the embedding stored once as int8."""

from __future__ import annotations

from .artifact import Artifact, Source
from .onnx_quantized import build_graphs


def build(source: Source) -> Artifact:
    return build_graphs(source, "int8")
