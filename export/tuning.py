"""`--autotune`: time each ONNX graph at each precision on a device, keep what is fastest within the gate, and say so.

Which precision is fast depends on the CPU (VNNI, ARM, WASM), so it is measured, once, and written to tuning.json: with
that file an export makes the same bundle on any machine without timing anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ..devices.local import cpu_facts
from ..devices.profile import KINDS, Profile, get_profile
from ..runtime.backends.onnx import OnnxModel
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from .artifact import BuildOptions
from .calibration import engine
from .onnx_quantized import PARTS, build_graph
from .onnx_target import onnx_trunk

if TYPE_CHECKING:
    from .artifact import Artifact, Source
    from .gate import GateResult

FILE = "tuning.json"
VERSION = 1
PRECISIONS = ("fp32", "int8", "int4")
ROUNDS = 20
WARM = 3
TOKENS = 10  # of a caption: what the decoder is timed on, after one prefill
NOISE = 1.05  # times closer than this are taken for the same: the smaller graph is kept
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Tuning:
    """What was chosen for a device. graphs: "encoder" and "decoder" → "fp32", "int8" or "int4".

    facts: everything else that tuning.json says (device, CPU, times, gate). text: the file itself.
    """

    graphs: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def options(self) -> BuildOptions:
        return BuildOptions(graphs=dict(self.graphs))

    def to_json(self) -> str:
        """The text of tuning.json; a loaded file's own text, unchanged."""
        if self.text:
            return self.text
        said = {"format": "edgecap-tuning", "version": VERSION, "graphs": dict(self.graphs), **self.facts}
        return json.dumps(said, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Tuning:
        """Read tuning.json. Raises UsageError (one line) for a file that is not one."""
        advice = "make one with edgecap export --autotune"
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UsageError(f"{path} is no tuning file (more than {MAX_BYTES:,} bytes); {advice}")
            text = path.read_bytes().decode("utf-8")
            said = json.loads(text)
        except OSError as error:
            raise UsageError(f"cannot read the tuning file {path}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{path} is damaged: not JSON; {advice}") from None
        if not isinstance(said, dict) or said.get("format") != "edgecap-tuning":
            raise UsageError(f'{path} is no tuning file ("format" is not "edgecap-tuning"); {advice}')
        if type(said.get("version")) is not int or said["version"] != VERSION:
            raise UsageError(f"{path} is of version {said.get('version')!r}; this edgecap reads {VERSION}; {advice}")
        graphs = said.get("graphs")
        known = isinstance(graphs, dict) and sorted(graphs) == sorted(PARTS)
        if not known or any(each not in PRECISIONS for each in graphs.values()):
            raise UsageError(
                f'{path} is damaged: "graphs" must give {" and ".join(PARTS)} one of {", ".join(PRECISIONS)}; {advice}'
            )
        facts = {key: value for key, value in said.items() if key not in ("format", "version", "graphs")}
        return cls(graphs, facts, text)


def autotune(
    source: Source,
    build: Callable[[Source], Artifact],
    device: str,
    gate: Callable[[Artifact], GateResult],
    *,
    progress: Progress = silent,
) -> tuple[Tuning, Artifact, GateResult]:
    """Time encoder and decoder at each precision on this machine and keep the fastest pair whose gate passes.

    build: an ONNX target's, which follows options.graphs. device: a profile's name. Returns the choice with its
    artifact and the gate's result, which has failed only where even fp32's does.
    Raises UsageError for a device that cannot be timed from here.
    """
    profile = timeable(device)
    models, manifest = _models(source, progress)
    times = {part: _time(source, part, models, manifest, progress) for part in PARTS}
    sizes = {part: {p: models[part][p].ByteSize() for p in PRECISIONS} for part in PARTS}
    del models
    tried = []
    kept = []  # the gate may know artifacts by identity
    for graphs in candidates(times, sizes):
        scratch = source.scratch / f"autotune{len(tried)}"
        scratch.mkdir()
        options = replace(source.options, graphs=graphs)
        artifact = build(replace(source, options=options, scratch=scratch))
        kept.append(artifact)
        result = gate(artifact)
        tried.append({"graphs": graphs, "cider_drop": result.drop.mean, "gate": result.verdict})
        if result.passed:
            break
    facts = {
        "device": profile.name,
        "cpu": cpu_facts().to_dict(),
        "engine": {"onnxruntime": ort.__version__},
        "threads": 1,
        "rounds": ROUNDS,
        "decoder_timed_on": f"one prefill and {TOKENS} tokens, one photo",
        "speed_against_fp32": {
            part: {p: round(times[part]["fp32"] / times[part][p], 3) for p in PRECISIONS} for part in PARTS
        },
        "milliseconds": {part: {p: round(times[part][p] * 1e3, 3) for p in PRECISIONS} for part in PARTS},
        "bytes": sizes,
        "tried": tried,
    }
    return Tuning(graphs, facts), artifact, result


def timeable(device: str) -> Profile:
    """The device's profile. Raises UsageError where this process does not run on that device."""
    profile = get_profile(device)
    if profile.kind != "local":
        raise UsageError(
            f"device {profile.name} ({KINDS[profile.kind].label}) must be reached to be timed, which export cannot do; "
            "run it on that device with --autotune --device cpu, and use its file here with --tuning"
        )
    return profile


def candidates(
    times: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]]
) -> list[dict[str, str]]:
    """Pairs of precisions, the fastest caption first; what is as fast (NOISE) in order of bytes. fp32 ends it.

    times: seconds of one photo's graph runs; sizes: bytes; both part → precision → value.
    """
    pairs = [{"encoder": encoder, "decoder": decoder} for encoder in PRECISIONS for decoder in PRECISIONS]

    def seconds(pair: dict[str, str]) -> float:
        return sum(times[part][precision] for part, precision in pair.items())

    ordered: list[dict[str, str]] = []
    waiting = sorted(pairs, key=seconds)
    while waiting:
        alike = [pair for pair in waiting if seconds(pair) <= seconds(waiting[0]) * NOISE]
        # Each graph alone, too: an encoder ten times the decoder's cost must not hide how slow the decoder is.
        for part in PARTS:
            quickest = min(times[part][pair[part]] for pair in alike)
            alike = [pair for pair in alike if times[part][pair[part]] <= quickest * NOISE]
        first = min(alike, key=lambda pair: sum(sizes[part][precision] for part, precision in pair.items()))
        ordered.append(first)
        waiting.remove(first)
    exact = {part: "fp32" for part in PARTS}
    return ordered[: ordered.index(exact) + 1]


