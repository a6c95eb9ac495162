"""Target onnx-int4: weights stored in 4 bits; computed in int8, which is as fast as onnx-int8, or by MatMulNBits.

A decoder whose weights no cache holds (a language model of 32 million weights and more) multiplies by the 4-bit blocks
themselves. Anything smaller is unpacked to int8 once, when the graph is loaded: measured on AVX2, MatMulNBits takes
1.1 times as long as int8 for one row of activations and 2 times as long for 15.
"""

from __future__ import annotations

from .artifact import Artifact, Source
from .onnx_quantized import build_graphs


def build(source: Source) -> Artifact:
    return build_graphs(source, "int4")
