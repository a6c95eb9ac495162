"""Target onnx-fp32: the trunk's arithmetic."""

from __future__ import annotations

from .artifact import Artifact, Source
from .onnx_quantized import build_graphs


def build(source: Source) -> Artifact:
    return build_graphs(source, "fp32")
