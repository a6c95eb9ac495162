"""Static int8: QDQ, u8 activations per tensor and s8 (or 4-bit) weights per channel, calibrated on training photos.

This is the form every engine's fast path reads: ONNX Runtime fuses it to QLinearConv and MatMulIntegerToFloat on x86,
ARM and WASM. Unlike dynamic per-tensor int8, whose scales depend on the batch, a photo gets one caption in any batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from .graph import Graph, PassResult, attribute
from .rounding import Rounded, round_blocks, round_weights, worst_pair
from .statistics import SEED, Layer, Statistics, layers_of

SHAPE_ONLY = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
BLOCK = 64  # inputs, at most, that share a multiplier at 4 bits
SPARED = 0.1  # of what could have 4 bits stays at 8: the smallest layers, few bytes and much of the error


def static_statistics(model: onnx.ModelProto) -> Statistics:
    """What `quantize_static` asks of calibration, before the first run: `Statistics.add` them. Convs take one photo a
    run."""
    graph = Graph(model)
    layers = layers_of(graph)
    return Statistics(model, _tensors(graph, _nodes(graph, layers)), layers)


def quantize_static(
    model: onnx.ModelProto,
    statistics: Statistics,
    *,
    bits: int = 8,
    spared: float = SPARED,
    precision: Mapping[str, str] = {},
) -> PassResult:
    """Quantize in place: Conv (with the Clip or Relu behind it), MatMul and Gemm with constant weights, residual Adds.

    statistics: `static_statistics` of this graph. bits: 4 rounds the weights of pointwise Convs, MatMuls and Gemms to
    4 bits times a multiplier for at most BLOCK inputs (see `round_blocks`), and all scales to what fp16 holds; the
    smallest layers, up to the share `spared` of these weights and none above a tenth of that, stay at 8 bits.
    precision: node name → "int8" or "fp32" where it is to be higher.
    """
    graph = Graph(model)
    del model.graph.value_info[:]  # stale shapes make the quantizer fail
    layers = [layer for layer in layers_of(graph) if precision.get(layer.node.name) != "fp32"]
    if not layers:
        return PassResult("static_int8", cost={"layers": 0})
    nodes = _nodes(graph, layers)
    tensors = _tensors(graph, nodes)
    overrides = {name: [_fixed(graph, name)] for name in tensors if _fixed(graph, name)}
    ranges = {}
    for name in tensors:
        low, high = statistics.range(name)
        ranges[name] = TensorData(lowest=np.float32(low), highest=np.float32(high))
    _share_ranges(graph, ranges)

    worst, four = 0, four_bit_layers(layers, spared, precision) if bits == 4 else set()
    for layer in layers:
        rounded = _round(graph, layer, statistics, ranges, bits=bits, four=layer.node.name in four)
        if not layer.depthwise:
            worst = max(worst, worst_pair(rounded.weights))
        overrides[layer.node.input[1]] = _apply(graph, layer, rounded)

    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({node.op_type for node in nodes}),
        extra_options={
            "TensorQuantOverrides": overrides,
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],  # what leaves the encoder stays float
            "DedicatedQDQPair": False,
        },
    )
    with _quiet():
        quantizer.quantize_model()
    model.CopyFrom(quantizer.model.model)
    _drop_second_pixels(model)
    _keep_float_readers(model, {node.name for node in nodes})
    _drop_bias_zeros(model)
    _guard_float_layers(model)
    del model.graph.value_info[:]
    return PassResult(
        "static_int8",
        {
            "format": "QDQ",
            "activations": "uint8, static per-tensor",
            "weights": "int8 per channel" if bits == 8 else "int4 in blocks, int8 where kernels are small",
            "range": "mse",
            "rounding": "covariance",
            "calibration_runs": statistics.runs,
            "seed": SEED,
        },
        {"layers": len(layers), "worst_weight_pair": worst} | ({"four_bits": len(four)} if bits == 4 else {}),
    )


def _nodes(graph: Graph, layers: list[Layer]) -> list[onnx.NodeProto]:
    """The layers and what is quantized with them."""
    nodes = [layer.node for layer in layers]
    activations = _activations(graph, nodes)
    return nodes + activations + _residuals(graph, layers, activations)


def _activations(graph: Graph, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    found = []
    for node in nodes:
        reader = graph.only_reader(node.output[0])
        if node.op_type == "Conv" and reader is not None and reader.op_type in ("Clip", "Relu"):
            found.append(reader)
    return found


def _residuals(graph: Graph, layers: list[Layer], activations: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Adds of two computed tensors of which at least one comes from a Conv."""
    ends = {node.output[0] for node in activations}
    ends |= {layer.node.output[0] for layer in layers if layer.node.op_type == "Conv"}
    found = []
    for node in graph.graph.node:
        if (
            node.op_type == "Add"
            and not any(name in graph.initializers for name in node.input)
            and ends & set(node.input)
        ):
            found.append(node)
            ends.add(node.output[0])
    return found


