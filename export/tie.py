"""Pass: store the word embedding once where the output layer shares it.

The exporter folds the transposed copy that the output layer multiplies by into a second constant. Keeping only that
one, [dim, vocab], and gathering columns of it halves what is a quarter of a small captioner.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from .graph import Graph, PassResult, attribute

NAME = "tie_embedding"


def tie_embedding(model: onnx.ModelProto) -> PassResult:
    """Replace Gather(E, ids) by Transpose(Gather(Eᵀ, ids, axis=1)) where a MatMul or Gemm multiplies by Eᵀ."""
    graph = Graph(model)
    for gather in [node for node in model.graph.node if node.op_type == "Gather" and attribute(node, "axis", 0) == 0]:
        table = graph.constant(gather.input[0])
        if table is None or table.ndim != 2 or table.dtype != np.float32:
            continue
        tied = _output_layer(graph, table)
        if tied is None:
            continue
        name = _as_columns(graph, tied)
        rank = _rank(graph, gather.input[1])
        if name is None or rank is None:
            continue
        columns = f"{gather.output[0]}_columns"  # [dim, *ids]
        perm = [*range(1, rank + 1), 0]
        new = [
            helper.make_node("Gather", [name, gather.input[1]], [columns], name=f"{gather.name}_columns", axis=1),
            helper.make_node("Transpose", [columns], [gather.output[0]], name=f"{gather.name}_rows", perm=perm),
        ]
        graph.replace([gather], new)
        graph.prune()
        return PassResult(NAME, cost={"changed": True, "saved_parameters": int(table.size)})
    return PassResult(NAME, cost={"changed": False})


def _output_layer(graph: Graph, table: np.ndarray) -> onnx.NodeProto | None:
    for node in graph.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        shape = graph.shape(node.input[1])
        if shape is None or sorted(shape) != sorted(table.shape):
            continue
        weights = graph.constant(node.input[1])
        columns = weights.T if attribute(node, "transB", 0) else weights
        if columns.shape == table.shape[::-1] and np.array_equal(columns, table.T):
            return node
    return None


def _as_columns(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The name of the [dim, vocab] constant the node multiplies by, turning a Gemm's transB around if need be."""
    name = node.input[1]
    if not attribute(node, "transB", 0):
        return name
    turned = graph.set_constant(f"{name}_columns", graph.constant(name).T)
    node.input[1] = turned
    kept = [item for item in node.attribute if item.name != "transB"]
    del node.attribute[:]
    node.attribute.extend(kept)
    graph.refresh()
    return turned


def _rank(graph: Graph, name: str) -> int | None:
    """Rank of an integer tensor that is a graph input or an input with axes added or removed."""
    for value in graph.graph.input:
        if value.name == name:
            return len(value.type.tensor_type.shape.dim)
    node = graph.producer.get(name)
    if node is None or node.op_type not in ("Unsqueeze", "Squeeze", "Cast", "Identity"):
        return None
    inner = _rank(graph, node.input[0])
    if inner is None or node.op_type in ("Cast", "Identity"):
        return inner
    axes = graph.constant(node.input[1]) if len(node.input) > 1 else None
    return None if axes is None else inner + axes.size * (1 if node.op_type == "Unsqueeze" else -1)
