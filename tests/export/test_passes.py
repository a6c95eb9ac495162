"""Each pass alone: what it leaves in the graph, and that the graph still computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgecap.export.graph import Graph, attribute, op_counts, save
from edgecap.export.half import store_half
from edgecap.export.int8_embedding import quantize_embeddings
from edgecap.export.int8_static import quantize_static
from edgecap.export.pixels import fold_pixels
from edgecap.export.rounding import PAIR_LIMIT, worst_pair
from edgecap.export.statistics import layers_of
from edgecap.export.tie import tie_embedding
from edgecap.export.trunk import trace

from .nets import SIZE, SmallNet, calibrate, engine, photos, run


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


@pytest.fixture(scope="module")
def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture(scope="module")
def traced(net: SmallNet) -> onnx.ModelProto:
    pixels = torch.from_numpy(photos(2))
    return trace(net, {"pixels": (pixels, {0: "batch"})}, ("grid",), 18)


def test_the_trace_equals_torch_and_has_padding_and_batchnorm_folded(net: SmallNet, traced: onnx.ModelProto) -> None:
    pixels = photos(3, seed=1)
    with torch.no_grad():
        wanted = net(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(run(traced, {"pixels": pixels})[0], wanted, atol=2e-5)
    ops = op_counts(traced)
    assert "Pad" not in ops and "BatchNormalization" not in ops and ops["Conv"] == 4
    first = next(node for node in traced.graph.node if node.op_type == "Conv")
    assert attribute(first, "pads") == [0, 0, 1, 1]
    assert [dim.dim_param for dim in traced.graph.output[0].type.tensor_type.shape.dim][0] == "batch"
    flat = traced.graph.node[-1]
    assert flat.op_type == "Reshape"  # through channels-last


def test_pixels_become_the_first_layers_quantized_input(traced: onnx.ModelProto) -> None:
    model = copy(traced)
    result = fold_pixels(model)
    assert result.cost["changed"] and result.params["zero_point"] in (127, 128)
    ops = op_counts(model)
    assert not {"Cast", "Div", "Mul", "Sub"} & set(ops) and ops["DequantizeLinear"] == 1
    pixels = photos(2)
    before, after = run(traced, {"pixels": pixels})[0], run(model, {"pixels": pixels})[0]
    # Half a grey level at the padded border, exact inside.
    assert np.abs(after - before).max() < 0.05
    grid = (after - before).reshape(2, SIZE // 2, SIZE // 2, -1)
    assert np.abs(grid[:, 1:-3, 1:-3]).max() < 1e-4


def test_a_graph_without_that_beginning_is_left_alone() -> None:
    model = trace(nn.Linear(4, 3), {"x": (torch.randn(2, 4), {0: "rows"})}, ("y",), 18)
    before = save(model)
    assert not fold_pixels(model, "x").cost["changed"]
    assert save(model) == before


@pytest.fixture(scope="module")
def quantized(traced: onnx.ModelProto) -> onnx.ModelProto:
    model = copy(traced)
    fold_pixels(model)
    quantize_static(model, calibrate(model, [{"pixels": each[None]} for each in photos(12)]))
    return model


def test_int8_is_qdq_per_channel_with_nothing_left_between(quantized: onnx.ModelProto, tmp_path) -> None:
    graph = Graph(quantized)
    ops = op_counts(quantized)
    assert not {"Clip", "Relu", "Cast", "Pad"} & set(ops)
    for conv in (node for node in quantized.graph.node if node.op_type == "Conv"):
        source, weights, bias = (graph.producer[name] for name in conv.input)
        assert {source.op_type, weights.op_type, bias.op_type} == {"DequantizeLinear"}
        whole = graph.constant(weights.input[0])
        assert whole.dtype == np.int8 and graph.constant(weights.input[1]).shape == (whole.shape[0],)
        assert attribute(weights, "axis") == 0
        assert graph.constant(source.input[2]).dtype == np.uint8
        assert graph.constant(bias.input[0]).dtype == np.int32
        if attribute(conv, "group") == 1:
            assert worst_pair(whole.reshape(len(whole), -1)) <= PAIR_LIMIT
    first = graph.consumers["pixels_real"]
    assert [node.op_type for node in first] == ["Conv"]  # no second quantization of the pixels
    session = engine(quantized, save=tmp_path / "fused.onnx")
    fused = op_counts(onnx.load(tmp_path / "fused.onnx"))
    assert fused == {"DequantizeLinear": 1, "QLinearAdd": 1, "QLinearConv": 4, "Reshape": 1}
    assert session.run(None, {"pixels": photos(1)})[0].shape == (1, (SIZE // 2) ** 2, 24)


def test_int8_computes_the_same_thing_in_batches_and_alone(quantized: onnx.ModelProto) -> None:
    pixels = photos(4, seed=5)
    session = engine(quantized)
    together = session.run(None, {"pixels": pixels})[0]
    alone = np.concatenate([session.run(None, {"pixels": each[None]})[0] for each in pixels])
    np.testing.assert_array_equal(together, alone)


def test_int8_follows_the_float_graph(traced: onnx.ModelProto, quantized: onnx.ModelProto) -> None:
    """Only that it is the same function: how close int8 comes is measured on trained nets, by the gate."""
    pixels = photos(8, seed=5)
    a, b = (run(model, {"pixels": pixels})[0].ravel() for model in (traced, quantized))
    assert np.corrcoef(a, b)[0, 1] > 0.9


def test_quantization_is_reproducible(traced: onnx.ModelProto) -> None:
    files = []
    for _ in range(2):
        model = copy(traced)
        fold_pixels(model)
        quantize_static(model, calibrate(model, [{"pixels": each[None]} for each in photos(3)]))
        files.append(save(model))
    assert files[0] == files[1]


class Tied(nn.Module):
    """A table of words that is also the output layer, with a batch of ids [rows, 1]."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, dim)
        self.mix = nn.Linear(dim, dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.mix(self.words(ids.unsqueeze(1)))), self.words.weight).squeeze(1)


