"""What graph files and arrays claim, read without an engine: what is so, and every way to lie."""

from __future__ import annotations

import struct

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecap.runtime.claims import check_npy, check_onnx, check_openvino, gguf_summary
from edgecap.runtime.graphfile import GraphError, onnx_summary

from .graphs import gru_graphs

# --- reading ONNX files -----------------------------------------------------------------------------


def test_summary_is_what_onnx_reads(bundle_path):
    for name in ("encoder.onnx", "decoder.onnx"):
        data = (bundle_path / name).read_bytes()
        graph = onnx.load_from_string(data).graph
        found = onnx_summary(data)
        assert found.nodes == len(graph.node)
        for ours, theirs in ((found.inputs, graph.input), (found.outputs, graph.output)):
            assert [value.name for value in ours] == [value.name for value in theirs]
            for value, info in zip(ours, theirs, strict=True):
                dims = info.type.tensor_type.shape.dim
                assert value.shape == tuple(dim.dim_param or dim.dim_value for dim in dims)
                element = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
                assert value.dtype == str(element)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        assert {tensor.name for tensor in found.initializers} == set(stored)
        for tensor in found.initializers:
            array = stored[tensor.name]
            assert (tensor.shape, tensor.dtype, tensor.size) == (array.shape, str(array.dtype), array.nbytes)


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {0, TensorProto.STRING}))
@pytest.mark.parametrize("raw", [True, False])
def test_every_type_of_tensor(kind, raw):
    """Each as onnx itself writes it passes, and with one more row does not."""
    try:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        values = np.ones((3, 8)).astype(dtype)
        tensor = numpy_helper.from_array(values, "w") if raw else helper.make_tensor("w", kind, (3, 8), values)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        pytest.skip(f"onnx cannot write it: {error}")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    if kind > 26:  # newer than any engine reads
        with pytest.raises(GraphError, match="unknown type"):
            onnx_summary(model.SerializeToString())
        return
    (found,) = onnx_summary(model.SerializeToString()).initializers
    assert found.shape == (3, 8)
    model.graph.initializer[0].dims[0] = 1000
    with pytest.raises(GraphError, match=r"claims (8,000|16,000) elements"):
        onnx_summary(model.SerializeToString())


def test_texts():
    tensor = helper.make_tensor("w", TensorProto.STRING, (2,), [b"a", b"b"])
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    assert onnx_summary(model.SerializeToString()).initializers[0].shape == (2,)
    model.graph.initializer[0].dims[0] = 3
    with pytest.raises(GraphError, match="claims 3 elements"):
        onnx_summary(model.SerializeToString())


def test_an_input_with_a_default_need_not_be_fed():
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    default = numpy_helper.from_array(np.ones(2, np.float32), "x")
    model = helper.make_model(helper.make_graph([], "g", [info], [], [default]))
    check_onnx(model.SerializeToString(), {"inputs": {}, "outputs": {}})


def nested(depth: int) -> bytes:
    graph = helper.make_graph([], "g", [], [])
    for _ in range(depth):
        graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "g", [], [])
    return helper.make_model(graph).SerializeToString()


def in_a_function() -> bytes:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[2**28], raw_data=bytes(4))
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    model.functions.append(helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 18)]))
    return model.SerializeToString()


def sparse() -> bytes:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**30]))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no graph"),
        (b"not a graph", "malformed|no graph"),
        (b"\x3a\xff\xff\xff\xff\x0f", "cut off"),
        (b"\x3a" + b"\xff" * 20, "malformed"),
        (b"\x3a\x00\x3a\x00", "more than one graph"),
        (b"\x3b\x3c", "malformed"),  # a group, which protobuf gave up
        (nested(9), "nested too deeply"),
        (in_a_function(), "claims 268,435,456"),
        (sparse(), "sparse"),
        (b"\x3a\x80\x80\x80\x01" + b"\x08\x00" * 2**20, "more than 300,000 fields"),
    ],
    ids=["empty", "text", "too long", "varint", "two graphs", "group", "nested", "function", "sparse", "fields"],
)
def test_malformed_graphs(data, says):
    with pytest.raises(GraphError, match=says):
        onnx_summary(data)


def test_a_graph_that_is_cut_off_anywhere():
    data = gru_graphs()[0]["decoder.onnx"]
    for size in range(0, len(data), 7):
        try:
            onnx_summary(data[:size])
        except GraphError:
            continue
        # Only what comes after the graph may be missing.
        assert onnx.load_from_string(data[:size]).graph.output


