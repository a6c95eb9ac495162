"""The vision graph of a SmolVLM with ONNX Runtime's operators: what torch computes; int8 close to it in any batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from edgecap.export import onnx_quantized, vision
from edgecap.export.artifact import BuildOptions
from edgecap.export.calibration import engine
from edgecap.export.gelu import is_gelu
from edgecap.export.graph import Graph, op_counts
from edgecap.export.half import store_half
from edgecap.export.int8_matmul import quantize_matmuls
from edgecap.export.int8_static import quantize_static
from edgecap.export.onnx_quantized import build_graph
from edgecap.export.pixels import fold_pixels
from edgecap.export.trunk import OPSET_PLAIN, OnnxPair, trace
from edgecap.export.vision import fuse_vision, tidy_vision
from edgecap.train.models.framed import FrameGraph

from .nets import calibrate

LAYERS, SIDE = 2, 64


@pytest.fixture(scope="module")
def module() -> FrameGraph:
    """32 wide, 2 heads, patches of 8; biases and norms that matter."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        vision_use_head=False,
    )
    body = SiglipVisionModel(config)
    for name, values in body.named_parameters():
        if name.endswith("bias") or "layer_norm" in name or "layernorm" in name:
            torch.nn.init.normal_(values, mean=float("norm.weight" in name), std=0.3)
    encoder = SimpleNamespace(
        body=body, scale=torch.full((1, 3, 1, 1), 1 / 127.5), shift=torch.full((1, 3, 1, 1), -1.0)
    )
    bridge = SimpleNamespace(scale=2, project=torch.nn.Linear(128, 24, bias=False))
    decoder = SimpleNamespace(project=torch.nn.Identity())
    return FrameGraph(SimpleNamespace(encoder=encoder, bridge=bridge, decoder=decoder)).eval()


@pytest.fixture(scope="module")
def traced(module: FrameGraph) -> onnx.ModelProto:
    axes = {0: "frames", 1: "height", 2: "width"}
    return trace(module, {"pixels": (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), axes)}, ("prefix",), OPSET_PLAIN)


@pytest.fixture
def graph(traced: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(traced)
    return copy


def frames(count: int, side: int) -> np.ndarray:
    """Smooth and bright, as photos are: uint8 [count, side, side, 3]."""
    noise = np.random.default_rng(side).integers(100, 256, (count, 4, 4, 3))
    return noise.repeat(side // 4, 1).repeat(side // 4, 2).astype(np.uint8)


def wanted(module: FrameGraph, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(pixels))[0].numpy()


def run(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    return engine(model).run(None, {"pixels": pixels})[0]


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(((ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)).min())


def test_the_fused_graph_says_what_torch_says_at_all_sizes(module: FrameGraph, graph: onnx.ModelProto) -> None:
    tidied, fused = fuse_vision(graph)
    onnx.checker.check_model(graph)
    assert tidied.cost["nodes_after"] < tidied.cost["nodes_before"]
    assert fused.cost == {"MultiHeadAttention": LAYERS, "FastGelu": LAYERS}
    counts = op_counts(graph)
    assert not {"Softmax", "Tanh", "GatherND"} & set(counts)
    for count, side in ((1, SIDE), (3, 32), (2, 48)):
        pixels = frames(count, side)
        assert np.allclose(run(graph, pixels), wanted(module, pixels), atol=1e-4)


def test_the_tidied_graph_is_standard_and_says_the_same(module: FrameGraph, graph: onnx.ModelProto) -> None:
    tidy_vision(graph)
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""}
    pixels = frames(2, SIDE)
    assert np.allclose(run(graph, pixels), wanted(module, pixels), atol=1e-4)


def test_a_graph_that_is_only_tidied_says_so(graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_attention", "fuse_gelu"):
        monkeypatch.setattr(vision, name, lambda *_: None)
    assert [each.name for each in fuse_vision(graph)] == ["tidy_vision"]
    assert fuse_vision(graph) == []  # nothing is left to change


def test_pixels_around_the_middle_change_nothing_but_rounding(module: FrameGraph, graph: onnx.ModelProto) -> None:
    assert fold_pixels(graph).cost == {"changed": True}
    pixels = frames(2, 32)
    assert np.allclose(run(graph, pixels), wanted(module, pixels), atol=1e-3)


def test_int8_per_token_stays_close_and_knows_nothing_of_the_batch(module: FrameGraph, graph: onnx.ModelProto) -> None:
    fold_pixels(graph)
    assert quantize_matmuls(graph).cost == {"per_tensor": 1, "per_token": 6 * LAYERS + 1}  # pixels are whole
    assert fuse_vision(graph)[1].cost == {"MultiHeadAttention": LAYERS, "FastGelu": LAYERS}
    index = Graph(graph)
    onnx.checker.check_model(graph)
    assert sum(node.op_type == "ReduceMax" for node in index.graph.node) == 4 * LAYERS + 1  # not of pixels
    pixels = frames(3, SIDE)
    ours = run(graph, pixels)
    assert cosine(ours, wanted(module, pixels)) > 0.998
    assert np.array_equal(ours[:1], run(graph, pixels[:1]))


def test_static_int8_is_fused_as_well(module: FrameGraph, graph: onnx.ModelProto) -> None:
    fold_pixels(graph)
    feeds = [{"pixels": frames(1, side)} for side in (SIDE, 48, 32)]
    quantize_static(graph, calibrate(graph, feeds))
    assert fuse_vision(graph)[1].cost == {"MultiHeadAttention": LAYERS, "FastGelu": LAYERS}
    pixels = frames(2, SIDE)
    assert cosine(run(graph, pixels), wanted(module, pixels)) > 0.995


def test_a_gelu_is_known_as_the_exporter_spells_it(graph: onnx.ModelProto) -> None:
    index = Graph(graph)
    ends = [index.only_reader(node.output[0]) for node in graph.graph.node if node.op_type == "Tanh"]
    known = [node.output[0] for node in graph.graph.node if is_gelu(index, node.output[0])]
    assert len(known) == len(ends) == LAYERS
    fuse_vision(graph)
    assert [node.op_type for node in graph.graph.node if is_gelu(Graph(graph), node.output[0])] == ["FastGelu"] * LAYERS


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_encoder_whose_weights_lie_outside_is_not_calibrated(
    graph: onnx.ModelProto, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_quantized, "STREAMED", 0)
    options = BuildOptions(keep=frozenset({"encoder:node_matmul:fp32"}))
    pair = OnnxPair(graph, onnx.ModelProto(), {}, [])
    trunk = SimpleNamespace(external="files", session={})
    source = SimpleNamespace(options=options, peaks={}, trunk=lambda: trunk)
    build_graph(source, pair, "encoder", precision)
    done = pair.passes
    assert [each.name for each in done[:2]] == ["pixels_as_quantized_input", "int8_matmul"]
    assert [each.name for each in done[2:]] == ["tidy_vision", "fuse_vision", "fuse_products"]
    assert done[1].cost == {"per_tensor": 0, "per_token": 6 * LAYERS + 1}


def test_weights_in_fp16_leave_the_operators(module: FrameGraph, graph: onnx.ModelProto) -> None:
    fuse_vision(graph)
    store_half(graph)
    assert fuse_vision(graph) == []
    assert cosine(run(graph, frames(1, 32)), wanted(module, frames(1, 32))) > 0.9999
