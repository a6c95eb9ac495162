"""Pass: projections that read one tensor become one MatMul and a Split: fewer operators, longer products.

Columns of a product know nothing of each other, so that nothing changes but the order of sums inside the engine. It is
for ONNX Runtime: OpenVINO, Core ML and llama.cpp merge (or not) by themselves, and keep reading the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto
from onnx.helper import make_node

from .graph import Graph, PassResult

NAME = "merge_projections"


@dataclass(frozen=True)
class _Projection:
    """A MatMul by constant weights [K, N], and the Add of a constant [N] behind it, if there is one."""

    multiply: NodeProto
    shape: tuple[int, int]
    add: NodeProto | None
    bias: np.ndarray | None

    @property
    def output(self) -> str:
        return (self.add or self.multiply).output[0]

    @property
    def nodes(self) -> list[NodeProto]:
        return [node for node in (self.multiply, self.add) if node is not None]


def merge_projections(model: ModelProto) -> PassResult:
    """Merge, in place, the MatMuls that multiply one tensor by constant matrices that nothing else reads.

    With biases (an Add of a constant behind each) or without, but not mixed. A merged node's name is that of its parts
    with "+" between; the tensors behind the Split keep their names.
    """
    graph = Graph(model)
    groups = [found for name in _read(graph) if len(found := _projections(graph, name)) > 1]
    new: dict[str, list[NodeProto]] = {}  # output of the first multiplication → what takes the place of all
    gone: set[str] = set()
    for group in groups:
        gone |= {node.output[0] for each in group for node in each.nodes}
        new[group[0].multiply.output[0]] = _merged(graph, group)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        name = node.output[0]
        nodes += new.get(name, [] if name in gone else [node])
    graph.set_nodes(nodes)
    graph.prune()
    return PassResult(NAME, cost={"before": sum(map(len, groups)), "after": len(groups)})


def _read(graph: Graph) -> list[str]:
    """What MatMuls multiply, in the graph's order."""
    return list(dict.fromkeys(node.input[0] for node in graph.graph.node if node.op_type == "MatMul"))


def _projections(graph: Graph, name: str) -> list[_Projection]:
    """Those of a tensor that can be merged."""
    found = []
    for node in graph.consumers.get(name, []):
        if node.op_type != "MatMul" or node.input[0] != name or node.output[0] in graph.outputs:
            continue
        shape = graph.shape(node.input[1])
        if shape is None or len(shape) != 2 or graph.dtype(node.input[1]) != np.float32:
            continue
        if len(graph.consumers[node.input[1]]) > 1:  # a tied embedding: merging would store it twice
            continue
        add = graph.only_reader(node.output[0])
        bias = None
        if add is not None and add.op_type == "Add" and add.output[0] not in graph.outputs:
            values = [graph.constant(each) for each in add.input if each != node.output[0]]
            bias = values[0] if values and values[0] is not None and values[0].shape == shape[1:] else None
        found.append(_Projection(node, (shape[0], shape[1]), add if bias is not None else None, bias))
    biased = [each for each in found if each.bias is not None]
    return found if not biased or len(biased) == len(found) else []


def _merged(graph: Graph, group: list[_Projection]) -> list[NodeProto]:
    first = group[0]
    name = "+".join(each.multiply.name for each in group)
    product = f"{first.output}_merged"
    widths = tuple(each.shape[1] for each in group)
    weights = graph.set_made(
        f"{product}_weights",
        [each.multiply.input[1] for each in group],
        (first.shape[0], sum(widths)),
        lambda *parts: np.concatenate(parts, 1),
    )
    nodes = [make_node("MatMul", [first.multiply.input[0], weights], [product], name=name)]
    if first.bias is not None:
        bias = graph.set_constant(f"{product}_bias", np.concatenate([each.bias for each in group]))
        nodes.append(make_node("Add", [product, bias], [f"{product}_biased"], name=f"{name}_bias"))
        product = f"{product}_biased"
    sizes = graph.set_constant("split_" + "_".join(map(str, widths)), np.array(widths))
    outputs = [each.output for each in group]
    return [*nodes, make_node("Split", [product, sizes], outputs, name=f"{name}_split", axis=-1)]