def _models(
    source: Source, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Part → precision → its graph as it is shipped; and what the manifest says to run them, of any pair the same."""
    models: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for done, precision in enumerate(PRECISIONS):
        progress("build graphs", done, len(PRECISIONS))
        pair = onnx_trunk(source)
        for part in PARTS:
            build_graph(source, pair, part, precision)
            models[part][precision] = getattr(pair, part)
    progress("build graphs", len(PRECISIONS), len(PRECISIONS))
    return models, {"session": pair.session, "tokens": source.calibration.tokens, "graphs": pair.graphs()}


def _time(
    source: Source,
    part: str,
    models: dict[str, dict[str, Any]],
    manifest: dict[str, Any],
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Seconds of one photo's runs of a graph at each precision, one thread: the least of interleaved rounds.

    The least, not the median: graphs that run the same kernels must come out alike on a CPU that does other work, too.
    """
    calibration = source.calibration
    encoder = engine(models["encoder"]["fp32"])
    pixels = np.ascontiguousarray(calibration.pixels[:1])
    tokens = (list(calibration.captions[0]) * TOKENS)[:TOKENS] or [calibration.tokens["eos"]] * TOKENS
    same_row = np.zeros(1, np.int64)
    loaded = {}
    for precision, model in models[part].items():
        graph = engine(model)
        pairs = (graph, engine(models["decoder"]["fp32"])) if part == "encoder" else (encoder, graph)
        loaded[precision] = OnnxModel(manifest, *pairs)
    taken: dict[str, list[float]] = {precision: [] for precision in loaded}
    for turn in range(WARM + ROUNDS):
        for precision, model in loaded.items():
            session = model.session()
            if part == "decoder":
                session.encode(pixels)
            began = time.perf_counter()
            if part == "encoder":
                session.encode(pixels)
            else:
                session.prefill()
                for token in tokens:
                    session.step(np.array([token]), same_row)
            if turn >= WARM:
                taken[precision].append(time.perf_counter() - began)
        progress(f"time {part}", turn + 1, WARM + ROUNDS)
    return {precision: min(each) for precision, each in taken.items()}
