"""Pass: read word embeddings from the int8 weights that the quantized output layer already stores."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from .graph import Graph, PassResult, attribute
from .rounding import round_nearest

NAME = "int8_embedding"


def quantize_embeddings(model: onnx.ModelProto, *, by_rows: bool = False) -> PassResult:
    """Let each Gather over a constant float table read int8 and scale only the rows it fetched.

    A table that is also a quantized layer's weights (DequantizeLinear of int8) is shared with it; any other one is
    rounded here, with one scale a word. by_rows: store a table [dim, vocab] so that a word's weights are neighbours.
    """
    graph = Graph(model)
    shared = separate = 0
    for name in [node.output[0] for node in model.graph.node if node.op_type == "Gather"]:
        gather = graph.producer[name]  # looked up each time: replacing one node copies all others
        source, axis = gather.input[0], attribute(gather, "axis", 0)
        producer = graph.producer.get(source)
        if producer is not None and producer.op_type == "DequantizeLinear" and producer.input[0] in graph.initializers:
            table, scales = producer.input[0], producer.input[1]
            if graph.constant(scales).size != graph.constant(table).shape[axis]:
                continue  # scaled along the other axis: fetched rows would need every scale
            shared += 1
        else:
            value = graph.constant(source)
            if value is None or value.dtype != np.float32 or value.ndim != 2:
                continue
            rows = value if axis == 0 else value.T
            rounded = round_nearest(rows[None], pairs=False)
            whole = rounded.weights[0] if axis == 0 else rounded.weights[0].T
            table = graph.set_constant(f"{source}_int8", whole)
            scales = graph.set_constant(f"{source}_scales", rounded.scales[0])
            separate += 1
        turn, ids, old = graph.only_reader(name) if axis == 1 else None, gather.input[1], [gather]
        perm = attribute(turn, "perm") if turn is not None and turn.op_type == "Transpose" else []
        if turn is not None and perm == [1, 0]:
            graph.replace([gather, turn], _rows(graph, table, scales, ids, turn.output[0], by_rows))
            continue
        if turn is not None and by_rows and perm and perm == [*range(1, len(perm)), 0]:  # ids of several axes
            old, name, axis, table = [gather, turn], turn.output[0], 0, _by_rows(graph, table)
        new = [
            helper.make_node("Gather", [table, ids], [f"{name}_int8"], name=f"{name}_gather", axis=axis),
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_steps"], name=f"{name}_cast", to=TensorProto.FLOAT),
            helper.make_node("Gather", [scales, ids], [f"{name}_scale"], name=f"{name}_scales", axis=0),
        ]
        scale = f"{name}_scale"
        if axis == 0:  # fetched [*ids, dim], scales [*ids]
            minus = graph.set_constant("last_axis", np.array([-1], np.int64))
            new.append(helper.make_node("Unsqueeze", [scale, minus], [f"{scale}s"], name=f"{name}_unsqueeze"))
            scale = f"{scale}s"
        new.append(helper.make_node("Mul", [f"{name}_steps", scale], [name], name=f"{name}_scaled"))
        graph.replace(old, new)
    graph.prune()
    return PassResult(NAME, cost={"shared_with_output_layer": shared, "rounded": separate})


def _by_rows(graph: Graph, table: str) -> str:
    """Store a table [dim, vocab] as [vocab, dim] under the name returned. The layer multiplying by it reads it through
    a Transpose, which engines carry out once, when they load the graph."""
    rows, columns = f"{table}_rows", f"{table}_columns"
    graph.set_constant(rows, graph.constant(table).T)
    graph.reroute(table, columns)
    graph.graph.node.insert(0, helper.make_node("Transpose", [rows], [columns], name=columns, perm=[1, 0]))
    return rows


def _rows(graph: Graph, table: str, scales: str, ids: str, out: str, by_rows: bool) -> list[onnx.NodeProto]:
    """Float rows `ids` [n] of an int8 table [dim, vocab], in as few operations as there are; by_rows as above."""
    fetched = f"{out}_int8"
    if by_rows:
        rows = _by_rows(graph, table)
        new = [helper.make_node("Gather", [rows, ids], [fetched], name=f"{out}_gather", axis=0)]
    else:
        new = [
            helper.make_node("Gather", [table, ids], [f"{out}_columns"], name=f"{out}_gather", axis=1),
            helper.make_node("Transpose", [f"{out}_columns"], [fetched], name=f"{out}_transpose", perm=[1, 0]),
        ]
    return [
        *new,
        helper.make_node("Gather", [scales, ids], [f"{out}_scale"], name=f"{out}_scales", axis=0),
        helper.make_node("DequantizeLinear", [fetched, f"{out}_scale"], [out], name=f"{out}_scaled", axis=0),
    ]
