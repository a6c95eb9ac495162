"""What every target starts from and what it returns: the two sides of one entry in the target table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.progress import Progress, silent
from .graph import PassResult
from .trunk import OnnxPair, to_onnx

if TYPE_CHECKING:
    from ..runtime.session import Model
    from ..train.checkpoint import Checkpoint
    from .calibration import Calibration
    from .statistics import Statistics


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
    photos the runtime cuts, None where the graph takes them whole. statistics, peaks: what onnx_quantized has seen of
    the fp32 graphs by now, "encoder" or "decoder" → for static int8, and for large graphs (None: not looked at).
    """

    checkpoint: Checkpoint
    calibration: Calibration
    scratch: Path
    options: BuildOptions = field(default_factory=BuildOptions)
    frames: dict[str, Any] | None = None
    progress: Progress = silent
    _trunk: OnnxPair | None = None
    statistics: dict[str, Statistics] = field(default_factory=dict)
    peaks: dict[str, Statistics | None] = field(default_factory=dict)

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
