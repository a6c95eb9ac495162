"""Pass: a residual's Add and the RMSNormalization behind it become one operator of ONNX Runtime.

Its own fusions look for earlier spellings of the normalization. It saves a step two small operators a layer.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto
from onnx.helper import make_node

from .graph import DOMAIN, Graph, PassResult, attribute, use_domain

NAME = "residual_norms"


def fuse_residual_norms(model: ModelProto) -> PassResult:
    """Add(a, b), RMSNormalization → SkipSimplifiedLayerNormalization, in place; the sum keeps its name and readers.

    Only the last axis, with a constant scale [width] and computed summands: constants might broadcast.
    """
    graph = Graph(model)
    new: dict[str, NodeProto] = {}
    gone: set[str] = set()
    for norm in model.graph.node:
        add = graph.producer.get(norm.input[0]) if norm.op_type == "RMSNormalization" else None
        if add is None or add.op_type != "Add" or add.output[0] in new or add.output[0] in graph.outputs:
            continue
        scale = _constant(graph, norm.input[1])
        if scale is None or scale.ndim != 1 or attribute(norm, "axis", -1) != -1:
            continue
        if any(name in graph.initializers for name in add.input):
            continue
        gone.add(norm.output[0])
        new[add.output[0]] = make_node(
            "SkipSimplifiedLayerNormalization",
            [*add.input, norm.input[1]],
            [norm.output[0], "", "", add.output[0]],
            name=norm.name,
            domain=DOMAIN,
            epsilon=attribute(norm, "epsilon", 1e-5),
        )
    nodes = [new.get(node.output[0], node) for node in model.graph.node if node.output[0] not in gone]
    graph.set_nodes(nodes)
    if new:
        use_domain(model)
    return PassResult(NAME, cost={"fused": len(new)})


def _constant(graph: Graph, name: str) -> np.ndarray | None:
    """A constant, or what a Cast widens when the graph is loaded."""
    cast = graph.producer.get(name)
    return graph.constant(cast.input[0] if cast is not None and cast.op_type == "Cast" else name)
