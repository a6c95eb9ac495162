"""Target onnx-fp16: half the bytes, the same arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .half import store_half

if TYPE_CHECKING:
    from .calibration import Calibration
    from .trunk import OnnxPair


def build(pair: OnnxPair, calibration: Calibration) -> OnnxPair:
    pair.passes += [store_half(pair.encoder).on("encoder"), store_half(pair.decoder).on("decoder")]
    return pair
