"""Small views over an ONNX graph: who makes and reads a tensor, constants as arrays, deterministic saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from .external import SMALLEST, Maker, external_of, maker

BESIDE = 1024  # bytes of a tensor that `split` leaves where it is
ALIGNED = 64  # bytes
DOMAIN = "com.microsoft"  # of ONNX Runtime's own operators


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
        return None if tensor is None else _value(tensor)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of an initializer, whose value is not read; None where `name` is computed."""
        tensor = self.initializers.get(name)
        return None if tensor is None else tuple(tensor.dims)

    def dtype(self, name: str) -> np.dtype | None:
        """The same for its type."""
        tensor = self.initializers.get(name)
        return None if tensor is None else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)

    def reader(self, name: str) -> Maker:
        """What gives an initializer's value of now: where it lies outside, made anew each time."""
        make = maker(self.initializers[name])
        if make is None:
            value = numpy_helper.to_array(self.initializers[name])
            return lambda: value
        return make

    def set_constant(self, name: str, value: np.ndarray) -> str:
        """Add or replace an initializer; returns its name."""
        value, external = np.ascontiguousarray(value), external_of(self.model)
        if external is None or value.nbytes < SMALLEST:
            return self._set(name, numpy_helper.from_array(value, name))
        return self._set(name, external.put(name, value.dtype, value.shape, lambda: value))

    def set_made(
        self,
        name: str,
        sources: Iterable[str],
        shape: tuple[int, ...],
        change: Callable[..., np.ndarray],
        dtype: npt.DTypeLike = None,
    ) -> str:
        """The same for what `change` makes of other initializers, of `dtype` or else the first one's: outside, where
        they are, whenever it is read."""
        sources, external = list(sources), external_of(self.model)
        kind = self.dtype(sources[0]) if dtype is None else np.dtype(dtype)
        makers = [self.reader(source) for source in sources]
        if external is None or math.prod(shape) * kind.itemsize < SMALLEST:
            return self.set_constant(name, change(*(make() for make in makers)))
        return self._set(name, external.put(name, kind, shape, lambda: change(*(make() for make in makers))))

    def _set(self, name: str, tensor: onnx.TensorProto) -> str:
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


def use_domain(model: onnx.ModelProto) -> None:
    """Say that a model has operators of ONNX Runtime's own."""
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def split(model: onnx.ModelProto, file: str) -> tuple[bytes, bytes]:
    """The model without its larger weights, and these as the contents of `file`, which lies beside it.

    An engine maps such a file: without, it holds the weights twice while it packs them for its kernels.
    """
    weights = BytesIO()
    return _split(model, file, weights), weights.getvalue()


def split_to(model: onnx.ModelProto, path: Path) -> bytes:
    """The same with the weights written to a file, one after the other."""
    with open(path, "wb") as file:
        return _split(model, path.name, file)


def _split(model: onnx.ModelProto, file: str, weights: BinaryIO) -> bytes:
    light = onnx.ModelProto()
    light.CopyFrom(model)
    if external_of(model) is not None:
        del light.metadata_props[:]
    at = 0
    for tensor in light.graph.initializer:
        data = _beside(tensor)
        if data is None:
            continue
        gap = -at % ALIGNED
        weights.write(bytes(gap))
        weights.write(data)
        place = {"location": file, "offset": str(at + gap), "length": str(len(data))}
        at += gap + len(data)
        kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        kept.data_location = onnx.TensorProto.EXTERNAL
        for key, value in place.items():
            kept.external_data.add(key=key, value=value)
        tensor.CopyFrom(kept)
    return save(light)


def _beside(tensor: onnx.TensorProto) -> bytes | memoryview | None:
    """The contents of a tensor that is large enough to lie beside the graph."""
    if (make := maker(tensor)) is not None:
        return memoryview(np.ascontiguousarray(make()).reshape(-1).view(np.uint8))
    if tensor.ByteSize() < BESIDE or tensor.data_type == onnx.TensorProto.STRING:
        return None
    data = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
    return data if len(data) > BESIDE else None


def _value(tensor: onnx.TensorProto) -> np.ndarray:
    make = maker(tensor)
    return numpy_helper.to_array(tensor) if make is None else make()


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
    """The model as the bytes of one file, with nothing in them that changes from run to run. Weights that lay outside
    are put in, and must fit by now."""
    if external_of(model) is not None:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        del whole.metadata_props[:]
        for tensor in whole.graph.initializer:
            if (make := maker(tensor)) is not None:
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(make()), tensor.name))
        model = whole
    return model.SerializeToString(deterministic=True)


@contextmanager
def loadable(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """A graph as an engine takes it: its bytes, or the path of a file that is there until the engine has mapped it."""
    beside = external_of(model)
    if beside is None:
        yield save(model)
        return
    with TemporaryDirectory(dir=beside.folder, ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(split_to(model, path.with_suffix(".bin")))
        yield str(path)
