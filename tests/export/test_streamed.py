"""What ONNX Runtime's language models get: merged projections, fused residuals, int8 per-token. Against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgecap.export import onnx_fp32, onnx_int4, onnx_int8, onnx_quantized
from edgecap.export.artifact import Source
from edgecap.export.graph import Graph, op_counts
from edgecap.export.int8_embedding import quantize_embeddings
from edgecap.export.int8_matmul import quantize_matmuls
from edgecap.export.int8_static import quantize_static
from edgecap.export.merge import merge_projections
from edgecap.export.residual_norms import fuse_residual_norms
from edgecap.export.tie import tie_embedding
from edgecap.export.trunk import trace

from . import nets
from .nets import calibrate, engine, run
from .small_source import cosine, forced_logits, small_source


class Block(nn.Module):
    """Three projections of one tensor (with biases or without), two of another, a tied embedding, residuals."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.norms = nn.ModuleList(nn.RMSNorm(32, eps=1e-5) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(32, width, bias=bias) for width in (32, 16, 16))
        self.ffn = nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(2))
        self.down, self.head_bias = nn.Linear(48, 32, bias=bias), nn.Parameter(torch.randn(40))
        for norm in self.norms:
            norm.weight.data.uniform_(0.5, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        q, k, v = (each(x) for each in self.qkv)
        x = x + q * torch.cat((k, v), -1)
        gate, up = (each(self.norms[0](x)) for each in self.ffn)
        x = self.norms[1](x + self.down(nn.functional.silu(gate) * up))
        return nn.functional.linear(x, self.words.weight, self.head_bias)


IDS = np.random.default_rng(0).integers(0, 40, (3, 7))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biased"])
def block(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, np.ndarray]:
    """A decoder's parts as the trunk has them, and torch's logits."""
    torch.manual_seed(0)
    net = Block(request.param).eval()
    model = trace(net, {"ids": (torch.from_numpy(IDS), {0: "rows", 1: "length"})}, ("logits",), 23)
    tie_embedding(model)
    return model, net(torch.from_numpy(IDS)).detach().numpy()


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def test_projections_and_residuals_merge_exactly(block: tuple[onnx.ModelProto, np.ndarray]) -> None:
    model, wanted = copy(block[0]), block[1]
    result = merge_projections(model)
    assert result.cost == {"before": 5, "after": 2}
    assert merge_projections(model).cost == {"before": 0, "after": 0}
    assert fuse_residual_norms(model).cost == {"fused": 2}
    onnx.checker.check_model(model)
    ops = op_counts(model)
    assert ops["Split"] == 2 and ops["SkipSimplifiedLayerNormalization"] == 2 and "RMSNormalization" not in ops
    np.testing.assert_allclose(run(model, {"ids": IDS})[0], wanted, rtol=1e-5, atol=1e-5)


def test_what_is_tied_or_an_output_is_left_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.one(x), self.other(x) * 2

    model = trace(Shared().eval(), {"x": (torch.randn(2, 3, 8), {0: "rows", 1: "length"})}, ("a", "b"), 23)
    assert merge_projections(model).cost["after"] == 0


def test_int8_per_token_in_the_fast_kernels(block: tuple[onnx.ModelProto, np.ndarray], tmp_path: Path) -> None:
    model, wanted = copy(block[0]), block[1]
    merge_projections(model)
    names = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert quantize_matmuls(model).cost == {"per_tensor": 0, "per_token": 4}
    assert quantize_embeddings(model, by_rows=True).cost == {"shared_with_output_layer": 1, "rounded": 0}
    onnx.checker.check_model(model)
    assert cosine(run(model, {"ids": IDS})[0].reshape(-1, 40), wanted.reshape(-1, 40)) > 0.999
    engine(model, save=tmp_path / "a")
    assert op_counts(onnx.load(tmp_path / "a"))["MatMulIntegerToFloat"] == 4
    alone = np.concatenate([run(model, {"ids": row[None]})[0] for row in IDS])
    np.testing.assert_array_equal(run(model, {"ids": IDS})[0], alone)
    kept = copy(block[0])
    merge_projections(kept)
    assert quantize_matmuls(kept, precision=dict.fromkeys(names[:-1], "fp32")).cost == {"per_tensor": 0, "per_token": 1}


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x / 2)


def test_a_row_of_giants_leaves_the_others_alone() -> None:
    torch.manual_seed(1)
    net = Halved().eval()
    rows = np.random.default_rng(0).normal(size=(1, 6, 64)).astype(np.float32)
    rows[0, 0, 3], rows[0, 4] = 900, 0  # as a language model's first position; and one of zeros
    model = trace(net, {"x": (torch.from_numpy(rows), {0: "rows", 1: "length"})}, ("y",), 23)
    wanted = run(model, {"x": rows})[0][0]
    whole = copy(model)
    quantize_static(whole, calibrate(whole, [{"x": rows}]))
    assert quantize_matmuls(model).cost == {"per_tensor": 0, "per_token": 1}
    ours, theirs = (run(each, {"x": rows})[0][0] for each in (model, whole))
    usual = [1, 2, 3, 5]
    assert cosine(ours[usual], wanted[usual]) > 0.9999 and cosine(ours[:1], wanted[:1]) > 0.9999
    assert not ours[4].any()
    assert min(cosine(theirs[usual], wanted[usual]), cosine(theirs[:1], wanted[:1])) < 0.95


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    nets.DECODERS["wide_llama"] = {**nets.DECODERS["llama"], "dim": 64}
    try:
        return small_source(tmp_path_factory.mktemp("streamed"), "wide_llama")
    finally:
        del nets.DECODERS["wide_llama"]


def decoder(made) -> onnx.ModelProto:
    return onnx.load_from_string(made.files["decoder.onnx"])


def test_a_language_models_bundle(llama: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_quantized, "STREAMED", 0)
    wanted, layers = onnx_fp32.build(llama), len(llama.trunk().session["kv"]) // 2
    graph = Graph(decoder(wanted))
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":  # queries, keys and values as one tensor
            assert graph.producer[node.input[0]].op_type == "MatMul" and list(node.input[1:3]) == ["", ""]
    assert op_counts(graph.model)["MatMul"] == 4 * layers
    logits = forced_logits(llama, wanted)
    build: Callable
    for build, least in ((onnx_int8.build, 0.999), (onnx_int4.build, 0.9)):
        made = build(llama)
        ops = op_counts(decoder(made))
        assert ops["SkipSimplifiedLayerNormalization"] == 2 * layers and ops["GroupQueryAttention"] == layers
        assert cosine(forced_logits(llama, made), logits) > least
        if build is onnx_int8.build:
            assert "int8_matmul" in {each.name for each in made.passes}
            assert "decoder" not in llama.statistics and llama.peaks["decoder"].runs  # no covariances
