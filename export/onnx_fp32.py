"""Target onnx-fp32: the trunk's graphs as they are."""

from __future__ import annotations

from .artifact import Artifact, Source, onnx_artifact


def build(source: Source) -> Artifact:
    return onnx_artifact(source.onnx_trunk())
