"""Pass: store weights in 4 bits, and their scales in fp16, where an int8 graph allows it exactly.

The graph gets a few nodes that unpack what is stored. Engines run them once, when they load the graph (constant
folding), and then see the int8 graph they have fast kernels for: half the bytes, the same speed, in any engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper

from .graph import Graph, PassResult, attribute
from .rounding import MULTIPLIERS, NIBBLE

NAME = "pack_4_bits"
OFFSET = 8  # nibbles are stored as 1..15


@dataclass(frozen=True)
class Packed:
    """One int8 tensor as quarters (-7..7) times multipliers (1..9), both with the blocked axis split in two."""

    name: str
    shape: tuple[int, ...]
    quarters: np.ndarray
    multipliers: np.ndarray


def pack(model: onnx.ModelProto) -> PassResult:
    """Store int8 weights whose blocks are multiples of at most 7 steps as nibbles, and their scales as fp16.

    All of it comes back to the bit; what does not fit (other weights, scales that fp16 does not hold) stays as it is.
    """
    graph = Graph(model)
    packed = []
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or any(node.input[0] == each.name for each in packed):
            continue
        value = graph.constant(node.input[0])
        if value is not None and value.dtype == np.int8 and value.ndim >= 2 and prod(value.shape[2:]) == 1:
            channel = attribute(node, "axis", 1)
            found = split(node.input[0], value, 1 - channel if channel in (0, 1) else 0)
            if found is not None:
                packed.append(found)
    nodes = _nibbles(graph, packed)
    channels = _channels(graph)
    _in_front(model, nodes + channels)
    graph.refresh()
    graph.prune()
    weights = sum(each.quarters.size for each in packed)
    return PassResult(NAME, {}, {"tensors": len(packed), "weights": weights})


def split(name: str, value: np.ndarray, axis: int) -> Packed | None:
    """The widest blocks along `axis` (0 or 1) whose values are one multiplier times -7..7; None where 8 are not."""
    width = value.shape[axis]
    for size in sorted((size for size in range(8, width + 1) if width % size == 0), reverse=True):
        blocked = value.reshape(*value.shape[:axis], width // size, size, *value.shape[axis + 1 :]).astype(np.int16)
        largest = np.abs(blocked).max(axis=axis + 1, keepdims=True)
        multipliers = np.zeros_like(largest)
        for candidate in range(1, MULTIPLIERS + 1):
            fits = (blocked % candidate == 0).all(axis=axis + 1, keepdims=True) & (largest <= NIBBLE * candidate)
            multipliers = np.where(fits, candidate, multipliers)
        if multipliers.all():
            return Packed(name, value.shape, (blocked // multipliers).astype(np.int8), multipliers.astype(np.int8))
    return None


def _nibbles(graph: Graph, packed: list[Packed]) -> list[onnx.NodeProto]:
    """Put all quarters and multipliers into one tensor of bytes, and return the nodes that take it apart."""
    if not packed:
        return []
    parts = [each.quarters.reshape(-1) for each in packed] + [each.multipliers.reshape(-1) - OFFSET for each in packed]
    flat = np.concatenate(parts) + OFFSET  # 1..15
    flat = np.pad(flat, (0, len(flat) % 2)).astype(np.uint8)
    low, high = np.split(flat, 2)
    graph.set_constant("nibbles", low | high << 4)
    graph.set_constant("nibble_mask", np.uint8(15))
    graph.set_constant("nibble_shift", np.uint8(4))
    graph.set_constant("nibble_offset", np.int8(OFFSET))
    sizes = [len(part) for part in parts]
    total = sum(sizes[: len(packed)])
    graph.set_constant("nibble_sizes", np.array([total, len(flat) - total], np.int64))
    graph.set_constant("quarter_sizes", np.array(sizes[: len(packed)], np.int64))
    # The last part takes the byte's other half, should it be left over.
    rest = sizes[len(packed) :]
    spare = [len(flat) - sum(sizes)] if len(flat) > sum(sizes) else []
    graph.set_constant("multiplier_sizes", np.array(rest + spare, np.int64))
    quarters = [f"q{i}" for i in range(len(packed))]
    multipliers = [f"m{i}" for i in range(len(packed))]
    nodes = [
        helper.make_node("BitwiseAnd", ["nibbles", "nibble_mask"], ["nibbles_low"]),
        helper.make_node("BitShift", ["nibbles", "nibble_shift"], ["nibbles_high"], direction="RIGHT"),
        helper.make_node("Concat", ["nibbles_low", "nibbles_high"], ["nibbles_all"], axis=0),
        helper.make_node("Cast", ["nibbles_all"], ["nibbles_int8"], to=TensorProto.INT8),
        helper.make_node("Split", ["nibbles_int8", "nibble_sizes"], ["nibbles_q", "nibbles_m"], axis=0),
        helper.make_node("Sub", ["nibbles_q", "nibble_offset"], ["nibbles_signed"]),
        helper.make_node("Split", ["nibbles_signed", "quarter_sizes"], quarters, axis=0),
        helper.make_node("Split", ["nibbles_m", "multiplier_sizes"], multipliers + ["spare"] * bool(spare), axis=0),
    ]
    for i, each in enumerate(packed):
        shapes = {"q": each.quarters.shape, "m": each.multipliers.shape, "w": each.shape}
        for shape in shapes.values():
            graph.set_constant(_shape_name(shape), np.array(shape, np.int64))
        nodes += [
            helper.make_node("Reshape", [f"q{i}", _shape_name(shapes["q"])], [f"q{i}r"]),
            helper.make_node("Reshape", [f"m{i}", _shape_name(shapes["m"])], [f"m{i}r"]),
            helper.make_node("Mul", [f"q{i}r", f"m{i}r"], [f"w{i}"]),
            helper.make_node("Reshape", [f"w{i}", _shape_name(each.shape)], [each.name]),
        ]
        graph.graph.initializer.remove(graph.initializers.pop(each.name))
    return nodes


def _channels(graph: Graph) -> list[onnx.NodeProto]:
    """All layers' scales in one fp16 tensor, zero points and scales of biases made from it; the nodes that do it."""
    layers = {}  # scale name → (size, zero point name)
    for node in graph.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        scale, zero = graph.constant(node.input[1]), graph.constant(node.input[2])
        if scale is None or scale.ndim != 1 or zero is None or zero.dtype != np.int8 or zero.any():
            continue
        if np.array_equal(scale, scale.astype(np.float16)):
            layers[node.input[1]] = (len(scale), node.input[2])
    if not layers:
        return []
    flat = np.concatenate([graph.constant(name) for name in layers])
    graph.set_constant("scales_fp16", flat.astype(np.float16))
    graph.set_constant("channel_sizes", np.array([size for size, _ in layers.values()], np.int64))
    graph.set_constant("channel_count", np.array([len(flat)], np.int64))
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.int8))
    products = _products(graph, layers)
    gone = {name for scale, (_, zero) in layers.items() for name in (scale, zero)} | set(products)
    for name in sorted(gone):
        graph.graph.initializer.remove(graph.initializers.pop(name))
    return [
        helper.make_node("Cast", ["scales_fp16"], ["scales_fp32"], to=TensorProto.FLOAT),
        helper.make_node("Split", ["scales_fp32", "channel_sizes"], list(layers), axis=0),
        helper.make_node("ConstantOfShape", ["channel_count"], ["zeros"], value=zero),
        helper.make_node("Split", ["zeros", "channel_sizes"], [name for _, name in layers.values()], axis=0),
        *(helper.make_node("Mul", list(factors), [name]) for name, factors in products.items()),
    ]


