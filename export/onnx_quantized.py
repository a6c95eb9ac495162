"""Both graphs of an ONNX bundle, each at the precision asked for: what onnx-int8, onnx-int4 and tuned bundles share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx

from .artifact import Artifact, BuildOptions, Source, onnx_artifact
from .calibration import Calibration
from .embedding8 import quantize_embeddings
from .graph import Graph, PassResult
from .half import store_half
from .int4_blocks import quantize_blocks
from .int4_pack import pack, short_names
from .int8_rows import quantize_rows, row_statistics
from .int8_static import StaticOptions, no_statistics, quantize_static
from .pixels import fold_pixels
from .statistics import Statistics, layers_of
from .trunk import OnnxPair
from .vision import fuse_vision

PARTS = ("encoder", "decoder")
HIGHER = {"int4": "int8", "int8": "fp32"}
# Weights of this many bytes (as int8) are in no cache: a step then waits for memory, and half the bytes beat the
# arithmetic of unpacking them at each step.
STREAMED = 32_000_000
LOOKED_AT = 16  # photos that tell whether a large graph's rows are alike


def build_graphs(source: Source, precision: str) -> Artifact:
    """Both graphs at `precision` ("fp32", "int8", "int4"), or at what options.graphs says of one."""
    pair = source.onnx_trunk()
    for name in PARTS:
        wanted = source.options.graphs.get(name, precision)
        model = getattr(pair, name)
        done = quantize(source, name, model, wanted)
        pair.passes += [result.on(name) for result in done]
    return onnx_artifact(pair)


def quantize(source: Source, name: str, model: onnx.ModelProto, precision: str) -> list[PassResult]:
    """One graph of the trunk, in place. name: "encoder" or "decoder"; layers in options.keep stay more precise."""
    if name == "encoder":
        return _encoder(source, model, precision)
    if precision == "fp32":
        return []
    raised, large = raised_layers(source.options, name, precision), _matrix_bytes(model) > STREAMED
    if precision == "int8" and large:
        done = [quantize_rows(model, _rows_seen(source, name), precision=raised)]
        return [*done, quantize_embeddings(model, by_rows=True)]
    known = statistics(source, name)
    if precision == "int8":
        options = StaticOptions(precision=raised)
        return [quantize_static(model, known, options=options), quantize_embeddings(model, by_rows=True)]
    if large:
        return [quantize_blocks(model, known, precision=raised), store_half(model), short_names(model)]
    done = [quantize_static(model, known, options=StaticOptions(bits=4, precision=raised)), quantize_embeddings(model)]
    return [*done, pack(model), store_half(model), short_names(model)]


def _encoder(source: Source, model: onnx.ModelProto, precision: str) -> list[PassResult]:
    """A large one has 8 bits where 4 are asked for: its products have a thousand rows, which int8 kernels alone are
    fast for."""
    if precision == "fp32":
        return fuse_vision(model)
    done = [fold_pixels(model)]
    raised = raised_layers(source.options, "encoder", precision)
    if _matrix_bytes(model) > STREAMED:
        raised = {node: wanted for node, wanted in raised.items() if wanted == "fp32"}
        rows = quantize_rows(model, _rows_seen(source, "encoder"), precision=raised)
        return [*done, rows, *fuse_vision(model)]
    known, bits = statistics(source, "encoder"), {"int8": 8, "int4": 4}[precision]
    done.append(quantize_static(model, known, options=StaticOptions(bits=bits, precision=raised)))
    done += fuse_vision(model)
    return done if bits == 8 else [*done, pack(model), store_half(model), short_names(model)]


def statistics(source: Source, name: str) -> Statistics:
    """What calibration says about the fp32 graph (the encoder's with pixels folded), measured once for a source."""
    if name not in source.statistics:
        source.statistics[name] = _seen(source.onnx_trunk(), name, source.calibration, no_statistics)
    return source.statistics[name]


def _rows_seen(source: Source, name: str) -> Statistics | None:
    """What a few photos say about the rows of a large graph's layers; nothing of one whose weights lie outside: its
    fp32 form would be written to files and read for each photo, for steps that wait for the weights anyhow."""
    key = f"{name}/rows"
    if key not in source.statistics:
        pair = source.onnx_trunk()
        few = None if pair.external is not None else source.calibration.first(LOOKED_AT)
        source.statistics[key] = None if few is None else _seen(pair, name, few, row_statistics)
    return source.statistics[key]


def _seen(
    pair: OnnxPair, name: str, calibration: Calibration, start: Callable[[onnx.ModelProto], Statistics]
) -> Statistics:
    """What is seen of one of the fp32 graphs on the calibration data, from what `start` makes of it on."""
    if name == "decoder":
        known = start(pair.decoder)
        calibration.play_decoder(pair, known, calibration.reporter(name, len(calibration.pixels)))
    else:
        fold_pixels(pair.encoder)
        known, feeds = start(pair.encoder), calibration.encoder_feeds()
        report = calibration.reporter(name, len(feeds))
        for each in feeds:
            known.add(each)
            report(known.runs)
    known.close()
    return known


def raised_layers(options: BuildOptions, name: str, precision: str) -> Mapping[str, str]:
    """Node name → its precision, for the layers of graph `name` in options.keep.

    "encoder:NODE" is one step more precise than its graph (int4 → int8 → fp32), "encoder:NODE:fp32" stays fp32.
    """
    raised = {}
    for entry in sorted(options.keep):
        graph, _, rest = entry.partition(":")
        node, _, wanted = rest.partition(":")
        if graph == name and precision in HIGHER:
            raised[node] = wanted or HIGHER[precision]
    return raised


def _matrix_bytes(model: onnx.ModelProto) -> int:
    return sum(layer.size for layer in layers_of(Graph(model)) if layer.node.op_type != "Conv")
