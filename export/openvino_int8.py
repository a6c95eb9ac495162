"""Target openvino-int8: a convolutional encoder in int8, other weights at 8 bits."""

from __future__ import annotations

from . import openvino_graphs
from .artifact import Artifact, Source


def build(source: Source) -> Artifact:
    return openvino_graphs.build(source, "int8")
