"""What graphs and arrays claim to hold, against what they do hold and what bundle.json says: no engine is asked."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

from .graphfile import MAX_RANK, GraphError, OnnxSummary, Value, onnx_summary

MAX_ITEMS = 1_000_000  # tensors, keys and texts of a GGUF file: a vocabulary of 262,144 has 0.8 million with its merges
MAX_ELEMENTS = 300_000  # of an OpenVINO graph's XML
MAX_XML_BYTES = 64 * 2**20


# --- ONNX (read by graphfile.py) ---------------------------------------------------------------------


def check_onnx(data: bytes | memoryview, declared: Mapping[str, Any] | None, weights: int | None = None) -> OnnxSummary:
    """`onnx_summary`, and that inputs and outputs are what `declared`, a manifest's entry of the graph, says.

    weights: bytes of the file of weights that it names.
    """
    beside = None if declared is None or weights is None else (declared["weights"], weights)
    found = onnx_summary(data, beside)
    if declared is not None:
        _compare("inputs", declared["inputs"], found.inputs)
        _compare("outputs", declared["outputs"], found.outputs)
    return found


def _compare(role: str, said: Mapping[str, Any], found: list[Value]) -> None:
    """Names, types, ranks and fixed sizes of the manifest against the graph's own."""
    values = {value.name: value for value in found}
    wrong = set(said) ^ set(values) | ({value.name for value in found} if len(values) != len(found) else set())
    for name in set(said) & set(values):
        _, dtype, shape = values[name]
        claimed = said[name]["shape"]
        fits = shape is None or len(shape) == len(claimed)
        # A graph may leave open what the manifest fixes, not the reverse.
        fits = fits and all(
            not isinstance(size, int) or size == claim for claim, size in zip(claimed, shape or (), strict=False)
        )
        if dtype != said[name]["dtype"] or not fits:
            wrong.add(name)
    if wrong:
        names = ", ".join(sorted(wrong))
        raise GraphError(f"its {role} are not what bundle.json says ({names[:200]}); export it again")


# --- GGUF (github.com/ggml-org/ggml/blob/master/docs/gguf.md) ---------------------------------------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# ggml_type → elements of a block, its bytes
_GGML = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82)},
    **{23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2)},
    **{34: (256, 54), 35: (256, 66), 39: (32, 17)},
}


class _Gguf:
    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 4
        self.left = MAX_ITEMS

    def take(self, code: str) -> Any:
        """The next number. struct.error: the file ends first."""
        (value,) = struct.unpack_from("<" + code, self.view, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self, items: int) -> int:
        self.left -= items
        if self.left < 0:
            raise GraphError(f"more than {MAX_ITEMS:,} keys, texts and tensors")
        return items

    def skip(self, size: int) -> int:
        """Step over `size` bytes; where they begin."""
        start = self.at
        self.at += size
        if self.at > len(self.view):
            raise GraphError("cut off or malformed")
        return start

    def text(self) -> bytes:
        size = self.take("Q")
        start = self.skip(size)
        return bytes(self.view[start : start + size])

    def value(self) -> Any:
        """The value of a key; of arrays and texts, which are only stepped over, None."""
        kind = self.take("I")
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _ARRAY:
            kind, length = self.take("I"), self.take("Q")
            if kind in _SCALARS:
                self.skip(length * struct.calcsize("<" + _SCALARS[kind]))
                return None
        else:
            length = 1
        if kind != _TEXT:
            raise GraphError("malformed")
        view, at, size, read = self.view, self.at, len(self.view), struct.Struct("<Q").unpack_from
        for _ in range(self.count(length)):
            at += read(view, at)[0] + 8
            if at > size:
                raise GraphError("cut off or malformed")
        self.at = at
        return None


def gguf_summary(data: bytes | memoryview) -> dict[str, tuple[tuple[int, ...], int]]:
    """The tensors of a GGUF file, version 2 or 3: name → shape (as stored, fastest first) and bytes.

    Raises GraphError if it is malformed, of another version, one part of several, or if a tensor lies outside the file.
    """
    with memoryview(data) as view:
        try:
            return _gguf(view)
        except (struct.error, UnicodeDecodeError):
            raise GraphError("cut off or malformed") from None


