"""ONNX Runtime's own profile of what a worker runs: which operators there really are, folded and fused, and how long
each takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .runner import Worker, WorkerFailed
from .subjects import Subject

KINDS = ("bundle", "onnxruntime")  # whose workers make sessions of ONNX Runtime
PARTS = ("encoder", "decoder")  # in the order in which those are made

Node = dict[str, Any]  # an event of the profile: "op_name", "node_index", "us", …


def profile(
    subject: Subject,
    photo: str,
    *,
    captions: int,
    decoding: Mapping[str, Any],
    timeout: float,
    threads: int = 1,
    shapes: bool = False,
) -> dict[str, list[Node]] | None:
    """The operators that ran, in order, when a fresh process captioned the photo so many times: by PARTS; None of what
    is not run by two graphs in ONNX Runtime.

    shapes: with the field's own shapes and the size of each constant, by graphs that are not packed for this very CPU.
    decoding: replaces the subject's.
    """
    if subject.kind not in KINDS:
        return None
    request = subject.load_request(threads) | {"decoding": {**subject.decoding, **decoding}, "fused": False}
    with TemporaryDirectory(prefix="edgecap-profile-") as folder:
        try:
            with Worker(subject.command, threads=threads) as worker:
                asked = request | {"photo": photo, "captions": captions, "folder": folder, "shapes": shapes}
                files = worker.ask("profile", timeout=timeout, **asked)["files"]
        except WorkerFailed:
            return None
        if len(files) != len(PARTS):
            return None
        return {part: _nodes(Path(file)) for part, file in zip(PARTS, files, strict=True)}


def _nodes(file: Path) -> list[Node]:
    events = json.loads(file.read_text(encoding="utf-8"))
    ran = (event for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {}))
    return [event["args"] | {"us": event["dur"]} for event in ran]


# --- in the worker ---


def profiled(load: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> list[str]:
    """Load, caption and end: the files of the sessions' profiles, in the order in which they were made."""
    with recording(request["folder"], shapes=request["shapes"]) as sessions:
        engine = load(request)
    for _ in range(request["captions"]):
        engine.caption(request["photo"])
    return [session.end_profiling() for session in sessions]


@contextmanager
def recording(folder: str, *, shapes: bool) -> Iterator[Sequence[Any]]:
    """Sessions that are made inside, by whomever, write a profile each; yields them."""
    import onnxruntime as ort

    plain = ort.InferenceSession
    made: list[Any] = []

    class Recording(plain):  # type: ignore[misc, valid-type]
        def __init__(self, graph: Any, options: Any = None, *more: Any, **named: Any) -> None:
            options = options or ort.SessionOptions()
            options.enable_profiling, options.profile_file_prefix = True, f"{folder}/{len(made)}"
            if shapes:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
                options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape
            super().__init__(graph, options, *more, **named)
            made.append(self)

    ort.InferenceSession = Recording
    try:
        yield made
    finally:
        ort.InferenceSession = plain
