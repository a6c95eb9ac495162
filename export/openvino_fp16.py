"""Target openvino-fp16: weights stored in half the bytes, computed in fp32."""

from __future__ import annotations

from . import openvino_graphs
from .artifact import Artifact, Source


def build(source: Source) -> Artifact:
    return openvino_graphs.build(source, "fp16")
