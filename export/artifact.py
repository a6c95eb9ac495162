"""What every target starts from and what it returns: the two sides of one entry in the target table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from ..runtime.progress import Progress, silent
from .gelu import fuse_gelus
from .graph import PassResult, save, split, split_to
from .kv_cache import share_cache
from .merge import merge_projections
from .products import fuse_products, unflatten_products
from .skip_norm import fuse_residuals
from .trunk import OPSET_ATTENTION, OnnxPair, to_onnx
from .vision import fuse_vision

if TYPE_CHECKING:
    from ..runtime.session import Model
    from ..train.checkpoint import Checkpoint
    from .calibration import Calibration

MIN_ENGINE = {18: "1.18", OPSET_ATTENTION: "1.23"}  # ONNX Runtime; 1.18 reads IR version 10


LARGE = 32 * 2**20  # bytes of an ONNX graph whose weights become a file of their own


@dataclass(frozen=True)
class BuildOptions:
    """What may be asked of a target beyond its name.

    fused: also the whole captioner as one graph. mmproj: the encoder as a llama.cpp projector file, "f16" or "q8_0".
    keep: layers ("encoder:NAME", "decoder:NAME") that stay at a higher precision. graphs: "encoder" and "decoder" →
    "fp32", "int8" or "int4" where the device prefers another precision for one of them.
    """

    fused: bool = False
    mmproj: str = ""
    keep: frozenset[str] = frozenset()
    graphs: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Source:
    """A loaded checkpoint, its calibration data, and the fp32 ONNX graphs, traced when first asked for.

    scratch: an empty folder for the build's temporary files. frames: the manifest's "frames" of a captioner whose
    photos the runtime cuts, None where the graph takes them whole.
    """

    checkpoint: Checkpoint
    calibration: Calibration
    scratch: Path
    options: BuildOptions = field(default_factory=BuildOptions)
    frames: dict[str, Any] | None = None
    progress: Progress = silent
    _trunk: OnnxPair | None = None
    statistics: dict[str, Any] = field(default_factory=dict)  # of the fp32 graphs: see onnx_quantized

    def trunk(self) -> OnnxPair:
        """The fp32 graphs; a fresh copy each time, to be changed at will. Raises EdgecapError if torch cannot trace."""
        if self._trunk is None:
            self.progress("graphs", 0, 2)
            self._trunk = to_onnx(
                self.checkpoint.model,
                framed=self.frames is not None,
                scratch=self.scratch,
                report=lambda done: self.progress("graphs", done, 2),
            )
        return self._trunk.copy()

    def onnx_trunk(self) -> OnnxPair:
        """The same for ONNX Runtime: in a decoder with a KV cache, products of rows as they lie, and projections that
        read one tensor merged."""
        pair = self.trunk()
        if pair.session.get("kv"):
            done = [*_changed(unflatten_products(pair.decoder)), merge_projections(pair.decoder)]
            pair.passes += [result.on("decoder") for result in done]
        return pair


@dataclass
class Artifact:
    """A target's graphs and what bundle.json must say to run them.

    files: graph files only, name → contents. graphs, session, requires: those parts of the manifest (session None
    where the engine wires the graphs itself). more: further parts of the manifest. simulate: where the engine cannot
    run here, a Model that computes in torch with the artifact's own weights, for the gate.
    """

    files: dict[str, bytes | Path]
    graphs: dict[str, Any]
    session: dict[str, Any] | None
    requires: dict[str, str]
    passes: list[PassResult]
    more: dict[str, Any] = field(default_factory=dict)
    simulate: Callable[[], Model] | None = None


def size_of(file: bytes | Path) -> int:
    """Bytes of an artifact's file."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def written(pair: OnnxPair) -> tuple[dict[str, Any], dict[str, bytes | Path]]:
    """The manifest's "graphs" and the files of a pair, large weights beside their graph."""
    graphs = pair.graphs()
    files: dict[str, bytes | Path] = {}
    for name, graph in graphs.items():
        model = getattr(pair, name)
        if pair.external is None and model.ByteSize() < LARGE:
            files[graph["file"]] = save(model)
            continue
        graph["weights"] = f"{name}.bin"
        if pair.external is None:
            files[graph["file"]], files[graph["weights"]] = split(model, graph["weights"])
        else:
            path = Path(mkdtemp(dir=pair.external.folder)) / graph["weights"]
            files[graph["file"]], files[graph["weights"]] = split_to(model, path), path
    return graphs, files


def onnx_artifact(pair: OnnxPair) -> Artifact:
    """The graphs of a pair, for ONNX Runtime, see `fuse`."""
    session, passes = fuse(pair)
    graphs, files = written(pair)
    models = (pair.encoder, pair.decoder)
    opset = max(entry.version for model in models for entry in model.opset_import if not entry.domain)
    return Artifact(
        files=files,
        graphs=graphs,
        session=session,
        requires={"onnxruntime": MIN_ENGINE.get(opset, MIN_ENGINE[OPSET_ATTENTION])},
        passes=[*pair.passes, *passes],
    )


def fuse(pair: OnnxPair) -> tuple[dict[str, Any], list[PassResult]]:
    """Give both graphs, in place, the operators of ONNX Runtime that its own fusions leave apart, and a decoder a KV
    cache that is written in place: the session's roles, and what was done."""
    encoder = [*fuse_vision(pair.encoder), *_changed(fuse_products(pair.encoder))]
    fused = [*_changed(fuse_residuals(pair.decoder)), *_changed(fuse_gelus(pair.decoder))]
    session, shared = share_cache(pair.decoder, pair.session)
    decoder = [*fused, *shared, *_changed(fuse_products(pair.decoder))]
    return session, [
        *(result.on("encoder") for result in encoder),
        *(result.on("decoder") for result in decoder),
    ]


def _changed(result: PassResult) -> list[PassResult]:
    """The result, if its pass found anything to do."""
    return [result] if any(result.cost.values()) else []