def _tensors(graph: Graph, nodes: list[onnx.NodeProto]) -> list[str]:
    """Float tensors that get a range: inputs and outputs of the quantized nodes, constants aside."""
    names = []
    for node in nodes:
        inputs = node.input[:1] if node.op_type in ("Conv", "MatMul", "Gemm", "Clip", "Relu") else node.input
        outputs = [] if node.op_type in ("MatMul", "Gemm") else node.output
        names += [name for name in (*inputs, *outputs) if name not in graph.initializers]
    return list(dict.fromkeys(names))


def _fixed(graph: Graph, name: str) -> dict | None:
    """Scale and zero point of a tensor that was stored quantized (the pixels)."""
    node = graph.producer.get(name)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return {"scale": graph.constant(node.input[1]).reshape(()), "zero_point": graph.constant(node.input[2]).reshape(())}


def _share_ranges(graph: Graph, ranges: dict[str, TensorData]) -> None:
    """One range where values are the same: no requantization through reshapes, and no work left for a Clip.

    A Conv whose output is clipped takes the clipped range: the clip is then what saturation does anyway.
    """
    for node in graph.graph.node:
        if node.op_type in ("Clip", "Relu") and node.output[0] in ranges and node.input[0] in ranges:
            ranges[node.input[0]] = ranges[node.output[0]]
    for name in ranges:
        source = name
        while (node := graph.producer.get(source)) is not None and node.op_type in SHAPE_ONLY:
            source = node.input[0]
        if source in ranges:
            ranges[name] = ranges[source]


def _round(
    graph: Graph,
    layer: Layer,
    statistics: Statistics,
    ranges: dict[str, TensorData],
    *,
    bits: int,
    four: bool,
) -> Rounded:
    """bits: of the graph; four: of this layer's weights."""
    covariance, mean = statistics.covariance(layer)
    low, high = (float(ranges[layer.input].range_value[i]) for i in (0, 1))
    bias = graph.constant(layer.node.input[2]) if len(layer.node.input) > 2 and layer.node.input[2] else None
    floor: np.ndarray | float = 1e-9
    if bias is not None:  # the int32 bias, in steps of input scale × weight scale, must not overflow
        shape = layer.shape[:2]
        floor = np.maximum(np.abs(bias).reshape(shape) / (2**30 * max((high - low) / 255, 1e-9)), 1e-9)
    # Depthwise kernels widen to int32 first and cannot saturate; kernels larger than 1×1 are laid out
    # channels-first or -last by engine, so their neighbours are unknown: 7 bits keep any pair in range.
    if not layer.depthwise and not layer.pointwise:
        floor = np.maximum(floor, np.abs(layer.weights).max(-1) / 64)
    if four:
        block = block_size(layer.shape[-1], BLOCK)
        return round_blocks(layer.weights, covariance, mean, block=block, floor=floor)
    pairs, half = not layer.depthwise, bits == 4
    return round_weights(layer.weights, covariance, mean, pairs=pairs, floor=floor, half=half)


def four_bit_layers(layers: list[Layer], spared: float = SPARED, precision: Mapping[str, str] = {}) -> set[str]:
    """The layers whose weights have 4 bits in a graph of 4 bits; small kernels (depthwise, the stem) never do.

    spared, precision: as for `quantize_static`.
    """
    layers = [layer for layer in layers if layer.pointwise and layer.shape[-1] >= 8]
    most = spared * sum(layer.size for layer in layers)
    chosen, passed = set(), 0
    for layer in sorted(layers, key=lambda layer: layer.size):
        passed += layer.size
        if (passed > most or layer.size > most / 10) and layer.node.name not in precision:
            chosen.add(layer.node.name)
    return chosen


