"""Pass: MatMuls by 4-bit blocks (MatMulNBits), the word embedding gathered from the same bytes (GatherBlockQuantized).

For decoders larger than the CPU's caches: each step reads every weight once, so that time is bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from .graph import DOMAIN, Graph, PassResult, attribute, use_domain
from .rounding import round_float_blocks, shrink
from .statistics import Layer, Statistics, layer_of, layers_of

NAME = "int4_blocks"
BLOCK = 32  # inputs that share a scale: unpacked as fast as 64, and closer
ACCURACY = 4  # int8 activations: 3 times as fast as fp32 ones on AVX2


def quantize_blocks(
    model: onnx.ModelProto, statistics: Statistics | None = None, *, precision: Mapping[str, str] = {}
) -> PassResult:
    """MatMul and Gemm with constant weights → MatMulNBits, symmetric, an fp16 scale for BLOCK inputs.

    statistics: of this graph, to round by covariance; None rounds to nearest. precision: node name → "int8" (8-bit
    blocks) or "fp32". Gathers of an embedding that an output layer shares read its blocks; others get their own.
    """
    graph = Graph(model)
    counts = {"int4": 0, "int8": 0, "embeddings": 0}
    shared: dict[str, tuple[str, str, int]] = {}  # weights [K, N] → blocks [N, ⌈K / block⌉, bytes], scales, bits
    names = [layer.node.name for layer in layers_of(graph) if layer.node.op_type != "Conv"]
    for name in names:
        (node,) = (node for node in model.graph.node if node.name == name)  # replacing one copies all others
        layer = layer_of(graph, node)
        assert layer is not None
        wanted = precision.get(name, "int4")
        if wanted == "fp32" or not _plain(layer.node):
            continue
        bits, source = (8 if wanted == "int8" else 4), layer.node.input[1]
        if source not in shared:
            known = None if bits == 8 else statistics
            covariance = known and shrink(known.covariance(layer)[0], known.rows(layer))
            blocks, scales = _store(graph, source, layer.weights[0], covariance, bits)
            shared[source] = (blocks, scales, bits)
        _multiply(graph, layer, *shared[source])
        counts[wanted] += 1
    for output in [node.output[0] for node in model.graph.node if node.op_type == "Gather"]:
        counts["embeddings"] += _gather(graph, graph.producer[output], shared)
    graph.prune()
    use_domain(model)
    return PassResult(NAME, {"block": BLOCK, "rounding": "nearest" if statistics is None else "covariance"}, counts)


def _size(width: int) -> int:
    """The inputs to a block: BLOCK where that divides the width; else 16, the last block filled up with zeros."""
    return BLOCK if width % BLOCK == 0 else 16


def _plain(node: onnx.NodeProto) -> bool:
    return attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0


def _store(graph: Graph, name: str, rows: np.ndarray, covariance: np.ndarray | None, bits: int) -> tuple[str, str]:
    """Round rows [N, K]; names of blocks uint8 [N, ⌈K/block⌉, block·bits/8] and of scales fp16 [N·⌈K/block⌉]."""
    outputs, width = rows.shape
    block = _size(width)
    extra = -width % block
    rows = np.pad(rows, ((0, 0), (0, extra)))
    if bits == 8:
        blocked = rows.reshape(outputs, -1, block)
        scales = np.maximum(np.abs(blocked).max(-1) / 127, 2.0**-20).astype(np.float16)
        steps = np.rint(blocked / scales[..., None].astype(np.float32))
        stored = (np.clip(steps, -127, 127) + 128).astype(np.uint8)
    else:
        if covariance is not None and extra:
            covariance = np.pad(covariance, ((0, 0), (0, extra), (0, extra)))
        whole, scales = round_float_blocks(rows, covariance, block=block)
        nibbles = (whole + 8).astype(np.uint8).reshape(outputs, -1, block)
        stored = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    graph.set_constant(f"{name}_blocks", stored)
    graph.set_constant(f"{name}_scales", scales.reshape(-1))
    return f"{name}_blocks", f"{name}_scales"


def _multiply(graph: Graph, layer: Layer, blocks: str, scales: str, bits: int) -> None:
    node = layer.node
    _, outputs, width = layer.shape
    result = node.output[0]
    bias = list(node.input[2:3]) if node.op_type == "Gemm" else []
    product = f"{result}_product" if bias and bias[0] else result
    new = [] if f"{scales}_wide" in graph.producer else [_widen(scales)]
    new.append(
        helper.make_node(
            "MatMulNBits",
            [node.input[0], blocks, f"{scales}_wide"],
            [product],
            name=node.name,
            domain=DOMAIN,
            K=width,
            N=outputs,
            bits=bits,
            block_size=_size(width),
            accuracy_level=ACCURACY,
        )
    )
    if product != result:
        new.append(helper.make_node("Add", [product, bias[0]], [result], name=f"{node.name}_bias"))
    graph.replace([node], new)


def _gather(graph: Graph, gather: onnx.NodeProto, shared: dict[str, tuple[str, str, int]]) -> int:
    """Let a Gather of words read blocks: those of the output layer where it is tied (see tie.py), or its own."""
    shape = graph.shape(gather.input[0])
    if shape is None or graph.dtype(gather.input[0]) != np.float32 or len(shape) != 2:
        return 0
    old, axis = [gather], attribute(gather, "axis", 0)
    result = gather.output[0]
    if axis == 1:  # columns of [K, words], turned into rows by the Transpose behind it
        turn = graph.only_reader(result)
        if turn is None or turn.op_type != "Transpose" or gather.input[0] not in shared:
            return 0
        old.append(turn)
        result = turn.output[0]
    words, width = shape[::-1] if axis == 1 else shape
    if width % 16:  # a filled-up block: what is gathered would be too wide
        return 0
    if axis == 1:
        blocks, scales, bits = shared[gather.input[0]]
    else:
        table = graph.reader(gather.input[0])()
        blocks, scales, bits = *_store(graph, gather.input[0], table, None, 4), 4
    rows = graph.set_constant("rows_shape", np.array([0, -1], np.int64))
    lines = graph.set_constant(f"{blocks}_lines", np.array([words, -1], np.int64))
    new = [] if f"{scales}_wide" in graph.producer else [_widen(scales)]
    new += [
        helper.make_node("Reshape", [blocks, rows], [f"{result}_bytes"], name=f"{result}_bytes"),
        helper.make_node("Reshape", [f"{scales}_wide", lines], [f"{result}_scales"], name=f"{result}_scales"),
        helper.make_node(
            "GatherBlockQuantized",
            [f"{result}_bytes", gather.input[1], f"{result}_scales"],
            [result],
            name=f"{result}_gather",
            domain=DOMAIN,
            bits=bits,
            block_size=_size(width),
            gather_axis=0,
            quantize_axis=1,
        ),
    ]
    graph.replace(old, new)
    return 1


def _widen(scales: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [scales], [f"{scales}_wide"], name=f"{scales}_widen", to=TensorProto.FLOAT)
