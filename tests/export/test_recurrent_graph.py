"""The recurrent decoders' graph: few operations, all of its matrices in int8, and a state that is not rounded."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edgecap.export.graph import Graph, save
from edgecap.export.int8_embedding import quantize_embeddings
from edgecap.export.int8_static import quantize_static
from edgecap.export.tie import tie_embedding
from edgecap.export.trunk import trace
from edgecap.train.models.gru import GRUDecoder
from edgecap.train.models.lstm import LSTMDecoder
from edgecap.train.models.recurrent import RecurrentDecoder

from .nets import calibrate

HEADS, CELLS, SIZE, HIDDEN, VOCAB = 2, 6, 8, 24, 40


@pytest.fixture(scope="module", params=[GRUDecoder, LSTMDecoder])
def decoder(request: pytest.FixtureRequest) -> RecurrentDecoder:
    torch.manual_seed(0)
    decoder = request.param(HEADS * SIZE, VOCAB, hidden=HIDDEN, embed=16, heads=HEADS).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.normal_()
    return decoder


@pytest.fixture(scope="module")
def traced(decoder: RecurrentDecoder) -> onnx.ModelProto:
    model = trace(decoder.graph_form(), decoder.graph_inputs(CELLS), decoder.graph_outputs, 18)
    assert tie_embedding(model).cost["changed"]
    return model


def feeds(decoder: RecurrentDecoder, seed: int, rows: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(0, VOCAB, rows),
        "photo": rng.integers(0, 2, rows),
        "grid": rng.normal(size=(2, HEADS, CELLS, SIZE)).astype(np.float32),
        **{name: np.tanh(rng.normal(size=(rows, HIDDEN))).astype(np.float32) for name in decoder.states},
    }


def engine(model: onnx.ModelProto, optimized: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = optimized
    return ort.InferenceSession(save(model), options, providers=["CPUExecutionProvider"])


def test_the_graph_is_one_step_of_the_decoder(decoder: RecurrentDecoder, traced: onnx.ModelProto) -> None:
    """Against the step that training takes; what every token costs is bounded by the number of operations."""
    feed = feeds(decoder, 1)
    with torch.no_grad():
        state = {name: torch.from_numpy(feed[name]) for name in decoder.states}
        grid = {"grid": torch.from_numpy(feed["grid"])}
        logits, after = decoder.advance(torch.from_numpy(feed["ids"]), torch.from_numpy(feed["photo"]), grid, state)
    got, *states = engine(traced).run(list(decoder.graph_outputs), feed)
    np.testing.assert_allclose(got, logits.numpy(), atol=1e-4)
    for name, state in zip(decoder.states, states, strict=True):
        np.testing.assert_allclose(state, after[name].numpy(), atol=1e-5)
    assert len(traced.graph.node) <= 34


@pytest.mark.parametrize("by_rows", [False, True])
def test_all_matrices_run_in_int8(decoder: RecurrentDecoder, traced: onnx.ModelProto, tmp_path, by_rows: bool) -> None:
    """What is behind a rank-2 product decides whether ONNX Runtime finds an int8 kernel for it at all."""
    model = onnx.ModelProto.FromString(save(traced))
    quantize_static(model, calibrate(model, [feeds(decoder, seed, rows=16) for seed in range(8)]))
    result = quantize_embeddings(model, by_rows=by_rows)
    assert result.cost == {"shared_with_output_layer": 1, "rounded": 0}
    session = engine(model, str(tmp_path / "optimized.onnx"))
    optimized = Graph(onnx.load(str(tmp_path / "optimized.onnx")))
    ops = [node.op_type for node in optimized.graph.node]
    assert ops.count("MatMulIntegerToFloat") == 4 and "Gemm" not in ops
    float_weights = [
        name
        for node in optimized.graph.node
        if "MatMul" in node.op_type
        for name in node.input
        if name in optimized.initializers and (value := optimized.constant(name)).ndim == 2 and value.dtype != np.int8
    ]
    assert not float_weights

    feed = feeds(decoder, 99)
    names = list(decoder.graph_outputs)
    (exact, *_), (rounded, *states) = engine(traced).run(names, feed), session.run(names, feed)
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosine.min() > 0.99
    for state in states:
        assert len(np.unique(state)) > 0.95 * state.size  # int8 would leave fewer, all multiples of one step
