"""The trunk of every export: the two torch graphs of a captioner → ONNX models with named, dynamic axes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ..runtime.errors import EdgecapError
from ..train.models.keep_16bit import is_large
from ..train.quiet import quiet
from .external import SMALLEST, ExternalData
from .graph import Graph, PassResult, attribute, op_counts
from .tie import tie_embedding

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..train.models import CaptionModel

OPSET_PLAIN, OPSET_ATTENTION = 18, 23  # 23 has Attention, RotaryEmbedding and RMSNormalization
DTYPES = {
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.BOOL: "bool",
}


@dataclass
class OnnxPair:
    """Encoder and decoder as ONNX models, the session roles that wire them, and what was done to them so far.

    external: where the weights of a large captioner are; None: in the models.
    """

    encoder: onnx.ModelProto
    decoder: onnx.ModelProto
    session: dict[str, Any]
    passes: list[PassResult]
    external: ExternalData | None = None

    def copy(self) -> OnnxPair:
        models = []
        external = None if self.external is None else ExternalData(self.external.folder, before=self.external)
        for model in (self.encoder, self.decoder):
            clone = onnx.ModelProto()
            clone.CopyFrom(model)
            if external is not None:
                external.own(clone)
            models.append(clone)
        return OnnxPair(models[0], models[1], self.session, list(self.passes), external)

    def graphs(self) -> dict[str, Any]:
        """The manifest's "graphs"."""
        return {name: _describe(name, getattr(self, name)) for name in ("encoder", "decoder")}


