"""How much work a bundle's graphs are, so that its times can be held against the machine's own limits.

ONNX Runtime is asked: one caption with its profiler on tells the operators that it really runs, folded and fused, and
the shapes that they get. Run as a script it answers one request of a line, {"op": "work", "path", "photo"}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runner import Worker, WorkerFailed, python_module

if TYPE_CHECKING:
    from .subjects import Subject

COMMAND = tuple(python_module("edgecap.benchmarks.roofline"))

# Where an operator has its weights (Conv) or its keys (attention); products of matrices need no such place.
_WEIGHTS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_ATTENTION = ("Attention", "MultiHeadAttention")
_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "QGemm", "MatMulInteger", "MatMulIntegerToFloat"}
_PRODUCTS |= {"DynamicQuantizeMatMul", "QLinearMatMul", "MatMulNBits"}
_TABLES = ("Gather", "GroupQueryAttention", "RotaryEmbedding")  # embeddings, and sines of every position
_INT8 = {"ConvInteger", "QLinearConv", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
_INT8 |= {"QLinearMatMul", "MatMulNBits"}  # of the last, the weights are 4 bits, the products 8


def bundle_work(path: Path, photo: str, *, timeout: float = 300.0) -> dict[str, int] | None:
    """What captioning the photo takes: "decoder_bytes" of weights that every token reads, "encoder_fp32" and
    "encoder_int8", multiplications and additions. None where ONNX Runtime does not run the bundle.
    """
    try:
        with Worker(COMMAND) as worker:
            return worker.ask("work", path=str(path), photo=photo, timeout=timeout)["work"]
    except WorkerFailed:
        return None


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
    """Give every row its "near": of bundles that ran in ONNX Runtime, part by part, by `share_of_limits`; else None.

    times: a row's seconds of the encoder and of a further token. Each bundle is looked at once, here.
    """
    known: dict[Path, dict[str, int] | None] = {}
    for subject, row in zip(subjects, rows, strict=True):
        row["near"] = None
        if subject.kind == "bundle" and row["error"] is None and any(parts := times(row)):
            if subject.path not in known:
                known[subject.path] = bundle_work(subject.path, photo, timeout=timeout)
            if work := known[subject.path]:
                row["near"] = share_of_limits(work, limits, encode=parts[0], token=parts[1])


# --- in the worker ---


def profiled(path: str, photo: str) -> dict[str, int]:
    """`bundle_work` in this process. Raises EdgecapError for a bundle of another engine."""
    from ..runtime import Captioner
    from ..runtime.backends import onnx as engine
    from ..runtime.errors import UsageError

    plain = engine.session_options
    with tempfile.TemporaryDirectory(prefix="edgecap-work-") as folder:

        def options(threads: int | None) -> Any:
            import onnxruntime as ort

            found = plain(threads)
            found.enable_profiling, found.profile_file_prefix = True, f"{folder}/profile"
            found.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # shapes stay the field's
            found.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape
            return found

        engine.session_options = options
        captioner = Captioner.load(path, threads=1, verify="sizes")
        model = getattr(captioner._model, "inner", captioner._model)  # of one whose photos are framed
        if not isinstance(model, engine.OnnxModel):
            raise UsageError(f"{path} is not run by ONNX Runtime")
        captioner(photo, beam=1, max_length=3)
        encoder, decoder = (_nodes(session.end_profiling()) for session in (model.encoder, model.decoder))
    work = {"decoder_bytes": weights_read(decoder), "encoder_fp32": 0, "encoder_int8": 0}
    for node in encoder:
        kind = "int8" if node["op_name"] in _INT8 else "fp32"
        work[f"encoder_{kind}"] += operations(node)
    return work


def _nodes(profile: str) -> list[dict[str, Any]]:
    events = json.loads(Path(profile).read_text(encoding="utf-8"))
    return [event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})]


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


def main() -> None:
    request = json.loads(sys.stdin.readline())
    try:
        answer: dict[str, Any] = {"ok": True, "work": profiled(request["path"], request["photo"])}
    except Exception as error:  # whatever it is, who asked must hear the reason
        answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
