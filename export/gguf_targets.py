"""Targets gguf-f16, gguf-q8_0 and gguf-q4_0: the decoder for llama.cpp, and beside it the encoder as ONNX int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .artifact import MIN_ENGINE, Artifact, BuildOptions, Source
from .gguf_decoder import ARCHITECTURES, write_decoder
from .gguf_mmproj import write_mmproj
from .graph import PassResult, save
from .int8_static import StaticOptions, quantize_static
from .pixels import fold_pixels
from .trunk import OPSET_PLAIN

if TYPE_CHECKING:
    from pathlib import Path

MIN_LLAMA_CPP = "0.3.36"  # of llama-cpp-python: contexts with one cache for all rows, flash attention by choice
DECODER, ENCODER = "decoder.gguf", "encoder.gguf"
MMPROJ = ("siglip", "pixel_shuffle")  # encoder and bridge as mmproj holds them


def f16(source: Source) -> Artifact:
    return _build(source, "f16")


def q8_0(source: Source) -> Artifact:
    return _build(source, "q8_0")


def q4_0(source: Source) -> Artifact:
    return _build(source, "q4_0")


def refuses(parts: dict[str, str], options: BuildOptions) -> str | None:
    """Why a captioner of these kinds cannot be a GGUF, or None."""
    kind = parts["decoder"]
    if kind == "opt":
        return "OPT is not an architecture llama.cpp knows; take another target"
    if kind not in ARCHITECTURES:
        return f"llama.cpp runs language models ({', '.join(ARCHITECTURES)}), not this decoder; take another target"
    if options.mmproj and (parts["encoder"], parts["bridge"]) != MMPROJ:
        found = f"encoder {parts['encoder']} with bridge {parts['bridge']}"
        return f"llama.cpp has no {found}; leave --mmproj out, and the encoder runs in ONNX Runtime"
    return None


def _build(source: Source, precision: str) -> Artifact:
    checkpoint, options = source.checkpoint, source.options
    path = source.scratch / DECODER
    keep = {name.removeprefix("decoder:") for name in options.keep if name.startswith("decoder:")}
    written = write_decoder(
        path,
        checkpoint.model.decoder,
        checkpoint.recipe.decoder["kind"],
        precision,
        tokenizer=checkpoint.tokenizer,
        tokens=checkpoint.tokens,
        keep=keep,
        words=bool(options.mmproj),
    )
    files: dict[str, bytes | Path] = {DECODER: path}
    settings, graph, passes, requires = _encoder(source, files)
    return Artifact(
        files=files,
        graphs={"encoder": graph, "decoder": {"file": DECODER, "inputs": {}, "outputs": {}}},
        session=None,
        requires={"llama_cpp": MIN_LLAMA_CPP, **requires},
        passes=[*passes, written],
        more={"gguf": settings},
    )


def _encoder(
    source: Source, files: dict[str, bytes | Path]
) -> tuple[dict[str, Any], dict[str, Any], list[PassResult], dict[str, str]]:
    """Adds the encoder's file; the manifest's "gguf" and "graphs.encoder", the passes, and what running it requires."""
    calibration, options = source.calibration, source.options
    keep = {name.removeprefix("encoder:") for name in options.keep if name.startswith("encoder:")}
    if options.mmproj:
        written, bias = write_mmproj(source.scratch / ENCODER, source.checkpoint.model, options.mmproj, keep=keep)
        files[ENCODER] = source.scratch / ENCODER
        settings = {"encoder": "mmproj", "bias": bias.tolist()}
        return settings, {"file": ENCODER, "inputs": {}, "outputs": {}}, [written], {}
    pair = source.trunk()
    passes = [result for result in pair.passes if result.params.get("graph") != "decoder"]
    if options.graphs.get("encoder", "int8") != "fp32":
        passes.append(fold_pixels(pair.encoder).on("encoder"))
        feeds = calibration.encoder_feeds()
        report = calibration.reporter("encoder", len(feeds))
        static_options = StaticOptions(precision=dict.fromkeys(keep, "fp32"))
        static = quantize_static(pair.encoder, feeds, options=static_options, progress=report)
        passes.append(static.on("encoder"))
    graph = pair.graphs()["encoder"]
    files[graph["file"]] = save(pair.encoder)
    settings = {"encoder": "onnx", "prefix": pair.session["prefix"]["from"]}
    return settings, graph, passes, {"onnxruntime": MIN_ENGINE[OPSET_PLAIN]}