def block_size(width: int, limit: int) -> int:
    """The largest divisor of `width` up to `limit`."""
    return max(size for size in range(1, min(width, limit) + 1) if width % size == 0)


def _apply(graph: Graph, layer: Layer, rounded: Rounded) -> list[dict]:
    """Write the rounded weights back as reals, correct the bias, and return the quantizer's overrides for them."""
    name = layer.node.input[1]
    shape = graph.constant(name).shape
    graph.set_constant(name, layer.to_tensor(rounded.real, shape).astype(np.float32))
    shift = rounded.shift.reshape(-1)
    if layer.node.op_type != "MatMul":
        bias = graph.constant(layer.node.input[2]) if len(layer.node.input) > 2 and layer.node.input[2] else 0.0
        if len(layer.node.input) < 3:
            layer.node.input.append("")
        layer.node.input[2] = graph.set_constant(f"{layer.node.output[0]}_bias", (bias + shift).astype(np.float32))
    else:
        reader = graph.only_reader(layer.node.output[0])
        other = (
            [n for n in reader.input if n != layer.node.output[0]]
            if reader is not None and reader.op_type == "Add"
            else []
        )
        if other and (bias := graph.constant(other[0])) is not None and bias.shape == shift.shape:
            graph.set_constant(other[0], (bias + shift).astype(np.float32))
    axis = 0 if layer.node.op_type == "Conv" or attribute(layer.node, "transB", 0) else 1
    channels = [{"scale": np.float32(scale), "zero_point": np.int8(0)} for scale in rounded.scales.reshape(-1)]
    channels[0]["axis"] = axis
    return channels


def _drop_second_pixels(model: onnx.ModelProto) -> None:
    """The quantizer wraps the already quantized pixels once more; let the first layer read them directly."""
    graph = Graph(model)
    for node in list(model.graph.node):
        source = graph.producer.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is not None and source.op_type == "DequantizeLinear" and source.name == "pixels_dequantize":
            for reader in graph.consumers[node.output[0]]:
                graph.reroute(reader.output[0], source.output[0])
    graph.refresh()
    graph.prune()


def _drop_bias_zeros(model: onnx.ModelProto) -> None:
    """A DequantizeLinear without zero point means 0: int32 biases need not store theirs, one for each channel."""
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) > 2:
            zeros = graph.constant(node.input[2])
            if zeros is not None and zeros.dtype == np.int32 and not zeros.any():
                del node.input[2]
    graph.refresh()
    graph.prune()


def _guard_float_layers(model: onnx.ModelProto) -> None:
    """Put a Clip that cuts nothing between a DequantizeLinear and a layer that stays float.

    ONNX Runtime quantizes float weights between quantized tensors by itself when it loads a graph, one scale for all.
    """
    graph = Graph(model)
    for name in [layer.node.output[0] for layer in layers_of(graph)]:
        node = graph.producer[name]
        source = graph.producer.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        guarded, limit = f"{node.input[0]}_as_float_{name}", float(np.finfo(np.float32).max)
        ends = [
            graph.set_constant(f"float_{end}", np.float32(sign * limit)) for end, sign in (("low", -1), ("high", 1))
        ]
        clip = onnx.helper.make_node("Clip", [node.input[0], *ends], [guarded], name=f"{guarded}_clip")
        node.input[0] = guarded
        graph.replace([node], [clip, node])


def _keep_float_readers(model: onnx.ModelProto, quantized: set[str]) -> None:
    """The quantizer lets every reader of a tensor read its int8 form; those that compute in float keep the float."""
    graph = Graph(model)
    for node in list(model.graph.node):
        source = node.input[0] if node.op_type == "QuantizeLinear" else None
        producer = graph.producer.get(source) if source else None
        if source is None or (
            producer is not None and (producer.name in quantized or producer.op_type == "DequantizeLinear")
        ):
            continue
        for dequantize in graph.consumers[node.output[0]]:
            for reader in graph.consumers.get(dequantize.output[0], []):
                if reader.name not in quantized and reader.op_type not in SHAPE_ONLY:
                    for index, name in enumerate(reader.input):
                        if name == dequantize.output[0]:
                            reader.input[index] = source
    graph.refresh()
    graph.prune()


@contextmanager
def _quiet():
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
