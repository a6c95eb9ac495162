"""OpenVINO's graphs: the ONNX trunk converted, its weights compressed, and made stateful where there is a KV cache."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ..runtime.errors import EdgecapError
from .artifact import Artifact, Source
from .external import external_of
from .graph import Graph, PassResult, save, split_to
from .int8_static import quantize_static
from .onnx_quantized import raised_layers, statistics
from .pixels import fold_pixels
from .statistics import layers_of

if TYPE_CHECKING:
    import nncf
    import openvino as ov

REQUIRES = {"openvino": "2025.0"}  # the oldest that gives the same logits; 2024.6 cannot load the KV caches
GROUP, SMALLEST_GROUP = 64, 8  # weights that share one scale at 4 bits; fewer where the layer's width is no multiple
BEAM_IDX = "beam_idx"


def build(source: Source, precision: str) -> Artifact:
    """Both graphs as OpenVINO IR at "fp32", "fp16", "int8" or "int4" (or what `source.options.graphs` says for one).

    A convolutional encoder is quantized with its activations, everything else in its weights only: at batch 1 the rest
    waits for memory, and weights alone cost next to no accuracy. Raises EdgecapError where a graph cannot be converted.
    """
    pair = source.trunk()
    kv = pair.session.get("kv", [])
    session = {key: value for key, value in pair.session.items() if key != "kv"}
    session |= {"beam_idx": BEAM_IDX} if kv else {}
    artifact = Artifact({}, pair.graphs(), session, dict(REQUIRES), list(pair.passes))
    for name in ("encoder", "decoder"):
        at = source.options.graphs.get(name, precision)
        model, passes = _at_precision(source, name, getattr(pair, name), at)
        if name == "decoder" and kv:
            passes.append(make_stateful(model, kv))
        artifact.passes += [result.on(name) for result in passes]
        artifact.files |= _serialize(model, source.scratch / name, half=at != "fp32")
        ports = _ports(artifact.graphs[name], kv if name == "decoder" else [])
        artifact.graphs[name] = {"file": f"{name}.xml", "weights": f"{name}.bin", **ports}
    return artifact


def _at_precision(
    source: Source, name: str, graph: onnx.ModelProto, precision: str
) -> tuple[ov.Model, list[PassResult]]:
    passes = []
    raised = raised_layers(source.options, name, precision)
    quantized = precision in ("int8", "int4")
    convolutional = name == "encoder" and is_convolutional(graph)
    if quantized and convolutional:
        # At 4 bits, too: there is no fast convolution for less, and nothing that ran slower would be worth the bytes.
        raised = {node: wanted for node, wanted in raised.items() if wanted == "fp32"}
        passes.append(fold_pixels(graph))
        passes.append(quantize_static(graph, statistics(source, name), precision=raised))
        _quantize_pixels(graph)
        _float_biases(graph)
    model = convert(graph, source.scratch / f"{name}.onnx")
    passes.append(share_embedding(model))
    if quantized and not convolutional:
        passes.append(compress_weights(model, 8 if precision == "int8" else 4, raised))
    if precision == "fp16":
        passes.append(PassResult("fp16_weights"))
    return model, passes


def is_convolutional(graph: onnx.ModelProto) -> bool:
    """Whether most of a graph's weights belong to convolutions."""
    sizes = {True: 0, False: 0}
    for layer in layers_of(Graph(graph)):
        sizes[layer.node.op_type == "Conv"] += layer.size
    return sizes[True] > sizes[False]


def _quantize_pixels(graph: onnx.ModelProto) -> None:
    """Say once more that the dequantized pixels have 256 steps: only then does the first convolution run in int8."""
    index = Graph(graph)
    for node in list(graph.graph.node):
        if node.op_type == "DequantizeLinear" and node.name == "pixels_dequantize":
            real, scale, zero = node.output[0], node.input[1], node.input[2]
            index.reroute(real, "pixels_again")
            new = [
                onnx.NodeProto.FromString(node.SerializeToString()),
                onnx.helper.make_node("QuantizeLinear", [real, scale, zero], ["pixels_whole"], name="pixels_quantize"),
                onnx.helper.make_node(
                    "DequantizeLinear", ["pixels_whole", scale, zero], ["pixels_again"], name="pixels_dequantize_again"
                ),
            ]
            index.replace([node], new)


