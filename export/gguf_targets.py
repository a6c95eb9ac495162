"""Targets gguf-f16, gguf-q8_0 and gguf-q4_0: the decoder for llama.cpp, and beside it the encoder as ONNX int8."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ..runtime.errors import UsageError
from .artifact import Artifact, BuildOptions, Source
from .gguf_decoder import ARCHITECTURES, write_decoder
from .gguf_mmproj import write_mmproj
from .graph import PassResult, save
from .onnx_quantized import build_graph
from .onnx_target import requires

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
    folder = Path(mkdtemp(dir=source.scratch))  # a build may be repeated while an earlier one's files are read
    keep = {name.removeprefix("decoder:") for name in options.keep if name.startswith("decoder:")}
    written = write_decoder(
        folder / DECODER,
        checkpoint.model.decoder,
        checkpoint.recipe.decoder["kind"],
        precision,
        tokenizer=checkpoint.tokenizer,
        tokens=checkpoint.tokens,
        keep=keep,
        words=bool(options.mmproj),
    )
    files: dict[str, bytes | Path] = {DECODER: folder / DECODER}
    settings, graph, passes, requires = _encoder(source, folder, files)
    return Artifact(
        files=files,
        graphs={"encoder": graph, "decoder": {"file": DECODER, "inputs": {}, "outputs": {}}},
        session=None,
        requires={"llama_cpp": MIN_LLAMA_CPP, **requires},
        passes=[*passes, written],
        more={"gguf": settings},
    )


def _encoder(
    source: Source, folder: Path, files: dict[str, bytes | Path]
) -> tuple[dict[str, Any], dict[str, Any], list[PassResult], dict[str, str]]:
    """Adds the encoder's file; the manifest's "gguf" and "graphs.encoder", the passes, and what running it requires."""
    options = source.options
    if options.mmproj:
        if source.checkpoint.model.decoder.prompt and source.frames is None:
            raise UsageError("--mmproj: llama.cpp's encoder gives the photo without the prompt around it; leave it out")
        keep = {name.removeprefix("encoder:") for name in options.keep if name.startswith("encoder:")}
        written, bias = write_mmproj(folder / ENCODER, source.checkpoint.model, options.mmproj, keep=keep)
        files[ENCODER] = folder / ENCODER
        settings = {"encoder": "mmproj", "bias": bias.tolist()}
        return settings, {"file": ENCODER, "inputs": {}, "outputs": {}}, [written], {}
    pair = source.trunk()
    pair.passes = [result for result in pair.passes if result.params.get("graph") != "decoder"]
    build_graph(source, pair, "encoder", options.graphs.get("encoder", "int8"))
    graph = pair.graphs()["encoder"]
    files[graph["file"]] = save(pair.encoder)
    settings = {"encoder": "onnx", "prefix": pair.session["prefix"]["from"]}
    return settings, graph, pair.passes, requires(pair.encoder)