# --- GGUF, OpenVINO and NumPy -----------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(
    shape: tuple[int, ...] = (32, 2),
    *,
    kind: int = 0,
    offset: int = 0,
    version: int = 3,
    keys: bytes = b"",
    count: int = 0,
) -> bytes:
    """A GGUF file of one tensor with 256 bytes, and some metadata."""
    head = b"GGUF" + struct.pack("<IQQ", version, 1, 2 + count)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b") + keys
    head += text("w") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(256)


def test_gguf():
    assert gguf_summary(gguf()) == {"w": ((32, 2), 256)}
    assert gguf_summary(gguf((64, 3), kind=8)) == {"w": ((64, 3), 204)}  # q8_0
    gguf_package = pytest.importorskip("gguf")
    from edgecap.runtime.claims import _GGML

    sizes = {int(kind): size for kind, size in gguf_package.GGML_QUANT_SIZES.items()}
    assert {kind: sizes[kind] for kind in _GGML if kind in sizes} == {k: v for k, v in _GGML.items() if k in sizes}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGML" + gguf()[4:], "not a GGUF file"),
        (gguf(version=4), "version 4"),
        (gguf((2**14, 2**14)), "claims 1,073,741,824 bytes"),
        (gguf((2**63, 2**63)), "claims"),
        (gguf(offset=32), "claims 256 bytes"),
        (gguf(offset=2**63), "claims"),
        (gguf(offset=1), "misplaced"),
        (gguf(kind=99), "unknown type"),
        (gguf(keys=text("split.count") + struct.pack("<IH", 2, 3), count=1), "one part of several"),
        (gguf(keys=text("general.alignment") + struct.pack("<II", 4, 3), count=1), "alignment"),
        (gguf(keys=text("x") + struct.pack("<IIQ", 9, 8, 2**40), count=1), "more than"),
        (gguf(keys=text("x") + struct.pack("<IIQ", 9, 0, 2**40), count=1), "cut off"),
        (gguf(keys=text("x") + struct.pack("<I", 77), count=1), "malformed"),
        (gguf()[:60], "cut off"),
    ],
)
def test_gguf_that_lies(data, says):
    with pytest.raises(GraphError, match=says):
        gguf_summary(data)


IR = """<?xml version="1.0"?><net name="x" version="11"><layers><layer id="0" name="c" type="Const" version="opset1">
<data element_type="f32" shape="4, 2" offset="{offset}" size="{size}" /></layer></layers></net>"""
ENTITIES = '<!DOCTYPE net [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;">]><net name="&b;"/>'


@pytest.mark.parametrize(
    ("xml", "says"),
    [
        (IR.format(offset=1, size=32), "claims 32 bytes at 1"),
        (IR.format(offset=0, size=2**30), "claims 1,073,741,824 bytes"),
        (IR.format(offset=0, size=16), "claims 32 bytes"),
        (IR.format(offset=-1, size=32), "malformed"),
        (IR.format(offset="9" * 5000, size=32), "malformed"),
        (IR.replace("4, 2", "16384, 16384").format(offset=0, size=32), "claims 1,073,741,824 bytes"),
        (ENTITIES, "document type"),
        (ENTITIES.encode("utf-16"), "document type"),
        ("<html/>", "not an OpenVINO graph"),
        ("<net>", "malformed"),
        ("", "malformed"),
        ("<net>" + "<dim/>" * 300_001, "more than 300,000 elements"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_openvino_that_lies(xml, says):
    with pytest.raises(GraphError, match=says):
        check_openvino(xml if isinstance(xml, bytes) else xml.encode(), 32)


def test_openvino_without_its_weights():
    assert check_openvino(IR.format(offset=0, size=32).encode(), 32) == 1
    with pytest.raises(GraphError, match="no file of them"):
        check_openvino(IR.format(offset=0, size=32).encode(), None)


def npy(descr: str, shape: str, body: bytes = b"1234") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def test_arrays():
    check_npy(npy("'<f4'", "(1,)"))
    check_npy(npy("'|u1'", "(2, 2)"))
    check_npy(b"no array at all")
    for header in (
        npy("'<f4'", "(2,)"),
        npy("'<f4'", "()", b""),
        npy("'<f4'", f"({'9' * 40},)"),
        npy("evil()", "(1,)"),
    ):
        with pytest.raises(GraphError):
            check_npy(header)
