"""Target onnx-fp32: the trunk's graphs as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calibration import Calibration
    from .trunk import OnnxPair


def build(pair: OnnxPair, calibration: Calibration) -> OnnxPair:
    return pair
