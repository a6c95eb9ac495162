"""Weights of large ONNX graphs in a file of their own: the same graph, and nothing read from anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecap.export.graph import ALIGNED, BESIDE, join, save, split
from edgecap.runtime.claims import check_onnx
from edgecap.runtime.graphfile import GraphError, onnx_summary

FILE = "decoder.bin"


def graph() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = {
        "w": random.standard_normal((32, 16), dtype=np.float32),
        "v": random.integers(-128, 128, (16, 1031), dtype=np.int8),
        "small": np.array([3], np.int64),
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    initializers[0].float_data[:] = weights["w"].ravel().tolist()
    initializers[0].ClearField("raw_data")  # stored the other way
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Cast", ["v"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["h", "f"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", s]) for n, s in (("x", 32), ("y", 1031)))
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializers), opset_imports=opsets, ir_version=10)


def test_what_is_split_is_the_same_graph(tmp_path: Path) -> None:
    model = graph()
    light, weights = split(model, FILE)
    assert len(light) < 2 * BESIDE and len(weights) == 32 * 16 * 4 + 16 * 1031
    assert all(int(e.value) % ALIGNED == 0 for t in onnx.load_from_string(light).graph.initializer
               for e in t.external_data if e.key == "offset")  # fmt: skip
    (tmp_path / "decoder.onnx").write_bytes(light)
    (tmp_path / FILE).write_bytes(weights)
    x = np.random.default_rng(1).standard_normal((3, 32), dtype=np.float32)
    whole, apart, joined = (
        ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for source in (save(model), str(tmp_path / "decoder.onnx"), save(join(light, weights)))
    )
    np.testing.assert_array_equal(whole, apart)
    np.testing.assert_array_equal(whole, joined)
    found = onnx_summary(light, (FILE, len(weights)))
    assert {t.name: (t.shape, t.size) for t in found.initializers} == {
        "w": ((32, 16), 2048),
        "v": ((16, 1031), 16 * 1031),
        "small": ((1,), 8),
    }
    assert split(model, FILE) == (light, weights)


def place(**changes: str) -> Callable[[Any], None]:
    def change(tensor: Any) -> None:
        for entry in tensor.external_data:
            entry.value = changes.get(entry.key, entry.value)

    return change


def twice(tensor: Any) -> None:
    tensor.external_data.add(key="location", value=FILE)


def checksum(tensor: Any) -> None:
    tensor.external_data.add(key="basepath", value="/etc")


def raw(tensor: Any) -> None:
    tensor.raw_data = b"1234"


def text(tensor: Any) -> None:
    tensor.data_type = TensorProto.STRING


SPOILT = {
    "another file": (place(location="/etc/passwd"), "elsewhere than in decoder.bin"),
    "a path to it": (place(location="../decoder.bin"), "elsewhere than in decoder.bin"),
    "behind its end": (place(offset="16500"), "and decoder.bin holds 18,544 in all"),
    "too little": (place(length="1100"), "claims 512 elements"),
    "a shape": (place(length="100"), "too small to lie outside"),
    "a negative place": (place(offset="-64"), "elsewhere"),
    "no number": (place(offset="0x40"), "elsewhere"),
    "two places": (twice, "malformed"),
    "more than a place": (checksum, "elsewhere"),
    "inside, too": (raw, "external data"),
    "texts": (text, "claims 512 elements"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_weights_lie_in_the_named_file_or_nowhere(what: str) -> None:
    change, reason = SPOILT[what]
    light, weights = split(graph(), FILE)
    model = onnx.load_from_string(light)
    change(model.graph.initializer[0])
    with pytest.raises(GraphError, match=reason):
        onnx_summary(save(model), (FILE, len(weights)))


def test_only_a_graph_that_names_a_file_has_one() -> None:
    light, weights = split(graph(), FILE)
    with pytest.raises(GraphError, match="external data"):
        onnx_summary(light)
    declared = {
        "inputs": {"x": {"dtype": "float32", "shape": ["rows", 32]}},
        "outputs": {"y": {"dtype": "float32", "shape": ["rows", 1031]}},
    }
    with pytest.raises(GraphError, match="external data"):
        check_onnx(light, declared)
    check_onnx(light, {**declared, "weights": FILE}, len(weights))
    # Constants inside nodes stay where they are.
    model = graph()
    tensor = model.graph.initializer[0]
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    moved = onnx.load_from_string(light).graph.initializer[0]
    node.attribute[0].t.CopyFrom(moved)
    model.graph.node.append(node)
    with pytest.raises(GraphError, match="external data"):
        onnx_summary(save(model), (FILE, len(weights)))
