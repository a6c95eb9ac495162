"""What an ONNX file claims, read without an engine: nothing is run, no weights are copied or allocated."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

MAX_FIELDS = 300_000  # protobuf fields of one graph: 30 decoder layers, quantized, have about a third of it
MAX_DEPTH = 8  # of graphs inside graphs (Loop, If)
MAX_RANK = 32
MAX_ELEMENTS = 2**26  # of a tensor that a literal shape asks for


class GraphError(Exception):
    """What is wrong with a file, without the name of the file."""


class Value(NamedTuple):
    """A graph's input or output. shape: a size, the name of an open one or None; None where the rank is open, too."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


class Tensor(NamedTuple):
    """A stored tensor. size: bytes of its contents in the file. start, stop: where its message lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int
    stop: int


@dataclass
class OnnxSummary:
    """initializers: of the graph and the graphs inside it, and the literals of Constant nodes; nodes: how many."""

    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    initializers: list[Tensor] = field(default_factory=list)
    nodes: int = 0


# TensorProto.DataType → name, bits per element (onnx.proto; 0 bits: counted one by one)
_DTYPES = {
    **{1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16), 6: ("int32", 32)},
    **{7: ("int64", 64), 8: ("string", 0), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64)},
    **{12: ("uint32", 32), 13: ("uint64", 64), 14: ("complex64", 64), 15: ("complex128", 128), 16: ("bfloat16", 16)},
    **{17: ("float8e4m3fn", 8), 18: ("float8e4m3fnuz", 8), 19: ("float8e5m2", 8), 20: ("float8e5m2fnuz", 8)},
    **{21: ("uint4", 4), 22: ("int4", 4), 23: ("float4e2m1", 4), 24: ("float8e8m0", 8)},
    **{25: ("uint2", 2), 26: ("int2", 2)},
}
# Operators whose output is as large as the integers of this input say
_SHAPED_BY = {b"ConstantOfShape": 0, b"Expand": 1, b"Tile": 1, b"OneHot": 1, b"Range": 1, b"Resize": 3}
_SHAPED_BY |= {b"CenterCropPad": 1}
_RANDOM = (b"RandomNormal", b"RandomUniform")  # the same by an attribute


def _message(number: int) -> int:
    """The key of a protobuf field with a length: a message, text, bytes or packed numbers."""
    return number << 3 | 2


def _number(number: int) -> int:
    """The key of a protobuf field that is a varint."""
    return number << 3


class _Onnx:
    """One pass over a ModelProto (onnx.proto). A field of another wire type than the schema's is, as in protobuf, none
    of the schema's.
    """

    def __init__(self, view: memoryview, weights: tuple[str, int] | None = None) -> None:
        self.view, self.weights = view, weights
        self.left = MAX_FIELDS
        self.found = OnnxSummary()
        self.literals: dict[bytes, list[Tensor | tuple[int, ...]]] = {}  # name → integers that may be a shape
        self.shaped: list[tuple[bytes, bytes]] = []  # operator, name of the input that says how large

    # --- wire format (protobuf.dev/programming-guides/encoding) ---

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Key, and a varint's value and 0, or where the contents start and stop."""
        view = self.view
        while at < end:
            key = view[at]
            at += 1
            if key > 127:
                key, at = self.varint(at - 1)
                if key >> 32:
                    raise GraphError("malformed")
            self.left -= 1
            if key < 8 or self.left < 0:
                raise GraphError("malformed" if self.left >= 0 else f"more than {MAX_FIELDS:,} fields")
            kind = key & 7
            if kind == 2:
                size = view[at]
                at += 1
                if size > 127:
                    size, at = self.varint(at - 1)
                start, at = at, at + size
                if at <= end:
                    yield key, start, at
            elif kind == 0:
                value = view[at]
                at += 1
                if value > 127:
                    value, at = self.varint(at - 1)
                if at <= end:
                    yield key, value, 0
            elif kind in (1, 5):
                start, at = at, at + (8 if kind == 1 else 4)
                if at <= end:
                    yield key, start, at
            else:
                raise GraphError("malformed")
        if at > end:
            raise GraphError("cut off or malformed")

    def varint(self, at: int) -> tuple[int, int]:
        """The unsigned 64-bit number at `at`, and where it ends."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.view[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1), at
        raise GraphError("malformed")

    def integers(self, start: int, stop: int) -> list[int]:
        """Packed varints as signed numbers."""
        values = []
        while start < stop:
            value, start = self.varint(start)
            values.append(_signed(value))
        return values

    def text(self, start: int, stop: int) -> str:
        try:
            return str(self.view[start:stop], "utf-8")
        except UnicodeDecodeError:
            raise GraphError("malformed") from None

    # --- schema ---

    def model(self) -> None:
        graphs = 0
        for key, start, stop in self.fields(0, len(self.view)):
            if key == _message(7):
                graphs += 1
                self.graph(start, stop, 0, top=True)
            elif key == _message(20):
                raise GraphError("holds training steps")
            elif key == _message(25):  # functions: graphs by another name
                for inner, a, b in self.fields(start, stop):
                    if inner == _message(7):
                        self.node(a, b, 1)
                    elif inner == _message(11):
                        self.attribute(a, b, 1)
        if graphs != 1:
            raise GraphError("no graph in it" if not graphs else "more than one graph")

    def graph(self, start: int, stop: int, depth: int, *, top: bool = False) -> None:
        if depth > MAX_DEPTH:
            raise GraphError("graphs nested too deeply")
        stored = set()
        for key, a, b in self.fields(start, stop):
            if key == _NODE:
                self.node(a, b, depth)
            elif key == _INITIALIZER:
                tensor = self.tensor(a, b, outside=top)
                stored.add(tensor.name)
                if tensor.size <= 1024:
                    self.literals.setdefault(tensor.name.encode(), []).append(tensor)
            elif key == _INPUT and top:
                self.found.inputs.append(self.value(a, b))
            elif key == _OUTPUT and top:
                self.found.outputs.append(self.value(a, b))
            elif key == _SPARSE:
                raise GraphError("holds sparse tensors, which a bundle may not")
        if top:
            # An input with an initializer is a default, not something that has to be fed.
            self.found.inputs = [value for value in self.found.inputs if value.name not in stored]

    def node(self, start: int, stop: int, depth: int) -> None:
        self.found.nodes += 1
        op, inputs, output = b"", [], (0, 0)
        stored: list[Tensor] = []
        numbers: list[int] = []
        for key, a, b in self.fields(start, stop):
            if key == _NODE_INPUT:
                inputs.append((a, b))
            elif key == _NODE_OUTPUT:
                output = (a, b)
            elif key == _NODE_OP:
                op = bytes(self.view[a:b])
            elif key == _NODE_ATTRIBUTE:
                tensors, integers = self.attribute(a, b, depth)
                stored += tensors
                numbers += integers
        if op == b"Constant":
            literals = [tensor for tensor in stored if tensor.size <= 1024]
            name = bytes(self.view[output[0] : output[1]])
            self.literals.setdefault(name, []).extend(literals or [tuple(numbers)])
        elif op in _SHAPED_BY:
            if len(inputs) > _SHAPED_BY[op]:
                a, b = inputs[_SHAPED_BY[op]]
                self.shaped.append((op, bytes(self.view[a:b])))
        elif op in _RANDOM:
            _check_elements(op, numbers)
        elif op == b"EPContext":
            raise GraphError("holds another engine's compiled code (EPContext), which a bundle may not")

    def attribute(self, start: int, stop: int, depth: int) -> tuple[list[Tensor], list[int]]:
        tensors: list[Tensor] = []
        numbers: list[int] = []
        single = 0
        for key, a, b in self.fields(start, stop):
            if key in (_T, _G):
                single += 1
                if single > 1:
                    raise GraphError("malformed")  # protobuf would merge the two into one that nobody has checked
            if key in (_T, _TENSORS):
                tensors.append(self.tensor(a, b))
            elif key in (_G, _GRAPHS):
                self.graph(a, b, depth + 1)
            elif key in (_I, _INT):
                numbers.append(_signed(a))
            elif key == _INTS_PACKED:
                numbers += self.integers(a, b)
            elif key in (_SPARSE_T, _SPARSE_TENSORS):
                raise GraphError("holds sparse tensors, which a bundle may not")
        return tensors, numbers

    def tensor(self, start: int, stop: int, *, outside: bool = False) -> Tensor:
        """A TensorProto, which may lie `outside` the graph, in the file of weights. Raises GraphError if its shape
        claims more than it holds, or its contents lie elsewhere."""
        name, code, external = "", 0, False
        place: dict[str, str] = {}
        shape: list[int] = []
        raw = (-1, -1)
        size = strings = capacity = 0  # capacity: elements that fit into what is stored field by field
        for key, a, b in self.fields(start, stop):
            if key == _RAW:
                if raw[0] >= 0:
                    raise GraphError("malformed")
                raw = (a, b)
                size += b - a
            elif key == _DIM:
                shape.append(_signed(a))
            elif key == _DIMS_PACKED:
                shape += self.integers(a, b)
            elif key == _TYPE:
                code = a
            elif key == _NAME:
                name = self.text(a, b)
            elif key == _STRING:
                strings += 1
                size += b - a
            elif key in _TYPED:
                size += b - a
                capacity += (b - a) // _TYPED[key]
            elif key in _TYPED_ALONE:
                size += b - a if b else 1
                capacity += 1
            elif key == _EXTERNAL:
                external = True
                entry = {inner: self.text(c, d) for inner, c, d in self.fields(a, b) if inner in _PAIR}
                if len(entry) != 2 or entry[_PAIR[0]] in place:
                    raise GraphError("malformed")
                place[entry[_PAIR[0]]] = entry[_PAIR[1]]
            elif key == _LOCATION and a:
                external = True
        kept = outside and external and self.weights is not None and raw[0] < 0 and not size
        if external and not kept:
            raise GraphError(
                f"{_named(name)} keeps its weights in another file (external data), which a bundle may not"
            )
        if code not in _DTYPES:
            raise GraphError(f"{_named(name)} is of an unknown type ({code})")
        dtype, bits = _DTYPES[code]
        if len(shape) > MAX_RANK or (shape and min(shape) < 0):
            raise GraphError(f"{_named(name)} has a size that no tensor can have")
        elements = prod(shape)
        if kept:
            size = self.placed(name, place)
            fits = dtype != "string" and elements * bits + 7 >> 3 == size
            if size <= 1024:  # it may be a shape, which is looked at here
                raise GraphError(f"{_named(name)} is too small to lie outside the graph")
        elif dtype == "string":
            fits = elements == strings
        elif raw[0] >= 0:
            fits = elements * bits + 7 >> 3 == raw[1] - raw[0]
        else:
            fits = elements <= capacity * (8 // bits if bits < 8 else 1)
        if not fits:
            raise GraphError(
                f"{_named(name)} claims {_claim(elements, bits)}, and the file holds {size:,} bytes for it"
            )
        found = Tensor(name, dtype, tuple(shape), size, start, stop)
        self.found.initializers.append(found)
        return found

    def placed(self, name: str, place: dict[str, str]) -> int:
        """Bytes of a tensor that lies in the file of weights. Raises GraphError if it does not."""
        assert self.weights is not None
        file, held = self.weights
        numbers = [place.get(key, "") for key in ("offset", "length")]
        whole = all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers)
        if not whole or place.get("location") != file or not set(place) <= {"location", "offset", "length"}:
            raise GraphError(f"{_named(name)} keeps its weights elsewhere than in {file}, which a bundle may not")
        offset, length = map(int, numbers)
        if offset + length > held:
            raise GraphError(f"{_named(name)} claims {length:,} bytes at {offset:,}, and {file} holds {held:,} in all")
        return length

    def value(self, start: int, stop: int) -> Value:
        name, dtype = "", "unknown"
        shape: tuple[int | str | None, ...] | None = None
        types = 0
        for key, a, b in self.fields(start, stop):
            if key == _message(1):
                name = self.text(a, b)
            elif key == _message(2):
                for kind, c, d in self.fields(a, b):
                    types += 1
                    if kind == _message(1):
                        dtype, shape = self.tensor_type(c, d)
        if types > 1:
            raise GraphError("malformed")
        return Value(name, dtype, shape)

    def tensor_type(self, start: int, stop: int) -> tuple[str, tuple[int | str | None, ...] | None]:
        code, shape = 0, None
        for key, a, b in self.fields(start, stop):
            if key == _number(1):
                code = a
            elif key == _message(2):
                if shape is not None:
                    raise GraphError("malformed")
                shape = tuple(self.dimension(c, d) for kind, c, d in self.fields(a, b) if kind == _message(1))
        return _DTYPES.get(code, ("unknown", 0))[0], shape

    def dimension(self, start: int, stop: int) -> int | str | None:
        size: int | str | None = None
        for key, a, b in self.fields(start, stop):
            if key == _number(1):
                size = _signed(a)
            elif key == _message(2):
                size = self.text(a, b)
        return size

    def check_shaped(self) -> None:
        """No literal may ask for a giant tensor: an engine would fill it while it loads the graph."""
        for op, name in self.shaped:
            for literal in self.literals.get(name, []):
                _check_elements(op, self.contents(literal) if isinstance(literal, Tensor) else literal)

    def contents(self, tensor: Tensor) -> list[int]:
        """The integers of a small tensor; none if it holds something else."""
        if tensor.dtype not in ("int64", "int32"):
            return []
        values: list[int] = []
        for key, a, b in self.fields(tensor.start, tensor.stop):
            if key == _RAW:
                size, code = (8, "q") if tensor.dtype == "int64" else (4, "i")
                values += struct.unpack_from(f"<{(b - a) // size}{code}", self.view, a)
            elif key in _INTEGERS:
                values += self.integers(a, b)
            elif key in _INTEGERS_ALONE:
                values.append(_signed(a))
        return values


_NODE, _INITIALIZER, _INPUT, _OUTPUT, _SPARSE = map(_message, (1, 5, 11, 12, 15))  # GraphProto
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = map(_message, (1, 2, 4, 5))  # NodeProto
_T, _G, _TENSORS, _GRAPHS, _SPARSE_T, _SPARSE_TENSORS, _INTS_PACKED = map(_message, (5, 6, 10, 11, 22, 23, 8))
_I, _INT = map(_number, (3, 8))  # AttributeProto
_DIM, _TYPE, _LOCATION = map(_number, (1, 2, 14))  # TensorProto
_DIMS_PACKED, _NAME, _RAW, _STRING, _EXTERNAL = map(_message, (1, 8, 9, 6, 13))
# float_data, double_data, then int32_data, int64_data and uint64_data: the least bytes of an element; one by one
_PAIR = (_message(1), _message(2))  # StringStringEntryProto: key and value
_TYPED = {_message(number): size for number, size in ((4, 4), (10, 8), (5, 1), (7, 1), (11, 1))}
_INTEGERS, _INTEGERS_ALONE = tuple(map(_message, (5, 7))), tuple(map(_number, (5, 7)))
_TYPED_ALONE = {4 << 3 | 5, 10 << 3 | 1, *_INTEGERS_ALONE, _number(11)}


def onnx_summary(data: bytes | bytearray | memoryview, weights: tuple[str, int] | None = None) -> OnnxSummary:
    """Inputs, outputs and stored tensors of a serialized ONNX ModelProto, the graphs inside Loop and If included.

    weights: name and bytes of a file that its initializers may lie in. Raises GraphError if it is malformed, nested too
    deeply or of too many parts, keeps weights in another file, or if a tensor's shape claims more than the file holds
    or a literal shape asks for MAX_ELEMENTS or more. What a graph *computes* while it runs is not bounded by this.
    """
    with memoryview(data) as view, view.cast("B") as flat:
        if flat[4:8] == b"ORTM":  # ONNX Runtime would take it as its own format, which this does not read
            raise GraphError("not an ONNX graph")
        reader = _Onnx(flat, weights)
        try:
            reader.model()
            reader.check_shaped()
        except (IndexError, struct.error):
            raise GraphError("cut off or malformed") from None
        return reader.found


def _check_elements(op: bytes, sizes: tuple[int, ...] | list[int]) -> None:
    elements = 1
    for size in sizes:
        elements *= max(size, 1)
        if elements >= MAX_ELEMENTS:
            raise GraphError(f"a {op.decode('ascii', 'replace')} node asks for {MAX_ELEMENTS:,} elements or more")


def _claim(elements: int, bits: int) -> str:
    if elements >= 10**15:
        return "more elements than there is memory for"
    return f"{elements:,} elements" + (f" ({elements * bits + 7 >> 3:,} bytes)" if bits else "")


def _named(name: str) -> str:
    return f"tensor {name[:80]!r}"


def _signed(value: int) -> int:
    return value - 2**64 if value >> 63 else value
