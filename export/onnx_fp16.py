"""Target onnx-fp16: half the bytes, the same arithmetic."""

from __future__ import annotations

from .artifact import Artifact, Source, onnx_artifact
from .half import store_half
from .vision import fuse_vision


def build(source: Source) -> Artifact:
    pair = source.onnx_trunk()
    pair.passes += [result.on("encoder") for result in fuse_vision(pair.encoder)]
    pair.passes += [store_half(pair.encoder).on("encoder"), store_half(pair.decoder).on("decoder")]
    return onnx_artifact(pair)
