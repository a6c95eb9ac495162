"""How much work a bundle's graphs are, so that its times can be held against the machine's own limits.

ONNX Runtime is asked: its profile of one caption tells the operators that it really runs, and the shapes that they get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from .profiler import profile
from .subjects import Subject

# Where an operator has its weights (Conv) or its keys (attention); products of matrices need no such place.
_WEIGHTS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_ATTENTION = ("Attention", "MultiHeadAttention")
_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "QGemm", "MatMulInteger", "MatMulIntegerToFloat"}
_PRODUCTS |= {"DynamicQuantizeMatMul", "QLinearMatMul", "MatMulNBits"}
_TABLES = ("Gather", "GroupQueryAttention", "RotaryEmbedding")  # embeddings, and sines of every position
_INT8 = {"ConvInteger", "QLinearConv", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
_INT8 |= {"QLinearMatMul", "MatMulNBits"}  # of the last, the weights are 4 bits, the products 8
SHORT = {"beam": 1, "min_length": 0, "max_length": 3}  # a step is there, and no step is another work


def work_of(subject: Subject, photo: str, *, timeout: float = 300.0) -> dict[str, int] | None:
    """What captioning the photo takes: "decoder_bytes" of weights that every token reads, "encoder_fp32" and
    "encoder_int8", multiplications and additions. None where ONNX Runtime does not run it.
    """
    parts = profile(subject, photo, captions=1, decoding=SHORT, timeout=timeout, shapes=True)
    if parts is None:
        return None
    work = {"decoder_bytes": weights_read(parts["decoder"]), "encoder_fp32": 0, "encoder_int8": 0}
    for node in parts["encoder"]:
        kind = "int8" if node["op_name"] in _INT8 else "fp32"
        work[f"encoder_{kind}"] += operations(node)
    return work


def share_of_limits(
    work: Mapping[str, int], limits: Mapping[str, float | None], *, encode: float | None, token: float | None
) -> dict[str, dict[str, float] | None]:
    """How near one row is to the machine's limits, 1 is at them: {"decoder": …, "encoder": …}, None where not known.

    encode, token: seconds. The decoder is held against reading its weights once a token; above 1 they stay in a cache.
    The encoder against its products at the limits of their types.
    """
    found: dict[str, dict[str, float] | None] = {"decoder": None, "encoder": None}
    if token and (most := limits.get("read_gb_s")):
        rate = work["decoder_bytes"] / token / 1e9
        found["decoder"] = {"bytes": work["decoder_bytes"], "gb_s": rate, "share": rate / most}
    fp32, int8 = limits.get("fp32_gflops"), limits.get("int8_gops")
    if encode and fp32 and int8:
        least = work["encoder_fp32"] / fp32 / 1e9 + work["encoder_int8"] / int8 / 1e9
        parts = {name: work[f"encoder_{name}"] / 1e9 for name in ("fp32", "int8")}
        found["encoder"] = {"fp32_gop": parts["fp32"], "int8_gop": parts["int8"], "share": least / encode}
    return found


def add_roofline(
    subjects: Sequence[Subject],
    rows: Sequence[dict[str, Any]],
    limits: Mapping[str, float | None],
    photo: str,
    times: Callable[[Mapping[str, Any]], tuple[float | None, float | None]],
    timeout: float = 300.0,
) -> None:
    """Give every row its "near": of what ran in ONNX Runtime, a bundle or the plain peer, part by part, by
    `share_of_limits`; else None.

    times: a row's seconds of the encoder and of a further token. Each graph is looked at once, here.
    """
    known: dict[Path, dict[str, int] | None] = {}
    for subject, row in zip(subjects, rows, strict=True):
        row["near"] = None
        if row["error"] is None and any(parts := times(row)):
            if subject.path not in known:
                known[subject.path] = work_of(subject, photo, timeout=timeout)
            if work := known[subject.path]:
                row["near"] = share_of_limits(work, limits, encode=parts[0], token=parts[1])


def weights_read(nodes: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of constants that one run of a graph reads; of tables that it looks up a row in, nothing."""
    read = (node for node in nodes if not node["op_name"].startswith(_TABLES))
    return sum({node["node_index"]: int(node["parameter_size"]) for node in read}.values())


def operations(node: Mapping[str, Any]) -> int:
    """Multiplications and additions of one run of an operator; 0 for all but convolutions, products and attention."""
    op = node["op_name"]
    if op not in _WEIGHTS and op not in _PRODUCTS and op not in _ATTENTION:
        return 0
    inputs, (out, *_) = _shapes(node["input_type_shape"]), _shapes(node["output_type_shape"])
    if op in _WEIGHTS:
        return 2 * prod(out) * prod(inputs[_WEIGHTS[op]][1:])  # [out, in a group, height, width]
    if op in _PRODUCTS:
        rows = max(1, prod(out) // max(1, out[-1]))
        return 2 * prod(out) * (prod(inputs[0]) // rows)
    query, keys = inputs[0], inputs[1]  # [batch, length, dim] or [batch, heads, length, dim]
    return 4 * prod(query) * keys[-2]


def _shapes(entries: Sequence[Mapping[str, Sequence[int]]]) -> list[tuple[int, ...]]:
    return [tuple(shape) for entry in entries for shape in entry.values()]
