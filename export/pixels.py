"""Pass: let uint8 pixels be the first layer's quantized input, so that no float image is ever made."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from .graph import Graph, PassResult, attribute

NAME = "pixels_as_quantized_input"
MIDDLE = 128
LAID_OUT = ("Slice", "Reshape", "Transpose")


def fold_pixels(model: onnx.ModelProto, pixels: str = "pixels") -> PassResult:
    """Replace Cast and the normalisation's Mul, Div, Sub, Add up to the first Conv by one DequantizeLinear.

    pixel p → x = a·p + b per channel becomes d = s·(p - z) with z whole; a/s goes into the Conv's weights and a·z + b
    into its bias. Exact but for the padding at the picture's border, where d = 0 stands for pixel z instead of x = 0
    (half a grey level where mean = 0.5). Patches that are rows of a MatMul: see `_fold_patches`. Leaves any other graph
    as it is.
    """
    graph = Graph(model)
    if _fold_patches(graph, pixels):
        return PassResult(NAME, {"scale": 1.0, "zero_point": MIDDLE}, {"changed": True})
    chain, tensor = [], pixels
    scale, shift = np.ones(1), np.zeros(1)
    transpose = None
    while (node := _only_reader(graph, tensor, pixels)) is not None and node.op_type != "Conv":
        if node.op_type == "Transpose" and not chain:
            transpose = node
        elif node.op_type == "Cast" and attribute(node, "to") == onnx.TensorProto.FLOAT:
            chain.append(node)
        elif node.op_type in ("Mul", "Div", "Sub", "Add") and (value := _per_channel(graph, node, tensor)) is not None:
            if node.op_type in ("Mul", "Div"):
                factor = value if node.op_type == "Mul" else 1 / value
                scale, shift = scale * factor, shift * factor
            else:
                shift = shift + (value if node.op_type == "Add" else -value)
            chain.append(node)
        else:
            return PassResult(NAME, cost={"changed": False})
        tensor = node.output[0]
    conv = graph.only_reader(tensor)
    weights = graph.constant(conv.input[1]) if conv is not None and transpose is not None and chain else None
    if weights is None or attribute(conv, "group", 1) != 1 or len(graph.consumers[conv.input[1]]) != 1:
        return PassResult(NAME, cost={"changed": False})

    channels = weights.shape[1]
    scale, shift = np.broadcast_to(scale, channels), np.broadcast_to(shift, channels)
    step = float(np.abs(scale).mean())
    zero = int(np.clip(np.rint(np.mean(-shift / scale)), 0, 255))
    offset = scale * zero + shift  # [C]
    new_bias = np.einsum("oihw,i->o", weights.astype(np.float64), offset)
    if len(conv.input) > 2 and conv.input[2]:
        new_bias = new_bias + graph.constant(conv.input[2])
    graph.set_constant(conv.input[1], (weights * (scale / step)[None, :, None, None]).astype(np.float32))
    bias = graph.set_constant(f"{conv.output[0]}_bias", new_bias.astype(np.float32))
    dequantize = helper.make_node(
        "DequantizeLinear",
        [
            transpose.output[0],
            graph.set_constant("pixels_scale", np.float32(step)),
            graph.set_constant("pixels_zero", np.uint8(zero)),
        ],
        ["pixels_real"],
        name="pixels_dequantize",
    )
    inputs = [conv.input[0], conv.input[1], bias]
    del conv.input[:]
    conv.input.extend(["pixels_real", *inputs[1:]])
    graph.replace(chain, [dequantize])
    graph.prune()
    return PassResult(NAME, {"scale": step, "zero_point": zero}, {"changed": True})


def _fold_patches(graph: Graph, pixels: str) -> bool:
    """Cast(p) @ W + b → (p - 128) @ W + (b + 128 · ΣW), for pixels that were only laid out before, as patches.

    The difference is a DequantizeLinear of scale 1. Without it, rounding W would shift all that is bright: the largest
    error of all layers.
    """
    tensor = pixels
    while (node := _only_reader(graph, tensor, pixels)) is not None and node.op_type in LAID_OUT:
        tensor = node.output[0]
    multiply = graph.only_reader(node.output[0]) if node is not None and node.op_type == "Cast" else None
    add = graph.only_reader(multiply.output[0]) if multiply is not None and multiply.op_type == "MatMul" else None
    if node is None or multiply is None or add is None or add.op_type != "Add" or multiply.input[0] != node.output[0]:
        return False
    weights = graph.constant(multiply.input[1])
    (other,) = (name for name in add.input if name != multiply.output[0])
    bias = graph.constant(other)
    if weights is None or weights.ndim != 2 or bias is None or bias.shape != weights.shape[1:]:
        return False
    moved = (bias + MIDDLE * weights.sum(0, dtype=np.float64)).astype(np.float32)
    add.input[list(add.input).index(other)] = graph.set_constant(f"{add.output[0]}_bias", moved)
    scale, zero = graph.set_constant("pixels_scale", np.float32(1)), graph.set_constant("pixels_zero", np.uint8(MIDDLE))
    name = "pixels_dequantize"
    graph.replace([node], [helper.make_node("DequantizeLinear", [tensor, scale, zero], list(node.output), name=name)])
    graph.prune()
    return True


def _only_reader(graph: Graph, tensor: str, pixels: str) -> onnx.NodeProto | None:
    """The single node reading the values of `tensor`; the input's shape may be read, too (a batch of class tokens)."""
    if tensor != pixels:
        return graph.only_reader(tensor)
    readers = [node for node in graph.consumers.get(tensor, []) if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 else None


def _per_channel(graph: Graph, node: onnx.NodeProto, tensor: str) -> np.ndarray | None:
    """The constant operand as [1] or [C], where `tensor` is the first operand (or the op commutes); else None."""
    index = list(node.input).index(tensor)
    if index and node.op_type in ("Div", "Sub"):
        return None
    value = graph.constant(node.input[1 - index])
    if value is None or value.size not in (1, value.shape[-3] if value.ndim >= 3 else 1):
        return None
    return value.astype(np.float64).reshape(-1)