def _float_biases(graph: onnx.ModelProto) -> None:
    """Biases as plain numbers: OpenVINO adds them as floats and would store three nodes for each int32 one."""
    index = Graph(graph)
    for node in list(graph.graph.node):
        whole = index.constant(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if whole is not None and whole.dtype == np.int32:
            real = (whole * index.constant(node.input[1])).astype(np.float32)
            index.reroute(node.output[0], index.set_constant(f"{node.output[0]}_float", real))
    index.refresh()
    index.prune()


def convert(graph: onnx.ModelProto, scratch: Path) -> ov.Model:
    """ONNX → OpenVINO, by way of the file `scratch`. Raises EdgecapError where OpenVINO cannot."""
    import openvino as ov

    if external_of(graph) is not None:
        scratch.write_bytes(split_to(graph, scratch.with_suffix(".weights")))
    else:
        scratch.write_bytes(save(graph))
    try:
        return ov.convert_model(scratch)
    except Exception as error:  # a family of exceptions without a common base
        reason = " ".join(str(error).split())[:200]
        raise EdgecapError(f"OpenVINO {ov.__version__} cannot convert the {scratch.stem} graph: {reason}") from error


def share_embedding(model: ov.Model) -> PassResult:
    """Let a Gather of columns [dim, vocab] read rows of the output layer's weights instead.

    OpenVINO turns those to [vocab, dim], which would leave the tied embedding there twice.
    """
    from openvino import opset13 as ops

    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    tables = [op for op in constants if op.get_output_partial_shape(0).rank.get_length() == 2]
    shared = 0
    for gather in [op for op in model.get_ordered_ops() if op.get_type_name() == "Gather"]:
        columns = gather.input_value(0).get_node()
        readers = [port.get_node() for port in gather.output(0).get_target_inputs()]
        if columns.get_type_name() != "Constant" or [op.get_type_name() for op in readers] != ["Transpose"]:
            continue
        rows = [op for op in tables if op.data.shape == columns.data.shape[::-1]]
        rows = [op for op in rows if np.array_equal(op.data.T, columns.data)]
        if rows:
            fetched = ops.gather(rows[0], gather.input_value(1), ops.constant(np.int64(0)))
            fetched.set_friendly_name(readers[0].get_friendly_name())
            readers[0].output(0).replace(fetched.output(0))
            shared += 1
    return PassResult("share_embedding", cost={"shared": shared})


def compress_weights(model: ov.Model, bits: int, raised: Mapping[str, str]) -> PassResult:
    """Store the weights of matrix products and embeddings at 8 bits per channel or 4 bits per group, symmetric.

    raised: layers that stay at "int8" or "fp32". Activations are float.
    """
    import nncf

    params: dict[str, Any] = {"weights": f"int{bits} symmetric", "raised": dict(sorted(raised.items()))}
    with _quiet():
        if bits == 4:
            params["group"] = GROUP
            nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_SYM,
                group_size=GROUP,
                all_layers=True,
                ignored_scope=_without(raised),
                advanced_parameters=nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=SMALLEST_GROUP
                ),
            )
        if bits == 8 or "int8" in raised.values():
            fp32 = [node for node, wanted in raised.items() if wanted == "fp32"]
            nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=_without(fp32))
    return PassResult("compress_weights", params)


def _without(nodes: Iterable[str]) -> nncf.IgnoredScope | None:
    import nncf

    return nncf.IgnoredScope(names=sorted(nodes), validate=False) if nodes else None


def make_stateful(model: ov.Model, kv: Sequence[dict[str, Any]]) -> PassResult:
    """Keep the KV cache inside: a new input `beam_idx` [rows] says which row of the last call each row continues."""
    import openvino as ov
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = ops.parameter([-1], ov.Type.i32, name=BEAM_IDX)
    beam.output(0).get_tensor().set_names({BEAM_IDX})
    model.add_parameters([beam])
    for entry in kv:
        past = model.input(entry["input"])
        readers = past.get_target_inputs()
        chosen = ops.gather(past, beam, ops.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    apply_make_stateful_transformation(model, {entry["input"]: entry["output"] for entry in kv})
    sizes = {(entry["heads"], entry["dim"]) for entry in kv}
    rows = ops.shape_of(beam, output_type="i64")
    empty = {}
    for heads, dim in sorted(sizes):  # what the cache holds after a reset: [rows, heads, 0, dim]
        shape = ops.concat([rows, ops.constant(np.array([heads, 0, dim], np.int64))], 0)
        empty[heads, dim] = ops.broadcast(ops.constant(np.float32(0)), shape)
    for op in model.get_ordered_ops():
        if op.get_type_name() == "ReadValue":
            shape = op.get_output_partial_shape(0)
            op.set_arguments([empty[shape[1].get_length(), shape[3].get_length()].output(0)])
    model.validate_nodes_and_infer_types()
    return PassResult("stateful", {"states": len(kv), "reordered_by": BEAM_IDX})


def _serialize(model: ov.Model, scratch: Path, *, half: bool) -> dict[str, bytes]:
    """The .xml and .bin of a model, without versions, paths and parameters of the conversion, and without indentation.

    Layers are named by type and place: OpenVINO names what it adds by counting everything the process ever converted.
    half: float weights that are left are stored as fp16; they are widened when the graph is compiled.
    """
    import openvino as ov

    path = scratch.with_suffix(".xml")
    ov.save_model(model, path, compress_to_fp16=half)
    text = path.read_bytes()
    text = re.sub(rb"\n\t<rt_info>.*?\n\t</rt_info>", b"", text, flags=re.DOTALL)  # the model's, not the layers' own
    text = re.sub(rb"\n\t*", b"\n", text)
    named = rb'<layer id="(\d+)" name="[^"]*" type="(?!Parameter"|Result")(\w+)"'
    text = re.sub(named, rb'<layer id="\1" name="\2_\1" type="\2"', text)
    return {path.name: text, f"{scratch.name}.bin": path.with_suffix(".bin").read_bytes()}


def _ports(graph: dict[str, Any], kv: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's "inputs" and "outputs": the ONNX graph's, with the cache kept inside."""
    gone = {entry[role] for entry in kv for role in ("input", "output")}
    ports = {role: {k: v for k, v in graph[role].items() if k not in gone} for role in ("inputs", "outputs")}
    if kv:
        ports["inputs"][BEAM_IDX] = {"dtype": "int32", "shape": ["rows"]}
    return ports


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF tells what it does in tables and progress bars; the bundle's lineage has it."""
    import nncf

    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        nncf.set_log_level(level)
