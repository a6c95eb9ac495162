"""Target onnx-fp16: half the bytes, the same arithmetic."""

from __future__ import annotations

from .artifact import Artifact, Source, onnx_artifact
from .half import store_half


def build(source: Source) -> Artifact:
    pair = source.onnx_trunk()
    pair.passes += [store_half(pair.encoder).on("encoder"), store_half(pair.decoder).on("decoder")]
    return onnx_artifact(pair)
