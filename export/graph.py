"""Small views over an ONNX graph: who makes and reads a tensor, constants as arrays, deterministic saving."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

BESIDE = 1024  # bytes of a tensor that `split` leaves where it is
ALIGNED = 64  # bytes


@dataclass(frozen=True)
class PassResult:
    """What one pass did: name, parameters, and what it changed or cost, as plain data for the bundle's lineage."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    def on(self, graph: str) -> PassResult:
        """The same result, saying which graph it was run on."""
        return PassResult(self.name, {"graph": graph, **self.params}, self.cost)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "params": self.params, "cost": self.cost}


class Graph:
    """An index over `model.graph`; call `refresh` after editing nodes or initializers by hand."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.refresh()

    def refresh(self) -> None:
        self.producer = {name: node for node in self.graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer, or None where `name` is computed (or empty)."""
        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def set_constant(self, name: str, value: np.ndarray) -> str:
        """Add or replace an initializer; returns its name."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if name in self.initializers:
            self.initializers[name].CopyFrom(tensor)
        else:
            self.graph.initializer.append(tensor)
            self.initializers[name] = self.graph.initializer[-1]
        return name

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The single node reading `name`, or None where there are several or it is a graph output."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def reroute(self, old: str, new: str) -> None:
        """Let every reader of `old` read `new` instead."""
        for node in self.consumers.get(old, []):
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def replace(self, old: Iterable[onnx.NodeProto], new: Iterable[onnx.NodeProto]) -> None:
        """Put `new` nodes where the first of the `old` nodes was and drop the old ones."""
        gone = [id(node) for node in old]
        nodes, done = [], False
        for node in self.graph.node:
            if id(node) not in gone:
                nodes.append(node)
            elif not done:
                nodes.extend(new)
                done = True
        _set_nodes(self.graph, nodes)
        self.refresh()

    def set_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Make these its nodes, in this order."""
        _set_nodes(self.graph, list(nodes))
        self.refresh()

    def prune(self) -> int:
        """Drop nodes and initializers that no output needs; returns how many."""
        needed, stack = set(), list(self.outputs)
        kept: set[int] = set()
        while stack:
            name = stack.pop()
            if name in needed:
                continue
            needed.add(name)
            node = self.producer.get(name)
            if node is not None:
                kept.add(id(node))
                stack.extend(node.input)
        before = len(self.graph.node) + len(self.graph.initializer)
        _set_nodes(self.graph, [node for node in self.graph.node if id(node) in kept])
        tensors = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
        del self.graph.initializer[:]
        self.graph.initializer.extend(copies)
        self.refresh()
        return before - len(self.graph.node) - len(self.graph.initializer)


def _set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = []
    for node in nodes:  # copies: protobuf frees the originals with the list
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or `default`."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def split(model: onnx.ModelProto, file: str) -> tuple[bytes, bytes]:
    """The model without its larger weights, and these as the contents of `file`, which lies beside it.

    An engine maps such a file: without, it holds the weights twice while it packs them for its kernels.
    """
    light = onnx.ModelProto()
    light.CopyFrom(model)
    parts, at = [], 0
    for tensor in light.graph.initializer:
        if tensor.ByteSize() < BESIDE or tensor.data_type == onnx.TensorProto.STRING:
            continue
        data = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        if len(data) <= BESIDE:
            continue
        gap = -at % ALIGNED
        parts += [bytes(gap), data]
        place = {"location": file, "offset": str(at + gap), "length": str(len(data))}
        at += gap + len(data)
        kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        kept.data_location = onnx.TensorProto.EXTERNAL
        for key, value in place.items():
            kept.external_data.add(key=key, value=value)
        tensor.CopyFrom(kept)
    return save(light), b"".join(parts)


def join(graph: bytes, weights: bytes = b"") -> onnx.ModelProto:
    """What `split` took apart."""
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start = int(place["offset"])
            tensor.raw_data = weights[start : start + int(place["length"])]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return model


def save(model: onnx.ModelProto) -> bytes:
    """The model as the bytes of one file, with nothing in them that changes from run to run."""
    return model.SerializeToString(deterministic=True)
