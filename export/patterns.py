"""What graphs are searched for: chains of operators, scalar factors, biases behind products."""

from __future__ import annotations

import onnx

from .graph import Graph


def chain(graph: Graph, name: str, kinds: tuple[str, ...]) -> list[onnx.NodeProto]:
    """The nodes behind `name`, last first, if they are of these kinds along their computed operands; else []."""
    nodes = []
    for kind in kinds:
        node = graph.producer.get(name)
        if node is None or node.op_type != kind:
            return []
        nodes.append(node)
        # Where both operands are computed, as in x + 0.044715·x³, the chain goes on by the one that fits.
        following = [source for source in node.input if source not in graph.initializers]
        wanted = kinds[len(nodes)] if len(nodes) < len(kinds) else None
        fitting = [s for s in following if (p := graph.producer.get(s)) is not None and p.op_type == wanted]
        name = node.input[0] if kind in ("Reshape", "Transpose") else (fitting or following or [""])[0]
    return nodes


def scalar(graph: Graph, node: onnx.NodeProto) -> float | None:
    """The only constant operand, one number."""
    values = [value for name in node.input if (value := graph.constant(name)) is not None]
    return float(values[0].reshape(())) if len(values) == 1 and values[0].size == 1 else None


def unscaled(graph: Graph, name: str) -> tuple[str, float]:
    """What a Mul by one number multiplies, and the number; else the tensor itself and 1."""
    node = graph.producer.get(name)
    if node is not None and node.op_type == "Mul" and (value := scalar(graph, node)) is not None:
        return next(source for source in node.input if graph.constant(source) is None), value
    return name, 1.0


def biased(graph: Graph, node: onnx.NodeProto | None) -> tuple[str, str] | None:
    """The two operands of an Add of a computed tensor and a bias [width]."""
    if node is None or node.op_type != "Add":
        return None
    for x, bias in (node.input, reversed(node.input)):
        value = graph.constant(bias)
        if value is not None and value.ndim == 1 and graph.constant(x) is None:
            return x, bias
    return None


def last_size(graph: Graph, shape: str) -> int | None:
    """The last entry of a Reshape's shape, where that is a constant."""
    value = graph.constant(shape)
    node = graph.producer.get(shape)
    if value is None and node is not None and node.op_type == "Concat":
        value = graph.constant(node.input[-1])
    return int(value[-1]) if value is not None and value.size and value[-1] > 0 else None
