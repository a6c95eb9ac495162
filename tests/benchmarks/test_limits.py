"""The machine's own limits: that they are measured at all, what is asked of ONNX Runtime, and how failure looks."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgecap.benchmarks import limits as module
from edgecap.benchmarks.limits import FLOAT, INT8, INT32, UINT8, larger, limits, product_graph, varint
from edgecap.benchmarks.runner import Worker
from edgecap.benchmarks.wording import limits_line

from .records import made_up_record


@pytest.mark.parametrize("threads", [1, 2])
def test_every_limit_is_measured_in_a_process_of_its_own(threads: int) -> None:
    found = limits(threads, seconds=0.01)
    assert list(found) == ["read_gb_s", "fp32_gflops", "int8_gops"]
    assert all(value is not None and value > 0.01 for value in found.values())


def test_a_limit_that_cannot_be_measured_is_none_and_leaves_the_others_alone() -> None:
    started = []

    def start(threads: int) -> Worker:
        started.append(threads)
        broken = [sys.executable, "-c", "import sys; sys.exit('no such engine')"]
        return Worker(broken if len(started) == 2 else module.COMMAND, threads=threads)

    found = limits(1, seconds=0.01, start=start)
    assert found["fp32_gflops"] is None and found["read_gb_s"] and found["int8_gops"] and started == [1, 1, 1]


def test_of_two_measurements_the_larger_counts() -> None:
    one, two = {"read_gb_s": 20.0, "fp32_gflops": None}, {"read_gb_s": 18.0, "fp32_gflops": 90.0}
    assert larger(one, two) == {"read_gb_s": 20.0, "fp32_gflops": 90.0, "int8_gops": None}


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**63])
def test_varints_are_protobuf_s(number: int) -> None:
    from google.protobuf.internal.encoder import _VarintBytes

    assert varint(number) == _VarintBytes(number)


@pytest.mark.parametrize(
    ("op", "types", "out"), [("MatMul", (FLOAT, FLOAT), FLOAT), ("MatMulInteger", (UINT8, INT8), INT32)]
)
def test_the_graph_written_by_hand_is_a_product(
    op: str, types: tuple[int, int], out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("ROWS", 3), ("INNER", 5), ("OUTER", 200)):
        monkeypatch.setattr(module, name, size)
    left, right = (np.dtype({FLOAT: "f4", UINT8: "u1", INT8: "i1"}[kind]) for kind in types)
    random = np.random.default_rng(0)
    rows = random.integers(0, 50, (3, 5)).astype(left)
    weights = random.integers(-50, 50, (5, 200)).astype(right)
    graph = product_graph(op, *types, weights.tobytes(), out)
    onnx.checker.check_model(graph, full_check=True)
    (found,) = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, {"x": rows})
    assert np.array_equal(found, rows.astype(np.int64) @ weights.astype(np.int64))


def test_limits_are_of_the_device() -> None:
    record = made_up_record()
    assert limits_line(record).startswith("this machine's limits with 1 thread: ")
    record["device"] |= {"name": "raspberry-pi-5", "kind": "ssh"}
    assert limits_line(record).startswith("raspberry-pi-5's limits with 1 thread: ")
