"""A captioner's two graphs as torch's own exporter writes them, quantized by the tools that come with the engines: what
a person has without edgecap, whose trunk, passes and calibration have no part in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...runtime.errors import EdgecapError

if TYPE_CHECKING:
    from ...train.models import CaptionModel

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"


class Step(nn.Module):
    """A recurrent decoder's step as its module computes it; edgecap's own graph has fewer and larger products."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        decoder: Any = self.decoder
        ids, photo, grid, *state = inputs
        named = dict(zip(decoder.states, state, strict=True))
        logits, after = decoder.advance(ids, photo, {"grid": grid}, named)
        return logits, *(after[name] for name in decoder.states)


def export(model: CaptionModel, folder: Path) -> dict[str, Any]:
    """Write both graphs in float32, with the exporter's own opset; {"session", "graphs"} as in a bundle's manifest."""
    pair = model.graphs()
    decoder = Step(model.decoder).eval() if hasattr(model.decoder, "graph_form") else pair.decoder
    graphs = {}
    for name, module, inputs, outputs in (
        ("encoder", pair.encoder, pair.encoder_inputs, pair.encoder_outputs),
        ("decoder", decoder, pair.decoder_inputs, pair.decoder_outputs),
    ):
        place = folder / f"{name}.onnx"
        axes: Any = tuple({axis: torch.export.Dim.DYNAMIC for axis in named} for _, named in inputs.values())
        if name == "decoder":  # its forward takes *inputs
            axes = (axes,)
        try:
            with torch.no_grad():
                torch.onnx.export(
                    module,
                    tuple(example for example, _ in inputs.values()),
                    place,
                    dynamo=True,
                    input_names=list(inputs),
                    output_names=list(outputs),
                    dynamic_shapes=axes,
                    verbose=False,
                )
        except Exception as error:  # the exporter's own exceptions share no base class
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EdgecapError(f"torch.onnx.export cannot export the {name}: {lines[-1][:200]}") from None
        dtypes = {key: str(example.dtype).removeprefix("torch.") for key, (example, _) in inputs.items()}
        graphs[name] = {"file": place.name, "inputs": {key: {"dtype": kind} for key, kind in dtypes.items()}}
    return {"session": pair.session, "graphs": graphs}


def readable(source: Path) -> Any:
    """A graph that the quantizers can take: they fail on the intermediate shapes the exporter notes, and where they
    turn a Gemm's weights around, they break what else reads these, as word embeddings do: it gets its own."""
    import onnx

    model = onnx.load(source)
    graph = model.graph
    del graph.value_info[:]
    readers = [name for node in graph.node for name in node.input]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gemm" and node.input[1] in weights and readers.count(node.input[1]) > 1:
            own = onnx.TensorProto()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{own.name}/{node.name}"
            graph.initializer.append(own)
    return model


def dynamic_int8(source: Path, place: Path) -> None:
    """ONNX Runtime's quantize_dynamic as it comes, for products and word embeddings: convolutions stay in float32,
    which it makes several times slower, and its documentation does not recommend it for them."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(readable(source), place, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gather"])


def four_bits(source: Path, place: Path, block: int = 32) -> None:
    """ONNX Runtime's MatMulNBits quantizer; products with a bias are taken apart first, or it leaves them."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(readable(source))
    wrapped.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(wrapped.model, bits=4, block_size=block, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(place), use_external_data_format=False)