def to_onnx(
    model: CaptionModel,
    *,
    framed: bool = False,
    scratch: Path | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> OnnxPair:
    """Trace both graphs of a captioner. framed: see `CaptionModel.graphs`. scratch: where files of a large one are
    written when an engine is to read its graphs. `report` is called with 1 and 2 when the first and second are done."""
    pair = model.graphs(framed=framed)
    external = ExternalData(scratch or Path(gettempdir())) if is_large(model) else None
    attention = bool(pair.session.get("kv"))
    opset = OPSET_ATTENTION if attention else OPSET_PLAIN
    encoder = trace(pair.encoder, pair.encoder_inputs, pair.encoder_outputs, OPSET_PLAIN, external)
    report(1)
    decoder = trace(pair.decoder, pair.decoder_inputs, pair.decoder_outputs, opset, external)
    report(2)
    result = PassResult(
        "torch_to_onnx",
        {"opset": {"encoder": OPSET_PLAIN, "decoder": opset}},
        {"encoder_ops": op_counts(encoder), "decoder_ops": op_counts(decoder)},
    )
    return OnnxPair(encoder, decoder, pair.session, [result, tie_embedding(decoder).on("decoder")], external)


def trace(
    module: nn.Module,
    inputs: dict[str, tuple[Tensor, dict[int, str]]],
    outputs: tuple[str, ...],
    opset: int,
    external: ExternalData | None = None,
) -> onnx.ModelProto:
    """One module → a checked ONNX model. inputs: name → (example, axis → name of the dynamic axis). external: where its
    weights go, read from the module whenever a pass asks; a model without them is not checked.

    The exporter folds BatchNorm and padding into the convolutions. Raises EdgecapError where torch cannot export it.
    """
    import torch

    axes = tuple({axis: torch.export.Dim.DYNAMIC for axis in named} for _, named in inputs.values())
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        axes = (axes,)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(example for example, _ in inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=axes,
                external_data=False,
                verbose=False,
            )
            thin = {} if external is None else _put_external(program.model.graph, external)
            model = program.model_proto
    except Exception as error:  # the exporter's own exceptions share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EdgecapError(f"torch cannot export {type(module).__name__} to ONNX: {lines[-1][:200]}") from error
    _clean(model, thin, external)
    _name_axes(model, {name: named for name, (_, named) in inputs.items()})
    if external is None:
        onnx.checker.check_model(model)
    return model


def _put_external(graph: Any, external: ExternalData) -> dict[str, onnx.TensorProto]:
    """Take the larger initializers out of the exporter's graph before that becomes a ModelProto: their thin tensors."""
    import onnx_ir

    thin = {}
    for name, value in graph.initializers.items():
        held = value.const_value
        if held.nbytes >= SMALLEST:
            thin[name] = external.put(name, held.dtype.numpy(), tuple(map(int, held.shape)), held.numpy)
            value.const_value = onnx_ir.tensor(np.zeros(0, np.float32), name=name)
    return thin


def _clean(model: onnx.ModelProto, thin: dict[str, onnx.TensorProto], external: ExternalData | None) -> None:
    """Drop what changes from run to run or names source files: docs, metadata, intermediate shapes. thin: tensors
    whose values are external, in the place of those in the model."""
    model.producer_name, model.producer_version, model.doc_string = "edgecap", "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name = "graph"
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    for items in (graph.node, graph.initializer, graph.input, graph.output):
        for item in items:
            item.doc_string = ""
            del item.metadata_props[:]
    if external is not None:
        external.own(model)
        for tensor in graph.initializer:
            if tensor.name in thin:
                tensor.CopyFrom(thin[tensor.name])
        _fold_casts(model)
    _fold_transposes(model)
    _drop_flat_reshapes(model)
    _rows_of_grid(model)
    _drop_open_masks(model)


def _fold_casts(model: onnx.ModelProto) -> None:
    """Weights that torch keeps in 16 bits, as the float32 that it widens them to."""
    graph = Graph(model)
    for node in list(model.graph.node):
        shape = graph.shape(node.input[0]) if node.op_type == "Cast" else None
        if shape is not None and attribute(node, "to") == onnx.TensorProto.FLOAT:
            widened = partial(np.ndarray.astype, dtype=np.float32)
            graph.set_made(node.output[0], [node.input[0]], shape, widened, np.float32)
            node.output[0] = f"{node.output[0]}_folded"  # now unused
    graph.refresh()
    graph.prune()


def _fold_transposes(model: onnx.ModelProto) -> None:
    """Transpose constants here: the exporter leaves the large ones to the engine, which hides them as weights."""
    graph = Graph(model)
    for node in list(model.graph.node):
        shape = graph.shape(node.input[0]) if node.op_type == "Transpose" else None
        if shape is not None:
            perm = attribute(node, "perm")
            turned = tuple(shape[axis] for axis in perm)
            graph.set_made(node.output[0], [node.input[0]], turned, partial(np.transpose, axes=perm))
            node.output[0] = f"{node.output[0]}_folded"  # now unused
    graph.refresh()
    graph.prune()


def _drop_flat_reshapes(model: onnx.ModelProto) -> None:
    """The exporter flattens the indices of an index_select even where they are a flat graph input."""
    graph = Graph(model)
    flat = {value.name for value in model.graph.input if len(value.type.tensor_type.shape.dim) == 1}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[0] in flat and node.output[0] not in graph.outputs:
            shape = graph.constant(node.input[1])
            if shape is not None and shape.tolist() == [-1]:
                graph.reroute(node.output[0], node.input[0])
    graph.refresh()
    graph.prune()


def _rows_of_grid(model: onnx.ModelProto) -> None:
    """Flatten the last Conv's [N, C, H, W] by way of [N, H, W, C], which costs channels-last engines nothing."""
    graph = Graph(model)
    for node in list(model.graph.node):
        reshape = graph.producer.get(node.input[0]) if node.op_type == "Transpose" else None
        if reshape is None or reshape.op_type != "Reshape" or graph.only_reader(node.input[0]) is None:
            continue
        shape = graph.constant(reshape.input[1])
        source = graph.producer.get(reshape.input[0])
        while source is not None and source.op_type in ("Clip", "Relu", "Add"):
            source = graph.producer.get(source.input[0])
        if source is None or source.op_type != "Conv" or shape is None or attribute(node, "perm") != [0, 2, 1]:
            continue
        rows = graph.set_constant(f"{node.output[0]}_shape", np.array([0, -1, shape[1]], np.int64))
        last = f"{node.output[0]}_channels_last"
        new = [
            onnx.helper.make_node("Transpose", [reshape.input[0]], [last], name=f"{last}_transpose", perm=[0, 2, 3, 1]),
            onnx.helper.make_node("Reshape", [last, rows], [node.output[0]], name=f"{last}_reshape"),
        ]
        graph.replace([reshape, node], new)
        graph.prune()


def _drop_open_masks(model: onnx.ModelProto) -> None:
    """transformers masks attention whenever it is exported, even where every place sees every other: drop the mask that
    hides nothing, and behind it torch's guard against rows that are hidden altogether."""
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type == "Where" and _all_true(graph, node.input[0]):
            for add in graph.consumers.get(node.output[0], []):
                scores = [name for name in add.input if name != node.output[0]]
                added = graph.constant(node.input[1])
                if add.op_type == "Add" and len(scores) == 1 and added is not None and not added.any():
                    graph.reroute(add.output[0], scores[0])
                    graph.refresh()
                    _drop_guard(graph, scores[0])
    graph.refresh()
    graph.prune()


def _all_true(graph: Graph, name: str) -> bool:
    while (node := graph.producer.get(name)) is not None and node.op_type == "Expand":
        name = node.input[0]
    value = graph.constant(name)
    return value is not None and value.dtype == bool and bool(value.all())


def _drop_guard(graph: Graph, scores: str) -> None:
    """Where(IsNaN(p), 0, p) → p, for p the Softmax of `scores`."""
    for softmax in [node for node in graph.consumers.get(scores, []) if node.op_type == "Softmax"]:
        shares = softmax.output[0]
        for test in [node for node in graph.consumers.get(shares, []) if node.op_type == "IsNaN"]:
            for guard in graph.consumers.get(test.output[0], []):
                if guard.op_type == "Where" and guard.input[2] == shares:
                    graph.reroute(guard.output[0], shares)
                    graph.refresh()


def _name_axes(model: onnx.ModelProto, names: dict[str, dict[int, str]]) -> None:
    """Give the exporter's symbols (s27) the names the model gave its axes."""
    known: dict[str, str] = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis in names.get(value.name, {}):
                if dim.dim_param:
                    known.setdefault(dim.dim_param, names[value.name][axis])
                dim.dim_param = names[value.name][axis]
    for value in model.graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = known.get(dim.dim_param, f"{value.name}_{axis}")


def _describe(name: str, model: onnx.ModelProto) -> dict[str, Any]:
    return {
        "file": f"{name}.onnx",
        "inputs": {value.name: _tensor(value) for value in model.graph.input},
        "outputs": {value.name: _tensor(value) for value in model.graph.output},
    }


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return {"dtype": DTYPES[kind.elem_type], "shape": shape}
