"""Where the time of a row goes, operator by operator: what to look at where a peer comes near, or wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from .profiler import Node, profile
from .subjects import Subject

if TYPE_CHECKING:
    from .suite import Settings

CAPTIONS = 2  # the first of which warms up
LENGTH = 20  # tokens at most: enough steps for a median
SHOWN = 0.02  # of a part's time


def add_operators(subjects: Sequence[Subject], rows: Sequence[dict[str, Any]], photo: str, settings: Settings) -> None:
    """Give every row its "operators": {"encoder": {operator: s}, "decoder": …}, of one run of the encoder and of one
    step of the decoder, the longest first; None where ONNX Runtime does not run it, or nothing was timed. Bundles and
    the plain peer alike, and only on this machine.
    """
    known: dict[Any, dict[str, dict[str, float]] | None] = {}
    for subject, row in zip(subjects, rows, strict=True):
        row["operators"] = None
        if row["error"] is None and row["latency"] and not subject.fused:
            if subject.path not in known:
                parts = profile(
                    subject,
                    photo,
                    captions=CAPTIONS,
                    decoding={"beam": 1, "min_length": 0, "max_length": LENGTH},
                    timeout=settings.timeout,
                    threads=settings.threads,
                )
                found = {part: by_operator(nodes) for part, nodes in (parts or {}).items()}
                known[subject.path] = found or None
            row["operators"] = known[subject.path]


def by_operator(nodes: Iterable[Node]) -> dict[str, float]:
    """Seconds of each operator in one run of a graph: the sum over its nodes of each one's median, so that neither the
    first run nor a prompt counts."""
    times: dict[tuple[str, str], list[float]] = {}
    for node in nodes:
        times.setdefault((node["op_name"], node["node_index"]), []).append(node["us"] / 1e6)
    found: dict[str, float] = {}
    for (operator, _), seconds in times.items():
        found[operator] = found.get(operator, 0.0) + median(seconds)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def shares(times: Mapping[str, float]) -> str:
    """The largest in words: "MatMul 71%, Reshape 6%"."""
    whole = sum(times.values()) or 1.0
    return ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in times.items() if seconds / whole >= SHOWN)
