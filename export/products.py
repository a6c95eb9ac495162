"""Passes for ONNX Runtime: no operator beside a product of matrices that the product could do itself."""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import ModelProto, NodeProto
from onnx.helper import make_node

from .graph import DOMAIN, Graph, PassResult, attribute, use_domain
from .patterns import biased, last_size


def unflatten_products(model: ModelProto) -> PassResult:
    """Reshape to [rows, K], Gemm, Reshape back → MatMul and Add of the tensor as it was, in place: GPT-2's Conv1D.

    A MatMul multiplies the last axis whatever stands before it. The first Reshape is to [-1, K], of a tensor whose last
    axis is K (or whose heads make K together), the second ends in N.
    """
    graph = Graph(model)
    gone: set[str] = set()
    new: dict[str, list[NodeProto]] = {}
    for gemm in model.graph.node:
        before = graph.producer.get(gemm.input[0]) if gemm.op_type == "Gemm" else None
        after = graph.only_reader(gemm.output[0])
        if before is None or after is None or (before.op_type, after.op_type) != ("Reshape", "Reshape"):
            continue
        shape, bias = graph.shape(gemm.input[1]), gemm.input[2] if len(gemm.input) > 2 else ""
        plain = not any(attribute(gemm, name, 0) for name in ("transA", "transB"))
        plain &= attribute(gemm, "alpha", 1.0) == attribute(gemm, "beta", 1.0) == 1.0
        if shape is None or not plain or (bias and graph.shape(bias) != shape[1:]):
            continue
        rows = _unflattened(graph, before, shape[0])
        if rows is None or last_size(graph, after.input[1]) != shape[1]:
            continue
        gone.add(gemm.output[0])
        result = after.output[0]
        product = f"{result}_product" if bias else result
        multiply = make_node("MatMul", [rows[-1].output[0] if rows else before.input[0], gemm.input[1]], [product])
        multiply.name = gemm.name
        new[result] = [*rows, multiply]
        if bias:
            new[result].append(make_node("Add", [product, bias], [result], name=f"{gemm.name}_bias"))
    graph.set_nodes(
        each for node in model.graph.node if node.output[0] not in gone for each in new.get(node.output[0], [node])
    )
    graph.prune()
    return PassResult("unflatten_products", cost={"products": len(new)})


def _unflattened(graph: Graph, reshape: NodeProto, width: int) -> list[NodeProto] | None:
    """What a product by [width, N] reads in the place of a Reshape to [-1, width] that only puts leading axes together:
    nothing new, or heads [rows, length, heads, size] side by side; None where that is not known."""
    shape = graph.constant(reshape.input[1])
    if shape is None or shape.tolist() != [-1, width]:
        return None
    if _width(graph, reshape.input[0]) == width:
        return []
    heads = graph.producer.get(reshape.input[0])
    if heads is None or heads.op_type != "Transpose" or attribute(heads, "perm") != [0, 2, 1, 3]:
        return None
    beside, name = graph.set_constant("side_by_side", np.array([0, 0, -1])), f"{reshape.output[0]}_side_by_side"
    return [make_node("Reshape", [reshape.input[0], beside], [name], name=name)]


def _width(graph: Graph, name: str) -> int | None:
    """The last axis of a tensor, where a normalization, a Reshape or a product on the way to it tells it."""
    while (node := graph.producer.get(name)) is not None:
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            shape = graph.shape(node.input[1])
            return shape[-1] if shape else None
        if node.op_type == "Reshape":
            return last_size(graph, node.input[1])
        if node.op_type in ("MatMul", "Gemm"):
            shape = graph.shape(node.input[1])
            return shape[-1] if shape and not attribute(node, "transB", 0) else None
        if node.op_type not in ("Add", "Mul", "Tanh", "Relu", "Sigmoid", "Cast"):
            return None
        name = next((each for each in node.input if each not in graph.initializers), "")
    return None


def fuse_products(model: ModelProto) -> PassResult:
    """Each quantized MatMul, with the Add of a bias behind it → MatMulIntegerToFloat, in place.

    Of MatMuls of QDQ form: uint8 activations by one scale, int8 weights by one for each column, symmetric. ONNX Runtime
    fuses these by itself, but leaves the Add, and reads zeros of weights that have none: 5% of one row's time.
    """
    graph = Graph(model)
    new: dict[str, NodeProto] = {}
    gone: set[str] = set()
    biases = 0
    for node in model.graph.node:
        sides = [graph.producer.get(name) for name in node.input] if node.op_type == "MatMul" else []
        if not sides or not _one_scale(graph, sides[0]) or not _symmetric(graph, sides[1]):
            continue
        assert sides[0] is not None and sides[1] is not None
        (a, a_scale, a_zero), (b, b_scale) = sides[0].input, sides[1].input[:2]
        add, inputs, result = graph.only_reader(node.output[0]), [a, b, a_scale, b_scale, a_zero], node.output[0]
        found = biased(graph, add)
        if add is not None and found is not None and graph.shape(found[1]) == graph.shape(b_scale):
            inputs, result = [*inputs, "", found[1]], add.output[0]
            gone.add(node.output[0])
            biases += 1
        new[result] = make_node("MatMulIntegerToFloat", inputs, [result], name=node.name, domain=DOMAIN)
    graph.set_nodes(new.get(node.output[0], node) for node in model.graph.node if node.output[0] not in gone)
    graph.prune()
    if new:
        use_domain(model)
    return PassResult("fuse_products", cost={"products": len(new), "biases": biases})


def _one_scale(graph: Graph, node: NodeProto | None) -> bool:
    """Whether a node reads uint8 activations by one stored scale."""
    if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
        return False
    scale, zero = graph.shape(node.input[1]), graph.constant(node.input[2])
    return scale is not None and prod(scale) == 1 and zero is not None and zero.dtype == np.uint8


def _symmetric(graph: Graph, node: NodeProto | None) -> bool:
    """Whether a node reads stored int8 weights [K, N], or their stored Transpose, by a scale for each column."""
    if node is None or node.op_type != "DequantizeLinear" or attribute(node, "axis", 1) != 1:
        return False
    scale, zero = graph.shape(node.input[1]), graph.constant(node.input[2]) if len(node.input) > 2 else None
    turn = graph.producer.get(node.input[0])
    stored = turn.input[0] if turn is not None and turn.op_type == "Transpose" else node.input[0]
    if scale is None or len(scale) != 1 or graph.dtype(stored) != np.int8:
        return False
    return zero is None or not zero.any()