def _products(graph: Graph, layers: dict[str, tuple[int, str]]) -> dict[str, tuple[str, str]]:
    """The scales of int32 biases that are the product of the weights' and the input's scale, and those two."""
    found = {}
    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        inputs, weights, bias = (graph.producer.get(name) for name in node.input[:3])
        if inputs is None or weights is None or bias is None or weights.input[1] not in layers:
            continue
        if inputs.op_type != "DequantizeLinear" or bias.op_type != "DequantizeLinear":
            continue
        factors = (weights.input[1], inputs.input[1])
        one, other, scale = (graph.constant(name) for name in (*factors, bias.input[1]))
        if other is not None and scale is not None and np.array_equal(one * other, scale):
            found[bias.input[1]] = factors
    return found


def _in_front(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*nodes, *model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _shape_name(shape: tuple[int, ...]) -> str:
    return "shape_" + "x".join(map(str, shape))


def short_names(model: onnx.ModelProto) -> PassResult:
    """Rename all tensors between a graph's inputs and outputs to a few letters: long names are 2% of a small graph."""
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}
    short: dict[str, str] = {}

    def rename(name: str) -> str:
        return name if name in fixed else short.setdefault(name, f"t{len(short)}")

    before = model.ByteSize()
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [rename(name) for name in names]
    for tensor in graph.initializer:
        tensor.name = rename(tensor.name)
    return PassResult("short_names", {}, {"saved_bytes": before - model.ByteSize()})
