"""Products without operators beside them, against the graph as torch's exporter wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgecap.export import onnx_fp32, onnx_int8, onnx_quantized
from edgecap.export.artifact import Source
from edgecap.export.gelu import fuse_gelus
from edgecap.export.graph import Graph, op_counts
from edgecap.export.int8_matmul import matmul_statistics, quantize_matmuls
from edgecap.export.products import fuse_products, unflatten_products
from edgecap.export.trunk import trace

from . import nets
from .nets import engine, run
from .small_source import cosine, forced_logits, small_source


class Conv1D(nn.Module):
    """GPT-2's: rows flattened, a product with its bias, and back."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, outputs) / width**0.5),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.reshape(*x.shape[:-1], len(self.bias))


class Block(nn.Module):
    """A feed-forward block as GPT-2 spells it: 0.5 · x · (1 + tanh(…))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), Conv1D(32, 64), Conv1D(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.norm(x))
        gelu = 0.5 * h * (1 + torch.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * torch.pow(h, 3.0))))
        return x + self.down(gelu)


ROWS = np.random.default_rng(0).normal(size=(3, 5, 32)).astype(np.float32)


@pytest.fixture
def block() -> tuple[onnx.ModelProto, np.ndarray]:
    torch.manual_seed(0)
    net = Block().eval()
    model = trace(net, {"x": (torch.from_numpy(ROWS), {0: "rows", 1: "length"})}, ("y",), 23)
    return model, net(torch.from_numpy(ROWS)).detach().numpy()


def test_flattened_products_become_plain_ones(block: tuple[onnx.ModelProto, np.ndarray]) -> None:
    model, wanted = block
    assert op_counts(model)["Gemm"] == 2
    assert unflatten_products(model).cost == {"products": 2}
    assert unflatten_products(model).cost == {"products": 0}
    assert fuse_gelus(model).cost == {"fused": 1}
    onnx.checker.check_model(model)
    ops = op_counts(model)
    assert "Gemm" not in ops and "Reshape" not in ops and "Tanh" not in ops and ops["MatMul"] == 2
    np.testing.assert_allclose(run(model, {"x": ROWS})[0], wanted, rtol=1e-4, atol=1e-4)


def test_one_scale_and_its_bias_are_one_operator(block: tuple[onnx.ModelProto, np.ndarray], tmp_path: Path) -> None:
    model, wanted = block
    unflatten_products(model)
    known = matmul_statistics(model)
    for each in ROWS:
        known.add({"x": each[None]})
    assert quantize_matmuls(model, known).cost == {"per_tensor": 2, "per_token": 0}
    assert fuse_products(model).cost == {"products": 2, "biases": 2}
    onnx.checker.check_model(model)
    assert cosine(run(model, {"x": ROWS})[0].reshape(-1, 32), wanted.reshape(-1, 32)) > 0.9995
    engine(model, save=tmp_path / "a")
    ops = op_counts(onnx.load(tmp_path / "a"))
    assert ops["MatMulIntegerToFloat"] == ops["QuantizeLinear"] == 2 and "DequantizeLinear" not in ops
    alone = np.concatenate([run(model, {"x": each[None]})[0] for each in ROWS])
    np.testing.assert_array_equal(run(model, {"x": ROWS})[0], alone)


def test_rows_that_are_not_alike_keep_scales_of_their_own(block: tuple[onnx.ModelProto, np.ndarray]) -> None:
    """The inputs of `down` are as loud as x is far from its mean; behind the normalization all rows are alike."""
    model, _ = block
    unflatten_products(model)
    graph = Graph(model)
    loud = graph.set_constant("loudness", np.array([1, 1, 1, 1, 100], np.float32)[:, None])
    (down,) = (node for node in graph.graph.node if node.op_type == "MatMul" and graph.shape(node.input[1]) == (64, 32))
    graph.replace([down], [
        onnx.helper.make_node("Mul", [down.input[0], loud], ["louder"], name="louder"),
        onnx.helper.make_node("MatMul", ["louder", down.input[1]], list(down.output), name=down.name),
    ])  # fmt: skip
    wanted = run(model, {"x": ROWS})[0]
    known = matmul_statistics(model)
    known.add({"x": ROWS})
    assert quantize_matmuls(model, known).cost == {"per_tensor": 1, "per_token": 1}
    assert fuse_products(model).cost == {"products": 2, "biases": 1}
    rows = [run(model, {"x": ROWS})[0][:, place] for place in (0, 4)]
    assert min(cosine(ours, wanted[:, place]) for ours, place in zip(rows, (0, 4), strict=True)) > 0.9995


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_language_model_on_one_scale(kind: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_quantized, "STREAMED", 0)
    monkeypatch.setitem(nets.DECODERS, kind, {**nets.DECODERS[kind], "dim": 64})
    source: Source = small_source(tmp_path, kind)
    wanted = onnx_fp32.build(source)
    ops = op_counts(onnx.load_from_string(wanted.files["decoder.onnx"]))
    if kind == "gpt2":
        assert ops["Gemm"] == 1 and ops["FastGelu"] == 2  # the output layer's, of one row a caption
    made = onnx_int8.build(source)
    costs = {each.name: each.cost for each in made.passes if each.params.get("graph") == "decoder"}
    layers = costs["int8_matmul"]["per_tensor"]
    assert layers == 9 if kind == "gpt2" else layers > 8
    assert costs["int8_matmul"]["per_token"] == 0
    assert cosine(forced_logits(source, made), forced_logits(source, wanted)) > 0.999