@pytest.mark.parametrize("vocab", [50, 3000], ids=["folded by the exporter", "left as Transpose by it"])
def test_a_tied_embedding_is_stored_once(vocab: int) -> None:
    torch.manual_seed(0)
    module = Tied(vocab, 32).eval()
    ids = torch.tensor([3, 1, 4])
    model = trace(module, {"ids": (ids, {0: "rows"})}, ("logits",), 18)
    result = tie_embedding(model)
    assert result.cost == {"changed": True, "saved_parameters": vocab * 32}
    feeds = {"ids": np.array([7, 0, 7, 49])}
    with torch.no_grad():
        wanted = module(torch.from_numpy(feeds["ids"])).numpy()
    np.testing.assert_allclose(run(model, feeds)[0], wanted, atol=1e-5)
    assert len(save(model)) < 4 * (vocab * 32 + 32 * 33) + 3000

    quantize_static(model, calibrate(model, [{"ids": np.arange(i, i + 8)} for i in range(0, 40, 8)]))
    before = run(model, feeds)[0]
    assert quantize_embeddings(model).cost == {"shared_with_output_layer": 1, "rounded": 0}
    np.testing.assert_allclose(run(model, feeds)[0], before, atol=1e-6)
    tables = [t for t in model.graph.initializer if sorted(t.dims) == [32, vocab]]
    assert [numpy_helper.to_array(t).dtype for t in tables] == [np.int8]
    assert np.abs(before - wanted).max() < 0.05 * np.abs(wanted).max()


def test_an_untied_embedding_is_rounded_on_its_own() -> None:
    module = nn.Embedding(40, 16)
    model = trace(module, {"ids": (torch.tensor([[1, 2]]), {0: "rows"})}, ("words",), 18)
    assert not tie_embedding(model).cost["changed"]
    assert quantize_embeddings(model).cost == {"shared_with_output_layer": 0, "rounded": 1}
    ids = np.array([[5, 39], [0, 0]])
    wanted = module.weight.detach().numpy()[ids]
    np.testing.assert_allclose(run(model, {"ids": ids})[0], wanted, atol=np.abs(wanted).max() / 127)


def test_half_weights_halve_the_file_and_hardly_change_it(traced: onnx.ModelProto) -> None:
    model = copy(traced)
    result = store_half(model)
    assert result.cost["tensors"] >= 3 and result.cost["worst_relative_rms"] < 1e-3
    pixels = photos(2)
    before, after = run(traced, {"pixels": pixels})[0], run(model, {"pixels": pixels})[0]
    assert after.dtype == np.float32 and 0 < np.abs(after - before).max() < 0.02
    big = [t for t in model.graph.initializer if np.prod(t.dims) >= 64]
    assert {t.data_type for t in big} == {TensorProto.FLOAT16}


def test_weights_beyond_half_stay_float32() -> None:
    weights = numpy_helper.from_array(np.full((8, 8), 1e6, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert store_half(model).cost == {"tensors": 0, "kept_fp32": 1, "worst_relative_rms": 0.0}
    assert run(model, {"x": np.ones((1, 8), np.float32)})[0][0, 0] == pytest.approx(8e6)


def test_a_layer_kept_float_is_not_quantized_by_the_engine(traced: onnx.ModelProto, tmp_path) -> None:
    """ONNX Runtime quantizes float weights between quantized tensors when it loads a graph, with one scale for all."""
    model = copy(traced)
    fold_pixels(model)
    kept = [layer.node.name for layer in layers_of(Graph(model)) if layer.pointwise][0]
    known = calibrate(model, [{"pixels": each[None]} for each in photos(6)])
    quantize_static(model, known, precision={kept: "fp32"})
    engine(model, save=tmp_path / "loaded.onnx")
    ops = op_counts(onnx.load(tmp_path / "loaded.onnx"))
    assert ops["QLinearConv"] == 3 and ops.get("Conv", 0) + ops.get("FusedConv", 0) == 1
