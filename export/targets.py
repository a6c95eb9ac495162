"""The table of export targets: one entry and one small file each; the tests run over the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.errors import UsageError
from . import onnx_fp16, onnx_fp32, onnx_int8

if TYPE_CHECKING:
    from .calibration import Calibration
    from .trunk import OnnxPair


@dataclass(frozen=True)
class Target:
    """precision: what the manifest says. same_tokens, min_cosine: what the golden pair asks of it on any device.

    build takes the fp32 graphs (and may change them) and the calibration data, and returns the target's graphs.
    """

    precision: str
    help: str
    build: Callable[[OnnxPair, Calibration], OnnxPair]
    same_tokens: bool
    min_cosine: float
    calibrated: bool = False


TARGETS: dict[str, Target] = {
    "onnx-fp32": Target("fp32", "the torch model's arithmetic", onnx_fp32.build, True, 0.9999),
    "onnx-fp16": Target("fp16", "weights stored in half the bytes, computed in fp32", onnx_fp16.build, False, 0.999),
    "onnx-int8": Target("int8", "int8 weights and activations", onnx_int8.build, False, 0.95, calibrated=True),
}


def pick_target(name: str) -> Target:
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; choices: {', '.join(TARGETS)}")
    return TARGETS[name]
