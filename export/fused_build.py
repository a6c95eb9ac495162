"""Building one ONNX graph out of others: nodes scope by scope, and a whole model inlined under a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.errors import EdgecapError

INT64, FLOAT, DOUBLE, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL


class Scope:
    """The nodes of one graph: the main one, or an inner one (a Loop's body, a branch), which sees the outer names.

    All constants go to the main graph, each value once.
    """

    def __init__(self, name: str = "", outer: Scope | None = None) -> None:
        self.name = name
        self.outer = outer
        self.root: Scope = self if outer is None else outer.root
        self.nodes: list[onnx.NodeProto] = []
        self.present: set[str] = set()  # outputs of inlined nodes
        self.initializers: dict[str, TensorProto] = {} if outer is None else outer.initializers
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {} if outer is None else outer._constants
        self._count = 0

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        return self.many(kind, *inputs, count=1, **attributes)[0]

    def many(self, kind: str, *inputs: str, count: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs; returns their names."""
        self._count += 1
        base = f"{self.name}{kind.lower()}_{self._count}"
        names = [base] if count == 1 else [f"{base}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=base, **attributes))
        return names

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A constant of the main graph; the same value is stored once."""
        array = np.asarray(value, dtype)
        content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
        key = (array.dtype.str, array.shape, content)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self.initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def share(self, name: str, tensor: TensorProto) -> str:
        """An initializer of an inlined model, stored once under `name`."""
        if name not in self.initializers:
            self.initializers[name] = copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name, copy.doc_string = name, ""
        return name


def value(name: str, kind: int, shape: Iterable[int | str] | None = None) -> onnx.ValueInfoProto:
    """A declared tensor; without a shape its rank stays open."""
    return helper.make_tensor_value_info(name, kind, None if shape is None else list(shape))


def inline(
    model: onnx.ModelProto,
    given: Mapping[str, str],
    scope: Scope,
    prefix: str,
    *,
    weights: str,
    fixed: Iterable[str] = (),
) -> dict[str, str]:
    """Put a model's nodes into `scope` with every input bound to a name there; returns output → its name there.

    prefix: of the names of what is computed; weights: of its constants and what follows from them alone, which goes
    to the main graph, once for all inlinings. fixed: inputs that never change while `scope`, a loop's body, is
    repeated: what depends on them and on constants alone is computed in the scope around it.
    A DequantizeLinear of constants stays beside its reader: engines fuse the two.
    Raises EdgecapError for a model with nested graphs.
    """
    graph, fixed = model.graph, set(fixed)
    names = {"": ""} | dict(given)
    level = {"": 0} | {name: 1 if name in fixed else 2 for name in given}  # 0 constant, 1 fixed, 2 changing
    scopes = (scope.root, scope.outer or scope, scope)
    dequantized: dict[str, onnx.NodeProto] = {}
    for tensor in graph.initializer:
        names[tensor.name] = scope.share(weights + tensor.name, tensor)
        level[tensor.name] = 0

    def add(node: onnx.NodeProto, where: int, prefix: str) -> None:
        target = scopes[where]
        inputs = []
        for name in node.input:
            if name in dequantized:
                local = f"{prefix}{name}" if where == 2 else f"{prefix}{name}_once"
                if local not in target.present:
                    known = names | {name: local}
                    _copy(target, dequantized[name], [known[each] for each in dequantized[name].input], [local])
                inputs.append(local)
            else:
                inputs.append(names[name])
        outputs = [prefix + name if name else "" for name in node.output]
        if not (set(outputs) - {""}) & target.present:  # constants: already there from another inlining
            _copy(target, node, inputs, outputs)
        for name, new in zip(node.output, outputs, strict=True):
            if name:
                names[name], level[name] = new, where

    for node in _sorted(graph, level):
        if any(item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for item in node.attribute):
            raise EdgecapError(f"--fused cannot merge graphs with {node.op_type} nodes, which hold graphs of their own")
        where = max((level[name] for name in node.input), default=0)
        if where == 0 and node.op_type == "DequantizeLinear":
            dequantized[node.output[0]] = node
            level[node.output[0]] = 0
        else:
            add(node, where, weights if where == 0 else prefix)
    for output in graph.output:
        if output.name in dequantized:
            raise EdgecapError(f"--fused cannot merge a graph whose output {output.name} is a constant")
    return {output.name: names[output.name] for output in graph.output}


def _copy(scope: Scope, node: onnx.NodeProto, inputs: list[str], outputs: list[str]) -> None:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name, copy.doc_string = outputs[0], ""
    del copy.input[:], copy.output[:], copy.metadata_props[:]
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    scope.nodes.append(copy)
    scope.present.update(outputs)


def _sorted(graph: onnx.GraphProto, known: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes, each behind what it reads (the quantizer appends its own at the end), else in their order."""
    ready, ordered, waiting = set(known), [], list(graph.node)
    while waiting:
        later = []
        for node in waiting:
            if all(name in ready for name in node.input):
                ordered.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise EdgecapError(f"--fused cannot merge a graph whose node {later[0].name!r} reads what nothing computes")
        waiting = later
    return ordered
