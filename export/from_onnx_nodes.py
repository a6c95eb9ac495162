"""New nodes around the graph of somebody else's export, and what such graphs say of themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, ValueInfoProto
from onnx.helper import make_node

from ..runtime.errors import UsageError
from .graph import Graph

SCOPE = "framed/"  # of the names of what is added
OLDEST = 13  # the first opset where Squeeze, Unsqueeze and ReduceSum take their axes as an input
# Operators that later opsets read in another way, and nodes of older ones with them
CHANGED = {"Split", "Resize", "Pad", "RoiAlign", "GridSample", "BatchNormalization", "GroupNormalization", "ReduceMean"}
CHANGED |= {"ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"}
CHANGED |= {"ReduceSumSquare", "DFT", "ScatterElements", "ScatterND"}


def opened(model: onnx.ModelProto, what: str) -> Graph:
    """The graph, its functions inlined, its notes dropped. UsageError where it is too old."""
    if model.functions:
        from onnx.inliner import inline_local_functions

        model.CopyFrom(inline_local_functions(model))
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST:
        raise UsageError(f"{what} is of ONNX opset {opset}, and from {OLDEST} on is known: export it again")
    model.producer_name, model.producer_version, model.doc_string = "edgecap", "", ""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    given = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in given]  # before IR 4 constants were inputs
    if len(kept) != len(model.graph.input):
        copies = [ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del model.graph.input[:]
        model.graph.input.extend(copies)
    return Graph(model)


def one_opset(embed: onnx.ModelProto, decoder: onnx.ModelProto) -> list[Any]:
    """One opset for both: the decoder's, or else the embedding's, if the other's nodes mean the same in it. UsageError
    if neither will do."""
    domains: dict[str, int] = {}
    for model in (embed, decoder):
        for entry in model.opset_import:
            name = "" if entry.domain == "ai.onnx" else entry.domain
            domains[name] = max(domains.get(name, 0), entry.version)
    own = {id(model): _plain_opset(model) for model in (embed, decoder)}
    for chosen, other in ((decoder, embed), (embed, decoder)):
        if all(_same_node(node, own[id(other)], own[id(chosen)]) for node in other.graph.node):
            domains[""] = own[id(chosen)]
            return [onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()]
    raise UsageError(
        f"the embedding is of ONNX opset {own[id(embed)]} and the decoder of {own[id(decoder)]}, which do not go "
        "together: take variants that were exported alike"
    )


def _plain_opset(model: onnx.ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _same_node(node: NodeProto, old: int, new: int) -> bool:
    """Whether a node of opset `old` says the same in opset `new`."""
    if old == new or node.domain not in ("", "ai.onnx"):
        return True
    try:
        before, after = (onnx.defs.get_schema(node.op_type, version, "") for version in (old, new))
    except onnx.defs.SchemaError:  # ONNX Runtime's own in the plain domain, which have one version
        return not onnx.defs.has(node.op_type)
    if before.since_version == after.since_version:
        return True
    return node.op_type not in CHANGED and all(item.name in after.attributes for item in node.attribute)


class Nodes:
    """New nodes in their order. Names that are not those of the graph's own tensors get a scope, and are known by the
    short one."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: list[NodeProto] = []
        self.behind: list[NodeProto] = []
        self.after = False  # whether what is added goes behind the graph
        self.known: dict[str, str] = {}

    def add(self, op: str, inputs: list[str], output: str, *, own: bool = False, **attributes: Any) -> str:
        """own: the output keeps its name, which the graph reads or gives."""
        name = output if own else self.known.setdefault(output, SCOPE + output)
        node = make_node(op, [self.known.get(each, each) for each in inputs], [name], name=SCOPE + output, **attributes)
        (self.behind if self.after else self.made).append(node)
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        return self.graph.set_constant(f"{SCOPE}constant/{name}", value)

    def cast(self, name: str, kind: int, output: str, *, source: int, own: bool = False) -> str:
        """`name`, of the type `source`, as `kind`."""
        if kind != source:
            return self.add("Cast", [name], output, own=own, to=kind)
        return self.add("Identity", [name], output, own=own) if own else self.known.get(name, name)

    def freed(self, name: str) -> str:
        """Rename a tensor of the graph, so that its name can be given to another; its new name."""
        new = f"{SCOPE}all_{name}"
        node = self.graph.producer[name]
        node.output[list(node.output).index(name)] = new
        self.graph.reroute(name, new)
        return new


def declare(graph: Graph, nodes: Nodes, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> None:
    """Put the new nodes around the graph's own and give it these inputs and outputs."""
    graph.set_nodes(_sorted([*nodes.made, *graph.graph.node, *nodes.behind]))
    for values, wanted in ((graph.graph.input, inputs), (graph.graph.output, outputs)):
        del values[:]
        values.extend(wanted)
    graph.graph.name = "graph"
    graph.refresh()
    if not any(_inner(node) for node in graph.graph.node):  # what those read is not counted
        graph.prune()


def _sorted(nodes: list[NodeProto]) -> list[NodeProto]:
    """Each behind those whose outputs it reads: converters append casts that engines sort in."""
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    done, begun, order = set(), set(), []
    for root in range(len(nodes)):
        stack = [root]
        while stack:
            index = stack[-1]
            waits = [maker[name] for name in _read(nodes[index]) if name in maker and maker[name] not in done]
            if not waits:
                if index not in done:
                    order.append(nodes[index])
                done.add(index)
                stack.pop()
            elif index in begun:
                raise UsageError("the export's nodes wait for each other")
            else:
                begun.add(index)
                stack += waits
    return order


def _read(node: NodeProto) -> list[str]:
    """What a node reads, inside the graphs that it holds, too."""
    return [*node.input, *(name for graph in _inner(node) for each in graph.node for name in _read(each))]


def _inner(node: NodeProto) -> list[onnx.GraphProto]:
    return [item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]


def kind_of(value: ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def sizes_of(value: ValueInfoProto) -> list[int]:
    """Its sizes, 0 where one is open."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def listed(values: Any) -> str:
    names = [value.name for value in values]
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