def _gguf(view: memoryview) -> dict[str, tuple[tuple[int, ...], int]]:
    if view[:4] != b"GGUF":
        raise GraphError("not a GGUF file")
    reader = _Gguf(view)
    version = reader.take("I")
    if version not in (2, 3):
        raise GraphError(f"GGUF version {version}, where 2 and 3 are known")
    tensors, keys = reader.count(reader.take("Q")), reader.count(reader.take("Q"))
    alignment = 32
    for _ in range(keys):
        key, value = reader.text(), reader.value()
        if key == b"general.alignment":
            alignment = value
        elif key == b"split.count" and value != 1 and value != 0:
            raise GraphError("one part of several (split.count), which a bundle may not hold")
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise GraphError("malformed (general.alignment)")
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    ends = 0
    for _ in range(tensors):
        name = str(reader.text(), "utf-8")
        rank = reader.take("I")
        if rank > MAX_RANK:
            raise GraphError("malformed")
        shape = tuple(reader.take("Q") for _ in range(rank))
        kind, offset = reader.take("I"), reader.take("Q")
        if kind not in _GGML:
            raise GraphError(f"tensor {name[:80]!r} is of an unknown type ({kind})")
        if name in found:
            raise GraphError(f"two tensors are called {name[:80]!r}")
        block, size = _GGML[kind]
        if offset % alignment or (shape and shape[0] % block):
            raise GraphError(f"tensor {name[:80]!r} is misplaced")
        found[name] = (shape, prod(shape) // block * size)
        ends = max(ends, offset + found[name][1])
        if ends > len(view):
            break
    start = -(-reader.at // alignment) * alignment
    if found and start + ends > len(view):
        name = max(found, key=lambda each: found[each][1]) if ends <= len(view) else name
        raise GraphError(
            f"tensor {name[:80]!r} claims {found[name][1]:,} bytes, and the file holds {len(view):,} in all"
        )
    return found


# --- OpenVINO IR ------------------------------------------------------------------------------------

_BITS = {
    **{"f64": 64, "i64": 64, "u64": 64, "f32": 32, "i32": 32, "u32": 32, "f16": 16, "bf16": 16, "i16": 16, "u16": 16},
    **{"i8": 8, "u8": 8, "boolean": 8, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8, "u6": 6, "i4": 4, "u4": 4, "nf4": 4},
    **{"f4e2m1": 4, "u3": 3, "u2": 2, "u1": 1, "string": 8},
}


def check_openvino(xml: bytes | memoryview, weights: int | None) -> int:
    """Check an IR's XML against the bytes of its .bin file (None: it has none); how many constants it has.

    Raises GraphError if it is malformed, declares entities, or if a constant lies outside the weights.
    """
    from xml.parsers import expat

    if len(xml) > MAX_XML_BYTES:
        raise GraphError(f"more than {MAX_XML_BYTES:,} bytes of XML")
    counted = {"elements": 0, "constants": 0}
    parser = expat.ParserCreate()

    def doctype(*_: Any) -> None:
        raise GraphError("declares a document type, which no graph needs")

    def element(tag: str, attributes: dict[str, str]) -> None:
        counted["elements"] += 1
        if counted["elements"] == 1 and tag != "net":
            raise GraphError("not an OpenVINO graph")
        if counted["elements"] > MAX_ELEMENTS:
            raise GraphError(f"more than {MAX_ELEMENTS:,} elements")
        if tag == "data" and "offset" in attributes and "size" in attributes:
            counted["constants"] += 1
            _check_constant(attributes, weights)

    parser.StartDoctypeDeclHandler = doctype
    parser.StartElementHandler = element
    try:
        parser.Parse(xml, True)
    except (expat.ExpatError, ValueError) as error:
        raise GraphError(f"malformed ({error})") from None
    return counted["constants"]


def _check_constant(attributes: dict[str, str], weights: int | None) -> None:
    if weights is None:
        raise GraphError("has weights, and bundle.json lists no file of them")
    offset, size, *shape = (
        _whole(text) for text in (attributes["offset"], attributes["size"], *_split(attributes.get("shape", "")))
    )
    bits = _BITS.get(attributes.get("element_type", "u8"))
    if bits is None:
        raise GraphError(f"a constant is of an unknown type ({attributes['element_type'][:40]!r})")
    if len(shape) > MAX_RANK:
        raise GraphError("malformed")
    claimed = size if attributes.get("element_type") == "string" else max(size, prod(shape) * bits + 7 >> 3)
    if offset + size > weights or claimed > size:
        raise GraphError(
            f"a constant claims {claimed:,} bytes at {offset:,}, and the file of weights holds {weights:,} in all"
            if claimed < 10**18
            else "a constant claims more than the file of weights holds"
        )


def _split(shape: str) -> list[str]:
    return [part.strip() for part in shape.split(",")] if shape.strip() else []


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise GraphError(f"malformed (a size of {text[:40]!r})")
    return int(text)


# --- NumPy arrays (numpy.org/doc/stable/reference/generated/numpy.lib.format.html) ------------------

_NPY = re.compile(
    rb"\{'descr': '[<>|=]?([a-z])(\d{1,3})', 'fortran_order': (?:True|False), 'shape': \(([\d, ]*)\), \} *\n"
)


def check_npy(data: bytes | memoryview) -> None:
    """Raises GraphError if a .npy file is of objects or structures, or claims another size than it has.

    A file that is no .npy at all passes: whoever reads it says so.
    """
    if bytes(data[:6]) != b"\x93NUMPY":
        return
    wide = 4 if len(data) > 6 and data[6] > 1 else 2  # bytes of the header's length: version 1 or later
    start = 8 + wide
    size = int.from_bytes(bytes(data[8:start]), "little")
    match = _NPY.fullmatch(bytes(data[start : start + min(size, 2**16)]))
    if not match or size > 2**16:
        raise GraphError("not a plain array of numbers")
    shape = [_whole(str(part, "ascii").strip()) for part in match[3].split(b",") if part.strip()]
    claimed = prod(shape[:MAX_RANK]) * int(match[2])
    if len(shape) > MAX_RANK or claimed != len(data) - start - size:
        raise GraphError(f"claims {claimed:,} bytes of numbers, and the file holds {len(data):,} in all")
