"""Pass: int8 MatMuls of graphs larger than the CPU's caches: activations static per-tensor where calibration saw rows
alike, dynamic per-token where it did not.

Language models have tokens (often the first) whose rows of activations are hundreds of times as large as all others':
one scale for a whole tensor, calibrated or not, leaves the others nothing. There each row is divided by its own largest
value before it is quantized, and multiplied by it behind the product: four small operators more for a layer, a tenth
of a step. Either way rows know nothing of each other, so that a photo gets the same caption in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx.helper import make_node

from .gelu import is_gelu
from .graph import Graph, PassResult, attribute
from .rounding import round_weights
from .statistics import Layer, Statistics, layers_of

NAME = "int8_matmul"
ALIKE = 4  # one scale may make the steps of the quietest tenth of rows so many times as large as their own: two bits
# A GELU gives nothing below -0.17: of 255 steps 33 lie below zero, and reach 33 / 222 of a row's largest value, which
# counts as 1.2 at least: 0.178.
GELU_BELOW, GELU_LEAST = 33, 1.2
AXIS, STEP, MIDDLE = "rows/axis", "rows/step", "rows/middle"
GELU_TOP, GELU_STEP, GELU_ZERO = "rows/gelu_top", "rows/gelu_step", "rows/gelu_zero"


def matmul_statistics(model: onnx.ModelProto) -> Statistics:
    """What `quantize_matmuls` asks of calibration, before the first run: `Statistics.add` them."""
    inputs = [layer.input for layer in layers_of(Graph(model)) if layer.node.op_type != "Conv"]
    return Statistics(model, [], [], peaks=list(dict.fromkeys(inputs)))


def quantize_matmuls(
    model: onnx.ModelProto, known: Statistics | None = None, *, precision: Mapping[str, str] = {}
) -> PassResult:
    """Quantize MatMul and Gemm with constant weights in place: QDQ, s8 weights per channel, u8 activations.

    known: `matmul_statistics` of this graph; None: every layer per-token. precision: node name → "fp32" for those that
    stay as they are. Weights are rounded to nearest and keep clear of int16 saturation (see `rounding`).
    """
    graph = Graph(model)
    graph.set_constant(AXIS, np.array([-1]))
    graph.set_constant(STEP, np.array(1 / 127, np.float32))
    graph.set_constant(MIDDLE, np.array(128, np.uint8))
    graph.set_constant(GELU_TOP, np.array(GELU_LEAST, np.float32))
    graph.set_constant(GELU_STEP, np.array(1 / (255 - GELU_BELOW), np.float32))
    graph.set_constant(GELU_ZERO, np.array(GELU_BELOW, np.uint8))
    counts = {"per_tensor": 0, "per_token": 0}
    new: dict[str, list[onnx.NodeProto]] = {}
    stored: dict[str, str] = {}  # weights → their DequantizeLinear's output
    scaled: dict[str, bool] = {}  # activations → whether per-token
    for layer in layers_of(graph):
        node = layer.node
        if node.op_type == "Conv" or precision.get(node.name) == "fp32":
            continue
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            continue
        nodes: list[onnx.NodeProto] = []
        pixels = _is_quantized(graph, layer.input)
        if layer.input not in scaled and not pixels:
            static = _per_tensor(graph, layer.input, known)
            scaled[layer.input] = not static
            dynamic = _per_token_gelu if is_gelu(graph, layer.input) else _per_token
            nodes += static or dynamic(layer.input)
        source = f"{node.input[1]}{'_turned' if attribute(node, 'transB', 0) else ''}"
        if source not in stored:
            stored[source] = f"{source}_real"
            nodes.append(_store(graph, layer, source))
            if source == node.input[1]:  # a tied embedding's Gather reads it, too
                graph.reroute(source, stored[source])
        if pixels:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            nodes[-1].input[1] = stored[source]
        per_token = scaled.get(layer.input, False)  # pixels have the one scale that they always had
        counts["per_token" if per_token else "per_tensor"] += 1
        new[node.output[0]] = nodes if pixels else [*nodes, *_multiply(node, layer.input, stored[source], per_token)]
    graph.set_nodes(each for node in model.graph.node for each in new.get(node.output[0], [node]))
    _weights_first(graph, set(stored.values()))
    graph.prune()
    runs = 0 if known is None else known.runs
    activations = "uint8, static per-tensor or dynamic per-token"
    params = {"format": "QDQ", "activations": activations, "weights": "int8 per channel", "calibration_runs": runs}
    return PassResult(NAME, params, counts)


def _per_tensor(graph: Graph, name: str, known: Statistics | None) -> list[onnx.NodeProto]:
    """[..., K] → uint8 steps by one calibrated scale, back as reals; nothing where rows are not alike."""
    if known is None:
        return []
    low, high = known.range(name, method="minmax")
    step = (high - low) / 255
    if not 0 < step <= ALIKE * known.quietest(name) / 127:
        return []
    scale = graph.set_constant(f"{name}_step", np.float32(step))
    zero = graph.set_constant(f"{name}_zero", np.uint8(round(-low / step)))
    whole, real = f"{name}_whole", f"{name}_quantized"
    return [
        make_node("QuantizeLinear", [name, scale, zero], [whole], name=whole),
        make_node("DequantizeLinear", [whole, scale, zero], [real], name=real),
    ]


def _per_token(name: str) -> list[onnx.NodeProto]:
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


def _per_token_gelu(name: str) -> list[onnx.NodeProto]:
    """The same for what comes out of a GELU: no step is spent on what it never gives, no pass over rows on signs."""
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


def _store(graph: Graph, layer: Layer, name: str) -> onnx.NodeProto:
    """Round a layer's weights, and read them as reals [K, N]."""
    rounded = round_weights(layer.weights, None, None)
    whole = graph.set_constant(f"{name}_int8", rounded.weights[0].T)
    scales = graph.set_constant(f"{name}_scales", rounded.scales[0])
    zeros = graph.set_constant(f"{name}_zeros", np.zeros(len(rounded.scales[0]), np.int8))
    return make_node("DequantizeLinear", [whole, scales, zeros], [f"{name}_real"], name=f"{name}_real", axis=1)


def _multiply(node: onnx.NodeProto, rows: str, weights: str, per_token: bool) -> list[onnx.NodeProto]:
    result = node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    scaled = f"{result}_scaled" if bias else result
    product = f"{result}_units" if per_token else scaled
    nodes = [make_node("MatMul", [f"{rows}_quantized", weights], [product], name=node.name)]
    if per_token:
        nodes.append(make_node("Mul", [product, f"{rows}_largest"], [scaled], name=scaled))
    return nodes + ([make_node("Add", [scaled, bias], [result], name=result)] if bias else [])


def _weights_first(graph: Graph, names: set[str]) -> None:
    """A tied embedding is read before the output layer, where its weights were stored."""
    nodes = list(graph.graph.node)
    graph.set_nodes(sorted(nodes, key=lambda node: node.output[0] not in names))
