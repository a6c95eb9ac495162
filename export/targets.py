"""The table of export targets: one entry and one small file each; the tests and `edgecap targets` run over it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..runtime.backends import BACKENDS
from ..runtime.errors import UsageError, need

if TYPE_CHECKING:
    from .artifact import Artifact, BuildOptions, Source


@dataclass(frozen=True)
class Target:
    """backend: the runtime's engine. precision: what the manifest says. code: `module:function`, imported when used,
    which builds the Artifact from a Source. same_tokens, min_cosine: what the golden pair asks on any device.

    packages: what building it imports, of the extra `extra`. refuses: `module:function`, called with the recipe's
    parts ({"encoder": kind, "bridge": kind, "decoder": kind}) and the BuildOptions: why it cannot be, or None.
    needs_system: the sys.platform that its engine runs on, "" for any. frames: its backend reads a photo's frames one
    by one, among the prompt's words.
    """

    backend: str
    precision: str
    help: str
    code: str
    same_tokens: bool
    min_cosine: float
    calibrated: bool = False
    packages: tuple[str, ...] = ()
    extra: str = "export"
    refuses: str = ""
    needs_system: str = ""

    @property
    def frames(self) -> bool:
        return self.backend in ("onnx", "openvino", "gguf")

    @property
    def runs_here(self) -> bool:
        return not self.needs_system or sys.platform == self.needs_system

    def build(self, source: Source) -> Artifact:
        return _load(self.code)(source)

    def refusal(self, parts: dict[str, str], options: BuildOptions) -> str | None:
        """Why this captioner cannot become this target; None if it can."""
        if options.fused and self.backend != "onnx":
            return "--fused is for the onnx targets"
        if options.mmproj and self.backend != "gguf":
            return "--mmproj is for the gguf targets"
        return _load(self.refuses)(parts, options) if self.refuses else None


def _load(code: str) -> Callable[..., Any]:
    module, _, function = code.partition(":")
    return getattr(import_module(f".{module}", __package__), function)


def _openvino(precision: str, help: str, min_cosine: float) -> Target:
    return Target(
        "openvino",
        precision,
        help,
        f"openvino_{precision}:build",
        False,
        min_cosine,
        calibrated=precision != "fp16",
        packages=("nncf",),
        extra="openvino-export",
    )


def _coreml(precision: str, help: str, min_cosine: float) -> Target:
    return Target(
        "coreml",
        precision,
        help,
        f"coreml:{precision}",
        False,
        min_cosine,
        extra="export,coreml",
        needs_system="darwin",
    )


def _gguf(precision: str, help: str, min_cosine: float) -> Target:
    return Target(
        "gguf",
        precision,
        help,
        f"gguf_targets:{precision}",
        False,
        min_cosine,
        calibrated=True,  # the encoder beside it is int8
        packages=("gguf",),
        extra="export,gguf",
        refuses="gguf_targets:refuses",
    )


TARGETS: dict[str, Target] = {
    "onnx-fp32": Target("onnx", "fp32", "the torch model's arithmetic", "onnx_fp32:build", True, 0.9999),
    "onnx-fp16": Target(
        "onnx", "fp16", "weights stored in half the bytes, computed in fp32", "onnx_fp16:build", False, 0.999
    ),
    "onnx-int8": Target(
        "onnx", "int8", "int8 weights and activations", "onnx_int8:build", False, 0.95, calibrated=True
    ),
    "onnx-int4": Target(
        "onnx",
        "int4",
        "weights stored in 4 bits (small convolutions in 8), computed in int8",
        "onnx_int4:build",
        False,
        0.8,
        calibrated=True,
    ),
    "openvino-fp16": _openvino("fp16", "OpenVINO, weights stored in half the bytes, computed in fp32", 0.999),
    "openvino-int8": _openvino("int8", "OpenVINO, int8 convolutions, int8 weights elsewhere", 0.95),
    "openvino-int4": _openvino("int4", "OpenVINO, int8 convolutions, 4-bit weights elsewhere", 0.8),
    "coreml-fp16": _coreml("fp16", "Core ML packages, fp16", 0.999),
    "coreml-int8": _coreml("int8", "Core ML packages, int8 weights, fp16 arithmetic", 0.99),
    "coreml-int4": _coreml("int4", "Core ML packages, 4-bit weights, fp16 arithmetic", 0.8),
    "gguf-f16": _gguf("f16", "llama.cpp, f16 decoder; the encoder in ONNX int8", 0.95),
    "gguf-q8_0": _gguf("q8_0", "llama.cpp, 8-bit blocks; the encoder in ONNX int8", 0.95),
    "gguf-q4_0": _gguf("q4_0", "llama.cpp, 4-bit blocks; the encoder in ONNX int8", 0.8),
}


def as_tuned(target: Target, graphs: Mapping[str, str]) -> Target:
    """The entry for an artifact whose graphs have precisions of their own: what it is called and held to."""
    least = min(TARGETS[f"onnx-{precision}"].min_cosine for precision in graphs.values())
    precisions = set(graphs.values())
    return replace(target, precision=precisions.pop() if len(precisions) == 1 else "mixed", min_cosine=least)


def pick_target(name: str) -> Target:
    """The entry of that name, once the packages that build it are there. Raises UsageError, MissingExtra."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; choices: {', '.join(TARGETS)}")
    target = TARGETS[name]
    for package in (*target.packages, BACKENDS[target.backend].package):
        need(package, extra=target.extra, command=f"edgecap export --target {name}")
    return target
