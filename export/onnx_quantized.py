"""Both graphs of an ONNX bundle, each at the precision asked for and with ONNX Runtime's own operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx

from .artifact import Artifact, BuildOptions, Source
from .calibration import Calibration
from .gelu import fuse_gelus
from .graph import Graph, PassResult
from .half import store_half
from .int4_blocks import quantize_blocks
from .int4_pack import pack, short_names
from .int8_embedding import quantize_embeddings
from .int8_matmul import matmul_statistics, quantize_matmuls
from .int8_static import quantize_static, static_statistics
from .kv_cache import share_cache
from .onnx_target import changed, onnx_artifact, onnx_trunk
from .pixels import fold_pixels
from .products import fuse_products
from .residual_norms import fuse_residual_norms
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
    """Both graphs at `precision` ("fp32", "fp16", "int8", "int4"), or at what options.graphs says of one."""
    pair = onnx_trunk(source)
    for name in PARTS:
        build_graph(source, pair, name, source.options.graphs.get(name, precision))
    return onnx_artifact(pair)


def build_graph(source: Source, pair: OnnxPair, name: str, precision: str) -> None:
    """One graph of the trunk as it is shipped: its precision, then the operators of ONNX Runtime that its own fusions
    leave apart. In place, with what the pair says of it.

    name: "encoder" or "decoder"; layers in options.keep stay more precise.
    """
    if name == "encoder":
        done = _encoder(source, pair.encoder, precision)
    else:
        done = [*_decoder(source, pair.decoder, precision), *_use_ort_operators(pair)]
    pair.passes += [result.on(name) for result in done]


def _encoder(source: Source, model: onnx.ModelProto, precision: str) -> list[PassResult]:
    """A large one has 8 bits where 4 are asked for: its products have a thousand rows, which int8 kernels alone are
    fast for."""
    large = _matrix_bytes(model) > STREAMED
    done: list[PassResult] = []
    if precision in ("int8", "int4"):
        raised = raised_layers(source.options, "encoder", precision)
        done.append(fold_pixels(model))
        if large:
            raised = {node: wanted for node, wanted in raised.items() if wanted == "fp32"}
            done.append(quantize_matmuls(model, _peaks(source, "encoder"), precision=raised))
        else:
            bits = {"int8": 8, "int4": 4}[precision]
            done.append(quantize_static(model, statistics(source, "encoder"), bits=bits, precision=raised))
    done += fuse_vision(model)  # before weights are stored as anything but what the nodes read
    if precision == "fp16":
        done.append(store_half(model))
    elif precision == "int4" and not large:
        done += [pack(model), store_half(model), short_names(model)]
    return [*done, *changed(fuse_products(model))]


def _decoder(source: Source, model: onnx.ModelProto, precision: str) -> list[PassResult]:
    if precision == "fp32":
        return []
    if precision == "fp16":
        return [store_half(model)]
    raised, large = raised_layers(source.options, "decoder", precision), _matrix_bytes(model) > STREAMED
    if precision == "int8" and large:
        done = [quantize_matmuls(model, _peaks(source, "decoder"), precision=raised)]
        return [*done, quantize_embeddings(model, by_rows=True)]
    known = statistics(source, "decoder")
    if precision == "int8":
        return [quantize_static(model, known, precision=raised), quantize_embeddings(model, by_rows=True)]
    if large:
        return [quantize_blocks(model, known, precision=raised), store_half(model), short_names(model)]
    done = [quantize_static(model, known, bits=4, precision=raised), quantize_embeddings(model)]
    return [*done, pack(model), store_half(model), short_names(model)]


def _use_ort_operators(pair: OnnxPair) -> list[PassResult]:
    """A decoder's residuals, GELUs, cache (which is written in place then: the session's roles change) and products."""
    fused = [*changed(fuse_residual_norms(pair.decoder)), *changed(fuse_gelus(pair.decoder))]
    pair.session, shared = share_cache(pair.decoder, pair.session)
    return [*fused, *shared, *changed(fuse_products(pair.decoder))]


def statistics(source: Source, name: str) -> Statistics:
    """What calibration says about the fp32 graph (the encoder's with pixels folded), measured once for a source."""
    if name not in source.statistics:
        source.statistics[name] = _seen(onnx_trunk(source), name, source.calibration, static_statistics)
    return source.statistics[name]


def _peaks(source: Source, name: str) -> Statistics | None:
    """What a few photos say about the rows of a large graph's layers; nothing of one whose weights lie outside: its
    fp32 form would be written to files and read for each photo, for steps that wait for the weights anyhow."""
    if name not in source.peaks:
        pair = onnx_trunk(source)
        few = None if pair.external is not None else source.calibration.first(LOOKED_AT)
        source.peaks[name] = None if few is None else _seen(pair, name, few, matmul_statistics)
    return source.peaks[name]


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
