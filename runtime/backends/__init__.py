"""The engines: one entry here and one module each, imported only when a bundle asks for it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import EdgecapError, MissingExtra, UsageError
from ..process import mind

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..session import Model


@dataclass(frozen=True)
class Backend:
    """Where an engine's code is (`module:class`, loaded with `class.load(bundle, threads=…)`), and what it
    needs. environment: variables that the engine reads when it is imported, where the user has not set them.
    """

    code: str
    package: str
    extra: str | None  # None: part of the base install
    system: str = ""  # the sys.platform that the engine runs on, "" for any, and how people call it
    runs_on: str = ""
    environment: tuple[tuple[str, str], ...] = ()


BACKENDS: dict[str, Backend] = {
    "onnx": Backend("onnx:OnnxModel", package="onnxruntime", extra=None),
    "openvino": Backend("openvino:OpenVinoModel", package="openvino", extra="openvino"),
    # Threads that spin while they wait decode four times slower on a CPU that has other work.
    "gguf": Backend("gguf:GgufModel", package="llama_cpp", extra="gguf", environment=(("OMP_WAIT_POLICY", "passive"),)),
    "coreml": Backend(
        "coreml:CoreMLModel", package="coremltools", extra="coreml", system="darwin", runs_on="macOS and iOS"
    ),
}


def load_model(bundle: Bundle, *, threads: int | None = None) -> Model:
    """Load a bundle's graphs in the engine it names. `threads`: None leaves the number to the engine.

    Raises UsageError for an unknown backend or an engine that is missing or too old, EdgecapError for graphs it cannot
    load.
    """
    name = bundle.manifest["backend"]
    if name not in BACKENDS:
        raise UsageError(
            f"{bundle.path} needs the backend {name!r}; this edgecap has {', '.join(BACKENDS)}: upgrade it"
        )
    backend = BACKENDS[name]
    if backend.system not in ("", sys.platform):
        raise UsageError(
            f"{bundle.path} is for {backend.runs_on} and cannot run here: copy it there for edgecap verify; "
            "edgecap inspect checks its files and shows what was measured"
        )
    for variable, value in backend.environment:
        os.environ.setdefault(variable, value)
    try:
        engine = import_module(backend.package)
    except ImportError:
        if backend.extra:
            raise MissingExtra(f"the {name} backend", backend.package, backend.extra) from None
        raise EdgecapError(f"{backend.package} cannot be imported: pip install --force-reinstall edgecap") from None
    required = bundle.manifest["requires"].get(backend.package)
    found = getattr(engine, "__version__", "0")
    if required and _version(found) < _version(required):
        need = f"{backend.package} {required} or newer"
        install = f"'edgecap[{backend.extra}]'" if backend.extra else backend.package
        raise UsageError(f"{bundle.path} needs {need}, {found} is installed: pip install -U {install}")
    module, _, attribute = backend.code.partition(":")
    model_class = getattr(import_module(f".{module}", __package__), attribute)
    model = model_class.load(bundle, threads=threads)
    mind(model)
    frames = bundle.manifest.get("frames")
    if frames is None:
        return model
    from ..framed import FramedModel

    return FramedModel.of(model, frames)


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.31.0rc1" → (1, 31, 0)."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
