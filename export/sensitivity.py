"""How much the captions' logits suffer from each layer's quantization, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from ..runtime.backends.onnx import OnnxModel
from .artifact import Source
from .calibration import engine, teacher_force
from .graph import Graph
from .int8_static import four_bit_layers, quantize_static
from .onnx_quantized import PARTS, statistics
from .onnx_target import onnx_trunk
from .pixels import fold_pixels
from .statistics import layers_of
from .trunk import OnnxPair

PHOTOS = 16


@dataclass(frozen=True)
class Sensitivity:
    """layer: "encoder:NODE" or "decoder:NODE". error: mean squared change of the logits over their mean square.

    bits: of its weights, 8 also for the layers that an int4 graph leaves at 8.
    """

    layer: str
    error: float
    bits: int


def sensitivities(
    source: Source, bits: int, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Sensitivity]:
    """Each quantizable layer of both graphs, the most sensitive first.

    A layer's error is that of the fp32 graphs with this one layer quantized as in a graph of `bits` (4 or 8; its input
    always to 8), on calibration photos that are fed their own captions.
    """
    pair = onnx_trunk(source)
    fold_pixels(pair.encoder)
    layers = {part: layers_of(Graph(getattr(pair, part))) for part in PARTS}
    names = {part: [layer.node.name for layer in layers[part]] for part in PARTS}
    forced = _Forced(source, pair)
    wanted = forced.logits({})
    power = float(np.mean(wanted**2))
    found, total = [], sum(map(len, names.values()))
    for part in PARTS:
        known, four = statistics(source, part), four_bit_layers(layers[part]) if bits == 4 else set()
        for name in names[part]:
            model = onnx.ModelProto()
            model.CopyFrom(getattr(pair, part))
            others = {other: "fp32" for other in names[part] if other != name}
            used = 4 if name in four else 8
            quantize_static(model, known, bits=used, spared=0.0, precision=others)
            error = float(np.mean((forced.logits({part: model}) - wanted) ** 2)) / power
            found.append(Sensitivity(f"{part}:{name}", error, used))
            progress(len(found), total)
    return sorted(found, key=lambda each: (-each.error, each.layer))


class _Forced:
    """Logits of a few calibration photos that are fed their own captions; an engine for each graph but the changed."""

    def __init__(self, source: Source, pair: OnnxPair) -> None:
        calibration = source.calibration
        self.pixels, self.captions = calibration.pixels[:PHOTOS], calibration.captions[:PHOTOS]
        self.manifest = {"session": pair.session, "tokens": calibration.tokens, "graphs": pair.graphs()}
        self.engines = {part: engine(getattr(pair, part)) for part in PARTS}

    def logits(self, changed: dict[str, onnx.ModelProto]) -> np.ndarray:
        """[positions, vocab] with these graphs in place of the fp32 ones."""
        engines = {part: engine(changed[part]) if part in changed else self.engines[part] for part in PARTS}
        model = OnnxModel(self.manifest, engines["encoder"], engines["decoder"])
        return teacher_force(model.session(), self.pixels, self.captions)
