"""Target onnx-int8: both graphs in static QDQ int8, the embedding stored once as int8."""

from __future__ import annotations

from .artifact import Artifact, Source, onnx_artifact
from .embedding8 import quantize_embeddings
from .int8_static import quantize_static
from .pixels import fold_pixels


def build(source: Source) -> Artifact:
    pair, calibration = source.trunk(), source.calibration
    decoder_feeds = calibration.decoder_feeds(pair)  # from the graphs as they are now, fp32
    pair.passes.append(fold_pixels(pair.encoder).on("encoder"))
    for name, feeds in (("encoder", calibration.encoder_feeds()), ("decoder", decoder_feeds)):
        report = calibration.reporter(name, len(feeds))
        pair.passes.append(quantize_static(getattr(pair, name), feeds, progress=report).on(name))
    pair.passes.append(quantize_embeddings(pair.decoder).on("decoder"))
    return onnx_artifact(pair)
