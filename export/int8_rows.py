"""Pass: int8 MatMuls whose activations are scaled row by row, for graphs larger than the CPU's caches.

Language models have rows (often the first word's) whose activations are hundreds of times as large as all others': one
scale for a whole tensor, calibrated or not, leaves the others nothing. Here each row is divided by its own largest
value before it is quantized, and multiplied by it behind the product. Rows know nothing of each other, so that a photo
gets the same caption in any batch, and nothing has to be calibrated. Four small operators more for a layer cost some
percent of a step, which waits for the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx.helper import make_node

from .graph import Graph, PassResult, attribute
from .rounding import round_weights
from .statistics import Layer, Statistics, layers_of
from .vision import is_gelu

NAME = "int8_rows"
AXIS, STEP, MIDDLE = "rows/axis", "rows/step", "rows/middle"
GELU_TOP, GELU_STEP, GELU_ZERO = "rows/gelu_top", "rows/gelu_step", "rows/gelu_zero"


def quantize_rows(
    model: onnx.ModelProto, statistics: Statistics | None = None, *, precision: Mapping[str, str] = {}
) -> PassResult:
    """Quantize MatMul and Gemm with constant weights in place: QDQ, s8 weights per channel, u8 activations per row.

    statistics: of this graph, to round weights by covariance; None rounds to nearest. precision: node name → "fp32"
    for those that stay as they are. Weights keep clear of int16 saturation (see `rounding`).
    """
    graph = Graph(model)
    graph.set_constant(AXIS, np.array([-1]))
    graph.set_constant(STEP, np.array(1 / 127, np.float32))
    graph.set_constant(MIDDLE, np.array(128, np.uint8))
    graph.set_constant(GELU_TOP, np.array(1.2, np.float32))
    graph.set_constant(GELU_STEP, np.array(1 / 222, np.float32))
    graph.set_constant(GELU_ZERO, np.array(33, np.uint8))  # 33 / 222 · 1.2 = 0.178
    new: dict[str, list[onnx.NodeProto]] = {}
    stored: dict[str, str] = {}  # weights → their DequantizeLinear's output
    scaled: set[str] = set()
    for layer in layers_of(graph):
        node = layer.node
        if node.op_type == "Conv" or precision.get(node.name) == "fp32":
            continue
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            continue
        nodes: list[onnx.NodeProto] = []
        pixels = _is_quantized(graph, layer.input)
        if layer.input not in scaled and not pixels:
            scaled.add(layer.input)
            nodes += _scale_gelu(layer.input) if is_gelu(graph, layer.input) else _scale(layer.input)
        source = f"{node.input[1]}{'_turned' if attribute(node, 'transB', 0) else ''}"
        if source not in stored:
            stored[source] = f"{source}_real"
            nodes.append(_store(graph, layer, statistics, source))
            if source == node.input[1]:  # a tied embedding's Gather reads it, too
                graph.reroute(source, stored[source])
        if pixels:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            nodes[-1].input[1] = stored[source]
        new[node.output[0]] = nodes if pixels else [*nodes, *_multiply(node, layer.input, stored[source])]
    graph.set_nodes(each for node in model.graph.node for each in new.get(node.output[0], [node]))
    _weights_first(graph, set(stored.values()))
    graph.prune()
    params = {"format": "QDQ", "activations": "uint8 per row", "weights": "int8 per channel"}
    params["rounding"] = "nearest" if statistics is None else "covariance"
    return PassResult(NAME, params, {"layers": len(new)})


def _scale(name: str) -> list[onnx.NodeProto]:
    """[..., K] → its rows' largest values [..., 1] and uint8 steps, back as reals. A row of zeros comes out as NaN,
    which quantizes to anything at all, and is multiplied by 0."""
    size, largest, unit, whole, real = (f"{name}_{part}" for part in ("size", "largest", "unit", "whole", "quantized"))
    return [
        make_node("Abs", [name], [size], name=size),
        make_node("ReduceMax", [size, AXIS], [largest], name=largest, keepdims=1),
        make_node("Div", [name, largest], [unit], name=unit),
        make_node("QuantizeLinear", [unit, STEP, MIDDLE], [whole], name=whole),
        make_node("DequantizeLinear", [whole, STEP, MIDDLE], [real], name=real),
    ]


def _scale_gelu(name: str) -> list[onnx.NodeProto]:
    """The same for what comes out of a GELU: no step is spent on what is below its minimum, -0.17, and no pass over the
    rows on signs. (Rows without anything above 1.2 take the steps of 1.2.)"""
    top, largest, unit, whole, real = (f"{name}_{part}" for part in ("top", "largest", "unit", "whole", "quantized"))
    return [
        make_node("ReduceMax", [name, AXIS], [top], name=top, keepdims=1),
        make_node("Clip", [top, GELU_TOP], [largest], name=largest),
        make_node("Div", [name, largest], [unit], name=unit),
        make_node("QuantizeLinear", [unit, GELU_STEP, GELU_ZERO], [whole], name=whole),
        make_node("DequantizeLinear", [whole, GELU_STEP, GELU_ZERO], [real], name=real),
    ]


def _is_quantized(graph: Graph, name: str) -> bool:
    """Whether the rows were uint8 all along, as pixels are (see `fold_pixels`)."""
    node = graph.producer.get(name)
    return node is not None and node.op_type == "DequantizeLinear" and node.name == "pixels_dequantize"


def _store(graph: Graph, layer: Layer, statistics: Statistics | None, name: str) -> onnx.NodeProto:
    """Round a layer's weights, and read them as reals [K, N]."""
    known = (None, None) if statistics is None else statistics.covariance(layer)
    rounded = round_weights(layer.weights, *known)
    whole = graph.set_constant(f"{name}_int8", rounded.weights[0].T)
    scales = graph.set_constant(f"{name}_scales", rounded.scales[0])
    zeros = graph.set_constant(f"{name}_zeros", np.zeros(len(rounded.scales[0]), np.int8))
    return make_node("DequantizeLinear", [whole, scales, zeros], [f"{name}_real"], name=f"{name}_real", axis=1)


def _multiply(node: onnx.NodeProto, rows: str, weights: str) -> list[onnx.NodeProto]:
    result = node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    units, scaled = f"{result}_units", f"{result}_scaled" if bias else result
    nodes = [
        make_node("MatMul", [f"{rows}_quantized", weights], [units], name=node.name),
        make_node("Mul", [units, f"{rows}_largest"], [scaled], name=scaled),
    ]
    return nodes + ([make_node("Add", [scaled, bias], [result], name=result)] if bias else [])


def _weights_first(graph: Graph, names: set[str]) -> None:
    """A tied embedding is read before the output layer, where its weights were stored."""
    nodes = list(graph.graph.node)
    graph.set_nodes(sorted(nodes, key=lambda node: node.output[0] not in names))
