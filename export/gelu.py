"""tanh-GELU as torch's exporter spells it, and as ONNX Runtime's one operator for it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from .graph import DOMAIN, Graph, PassResult, use_domain
from .patterns import biased, chain, scalar


def fuse_gelus(model: onnx.ModelProto) -> PassResult:
    """Every tanh-GELU → FastGelu, in place: one operator instead of eight."""
    graph = Graph(model)
    names = [node.output[0] for node in graph.graph.node if node.op_type == "Tanh"]
    fused = sum(fuse_gelu(graph, graph.producer[name]) for name in names)  # by name: each replacement copies the nodes
    if fused:
        graph.prune()
        use_domain(model)
    return PassResult("fuse_gelus", cost={"fused": fused})


def fuse_gelu(graph: Graph, tanh: onnx.NodeProto) -> bool:
    """The GELU of which `tanh` is part → FastGelu, which adds the bias of the layer before, too; False: of none."""
    found = _tanh_gelu(graph, tanh)
    if found is None:
        return False
    x, end = found
    added = biased(graph, graph.producer.get(x))
    inputs = [x] if added is None else list(added)
    result = end.output[0]
    node = helper.make_node("FastGelu", inputs, [result], name=f"{result}_gelu", domain=DOMAIN)
    graph.replace([end], [node])
    return True


def is_gelu(graph: Graph, name: str) -> bool:
    """Whether a tensor is what a GELU gives, which is nowhere below -0.17."""
    node = graph.producer.get(name)
    if node is None or node.op_type in ("Gelu", "FastGelu"):
        return node is not None
    sources = node.input if node.op_type == "Mul" else []
    halves = [chain(graph, each, kinds) for each in sources for kinds in (("Mul", "Add", "Tanh"), ("Add", "Tanh"))]
    found = [_tanh_gelu(graph, half[-1]) for half in halves if half]
    return any(each is not None and each[1].output[0] == name for each in found)


def _tanh_gelu(graph: Graph, tanh: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
    """x and the last node of x · 0.5 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), of which `tanh` is part: the half
    stands before x or before the sum."""
    powers = chain(graph, tanh.input[0], ("Mul", "Add", "Mul", "Pow"))
    one = _reader(graph, tanh, "Add")
    following = _reader(graph, one, "Mul")
    if one is None or following is None or not powers:
        return None
    outer, inner, cubed, power = powers
    x = power.input[0]
    if scalar(graph, following) is not None:
        half, end = following, _reader(graph, following, "Mul")
        factors = {x, half.output[0]}
    else:
        before = [graph.producer.get(name) for name in following.input if name != one.output[0]]
        half, end = before[0] if before else None, following
        factors = {one.output[0], half.output[0]} if half is not None and x in half.input else set()
    if half is None or half.op_type != "Mul" or end is None or set(end.input) != factors:
        return None
    constants = [scalar(graph, node) for node in (outer, cubed, power, one, half)]
    wanted = (np.sqrt(2 / np.pi), 0.044715, 3.0, 1.0, 0.5)
    if any(value is None or abs(value - right) > 1e-6 for value, right in zip(constants, wanted, strict=True)):
        return None
    return (x, end) if set(inner.input) == {x, cubed.output[0]} else None


def _reader(graph: Graph, node: onnx.NodeProto | None, kind: str) -> onnx.NodeProto | None:
    """The only node that reads a node's output, if it is of this kind."""
    found = graph.only_reader(node.output[0]) if node is not None else None
    return found if found is not None and found.op_type == kind else None
