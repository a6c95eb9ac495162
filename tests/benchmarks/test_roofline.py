"""How much work a bundle's graphs are: counted by hand against what the engine's profile says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgecap.benchmarks.roofline import operations, share_of_limits, weights_read, work_of
from edgecap.benchmarks.subjects import bundle_subject, peer_subject
from edgecap.runtime import Bundle

from ..runtime.graphs import write_gru_bundle

onnx = pytest.importorskip("onnx")


def event(op: str, inputs: list[list[int]], out: list[int], **more: Any) -> dict[str, Any]:
    """One operator of ONNX Runtime's profile."""
    shapes = {"input_type_shape": [{"float": shape} for shape in inputs], "output_type_shape": [{"float": out}]}
    return {"op_name": op, **shapes, **more}


@pytest.mark.parametrize(
    ("op", "inputs", "out", "wanted"),
    [
        ("MatMul", [[2, 3, 5], [5, 7]], [2, 3, 7], 2 * 2 * 3 * 5 * 7),
        ("Gemm", [[5, 3], [5, 7], [7]], [3, 7], 2 * 3 * 5 * 7),  # transA
        ("MatMulNBits", [[1, 64], [8, 2, 16], [16]], [1, 8], 2 * 64 * 8),
        ("Conv", [[1, 4, 9, 9], [8, 4, 3, 3]], [1, 8, 7, 7], 2 * 7 * 7 * 8 * 4 * 9),
        ("Conv", [[1, 8, 9, 9], [8, 1, 3, 3]], [1, 8, 7, 7], 2 * 7 * 7 * 8 * 9),  # depthwise
        ("QLinearConv", [[1, 4, 9, 9], [], [], [8, 4, 1, 1], [8]], [1, 8, 9, 9], 2 * 81 * 8 * 4),
        ("MultiHeadAttention", [[1, 6, 8], [1, 10, 8], [1, 10, 8]], [1, 6, 8], 2 * 2 * 6 * 10 * 8),
        ("Attention", [[1, 2, 6, 4], [1, 2, 10, 4], [1, 2, 10, 4]], [1, 2, 6, 4], 2 * 2 * 6 * 10 * 8),
        ("Softmax", [[2, 3]], [2, 3], 0),
    ],
)
def test_operations_of_one_operator(op: str, inputs: list[list[int]], out: list[int], wanted: int) -> None:
    assert operations(event(op, inputs, out)) == wanted


def test_tables_are_not_read_whole_and_no_operator_counts_twice() -> None:
    nodes = [
        {"op_name": "Gather", "node_index": "1", "parameter_size": "1000"},
        {"op_name": "MatMul", "node_index": "2", "parameter_size": "64"},
        {"op_name": "GroupQueryAttention", "node_index": "3", "parameter_size": "500"},
        {"op_name": "Add", "node_index": "4", "parameter_size": "8"},
    ]
    assert weights_read(nodes * 3) == 72


def test_a_bundle_s_work_is_that_of_its_graphs(tmp_path: Path) -> None:
    """Every kernel once for each place of the picture; every weight of the decoder but the embedding's once a token."""
    write_gru_bundle(tmp_path / "x.edgecap")
    bundle = Bundle.open(tmp_path / "x.edgecap")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "x.png")
    work = work_of(bundle_subject(bundle.path)[0], str(tmp_path / "x.png"))
    assert work is not None and work["encoder_int8"] == 0
    encoder, decoder = (onnx.load(bundle.file(f"{name}.onnx")).graph for name in ("encoder", "decoder"))
    sizes = {tensor.name: np.prod(tensor.dims) for tensor in encoder.initializer}
    (kernel,) = (sizes[node.input[1]] for node in encoder.node if node.op_type == "Conv")
    assert work["encoder_fp32"] >= 2 * 4 * kernel  # 4 places
    tables = {node.input[0] for node in decoder.node if node.op_type == "Gather"}
    weights = sum(4 * np.prod(t.dims) for t in decoder.initializer if t.data_type == 1 and t.name not in tables)
    assert weights <= work["decoder_bytes"] <= weights + 200  # and a few shapes


def test_what_onnx_runtime_does_not_run_has_no_known_work(tmp_path: Path) -> None:
    write_gru_bundle(tmp_path / "x.edgecap")
    assert work_of(bundle_subject(tmp_path / "x.edgecap")[0], str(tmp_path / "no.png")) is None
    assert work_of(peer_subject(f"torch:{tmp_path}", {}), "x.png") is None


def test_nearness_is_the_least_time_over_the_measured_one() -> None:
    work = {"decoder_bytes": 2 * 10**9, "encoder_fp32": 10**9, "encoder_int8": 4 * 10**9}
    limits = {"read_gb_s": 20.0, "fp32_gflops": 100.0, "int8_gops": 200.0}
    found = share_of_limits(work, limits, encode=0.06, token=0.2)
    assert found["decoder"] == {"bytes": 2 * 10**9, "gb_s": pytest.approx(10), "share": pytest.approx(0.5)}
    assert found["encoder"] == {"fp32_gop": 1.0, "int8_gop": 4.0, "share": pytest.approx(0.5)}
    unknown = share_of_limits(
        work, {"read_gb_s": None, "fp32_gflops": 100.0, "int8_gops": None}, encode=0.06, token=0.2
    )
    assert unknown == {"decoder": None, "encoder": None}
