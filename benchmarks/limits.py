"""The machine's own limits, measured in the run that is judged by them: reading memory, and products of matrices.

A limit is a maximum: best of many passes, in a process of its own each, as the subjects have. Run as a script it
answers one request of a line, {"op": "read_gb_s", "threads": 1, "seconds": 0.4}, with {"ok": true, "value": 26.1}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from .runner import Running, Worker, WorkerFailed, python_module

READ_BYTES = 256 * 2**20  # far more than any cache of one core complex
COLUMNS = 4096  # of the matrix that is read: with fewer BLAS is slower than the memory
ROWS, INNER, OUTER = 512, 1024, 1024  # of the products: what a small encoder has, and large enough to fill the pipes
COMMAND = tuple(python_module("edgecap.benchmarks.limits"))

Start = Callable[[int], Running]  # threads → a worker of COMMAND


def here(threads: int) -> Running:
    return Worker(COMMAND, threads=threads)


def limits(threads: int = 1, *, seconds: float = 0.4, start: Start = here) -> dict[str, float | None]:
    """The limits of `threads` threads: "read_gb_s" (10⁹ bytes read a second), "fp32_gflops" and "int8_gops" (10⁹
    multiplications and additions a second, u8 × s8). Each is tried for `seconds` in a fresh process; None is one that
    could not be measured there. start: how such a process is reached, here by default.
    """
    found: dict[str, float | None] = {}
    for name in LIMITS:
        try:
            with start(threads) as worker:
                found[name] = float(worker.ask(name, threads=threads, seconds=seconds, timeout=60 + seconds)["value"])
        except WorkerFailed:
            found[name] = None
    return found


def larger(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> dict[str, float | None]:
    """Of two measurements, say before and after the rounds, the larger of each limit: other work only makes less."""
    return {name: max((x for x in (a.get(name), b.get(name)) if x is not None), default=None) for name in LIMITS}


def best(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of the runs (s) that fit into `seconds`, five at least, after one that warms up."""
    run()
    shortest, end, left = float("inf"), perf_counter() + seconds, 5
    while left > 0 or perf_counter() < end:
        begin = perf_counter()
        run()
        shortest = min(shortest, perf_counter() - begin)
        left -= 1
    return shortest


def read_gb_s(threads: int, seconds: float) -> float:
    """Matrix × vector in BLAS, which is what a decoder's step is; each thread has its own matrix."""
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    rows = READ_BYTES // (4 * COLUMNS * threads)
    vector = np.ones(COLUMNS, np.float32)
    parts = [(np.ones((rows, COLUMNS), np.float32), np.empty(rows, np.float32)) for _ in range(threads)]
    if threads == 1:
        ((matrix, out),) = parts
        return matrix.nbytes / best(lambda: np.matmul(matrix, vector, out=out), seconds) / 1e9
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter's lock in BLAS
        shortest = best(lambda: list(pool.map(lambda part: np.matmul(part[0], vector, out=part[1]), parts)), seconds)
    return sum(matrix.nbytes for matrix, _ in parts) / shortest / 1e9


def fp32_gflops(threads: int, seconds: float) -> float:
    """MatMul in ONNX Runtime by weights that it knows, as in a bundle's graphs."""
    import numpy as np

    random = np.random.default_rng(0)
    weights = random.standard_normal((INNER, OUTER), np.float32)
    graph = product_graph("MatMul", FLOAT, FLOAT, weights.tobytes(), FLOAT)
    return _product(graph, random.standard_normal((ROWS, INNER), np.float32), threads, seconds)


def int8_gops(threads: int, seconds: float) -> float:
    """MatMulInteger, u8 × s8: as fast here as DynamicQuantizeMatMul and QLinearMatMul, or faster."""
    import numpy as np

    random = np.random.default_rng(0)
    weights = random.integers(-63, 64, (INNER, OUTER), np.int8)
    graph = product_graph("MatMulInteger", UINT8, INT8, weights.tobytes(), INT32)
    return _product(graph, random.integers(0, 256, (ROWS, INNER), np.uint8), threads, seconds)


def _product(graph: bytes, rows: Any, threads: int, seconds: float) -> float:
    import onnxruntime as ort

    from ..runtime.backends.onnx import session_options  # its threads wait as those of a bundle do

    session = ort.InferenceSession(graph, session_options(threads), providers=["CPUExecutionProvider"])
    return 2 * ROWS * INNER * OUTER / best(lambda: session.run(None, {"x": rows}), seconds) / 1e9


LIMITS = {function.__name__: function for function in (read_gb_s, fp32_gflops, int8_gops)}

# --- an ONNX graph of one node, written by hand: the base install has no onnx package ---

FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # TensorProto.DataType (onnx.proto)


def varint(value: int) -> bytes:
    """A protobuf varint (protobuf.dev/programming-guides/encoding) of a number ≥ 0."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """A protobuf field: a varint, or text, bytes or a message with its length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def product_graph(op: str, left: int, right: int, weights: bytes, out: int) -> bytes:
    """A ModelProto: x [ROWS, INNER] of type `left` times the `weights` [INNER, OUTER] of type `right` → y."""

    def value(name: str, dtype: int, *shape: int) -> bytes:
        sizes = b"".join(field(1, field(1, size)) for size in shape)
        return field(1, name) + field(2, field(1, field(1, dtype) + field(2, sizes)))

    node = field(1, "x") + field(1, "w") + field(2, "y") + field(4, op)
    tensor = field(1, INNER) + field(1, OUTER) + field(2, right) + field(8, "w") + field(9, weights)
    ends = field(11, value("x", left, ROWS, INNER)) + field(12, value("y", out, ROWS, OUTER))
    graph = field(1, node) + field(2, "product") + field(5, tensor) + ends
    opset = field(1, "") + field(2, 17)
    return field(1, 8) + field(7, graph) + field(8, opset)  # IR version 8


def main() -> None:
    request = json.loads(sys.stdin.readline())
    try:
        value = LIMITS[request["op"]](request["threads"], request["seconds"])
        answer: dict[str, Any] = {"ok": True, "value": value}
    except Exception as error:  # whatever it is, who asked must hear the reason
        answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
