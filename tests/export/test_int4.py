"""4-bit weights: rounded well, stored exactly, unpacked by the engine into the same int8 graph; and MatMulNBits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgecap.export import onnx_fp32, onnx_int4, onnx_int8, onnx_quantized
from edgecap.export.artifact import BuildOptions, Source
from edgecap.export.graph import Graph, op_counts, save
from edgecap.export.int4_blocks import quantize_blocks
from edgecap.export.int4_pack import pack, short_names, split
from edgecap.export.int8_static import quantize_static
from edgecap.export.pixels import fold_pixels
from edgecap.export.rounding import PAIR_LIMIT, round_blocks, round_float_blocks, worst_pair
from edgecap.export.statistics import layers_of
from edgecap.export.trunk import trace

from .nets import SmallNet, calibrate, engine, photos, run
from .small_source import cosine, forced_logits, small_source
from .test_rounding import inputs, moments, output_error


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), outputs=st.integers(1, 5), blocks=st.integers(1, 4), calibrated=st.booleans())
def test_rounded_blocks_can_be_packed_and_cannot_saturate(
    seed: int, outputs: int, blocks: int, calibrated: bool
) -> None:
    weights = np.random.default_rng(seed).standard_t(2, (1, outputs, blocks * 8))
    statistics = moments(inputs(seed, 1, blocks * 8)) if calibrated else (None, None)
    rounded = round_blocks(weights, *statistics, block=8)
    assert worst_pair(rounded.weights) <= PAIR_LIMIT and rounded.weights.dtype == np.int8
    assert np.array_equal(rounded.scales, rounded.scales.astype(np.float16))
    for axis, whole in ((1, rounded.weights[0]), (0, rounded.weights[0].T)):
        packed = split("w", whole, axis)
        assert np.abs(packed.quarters).max() <= 7 and packed.multipliers.min() >= 1 and packed.multipliers.max() <= 9
        np.testing.assert_array_equal((packed.quarters * packed.multipliers).reshape(whole.shape), whole)


def test_what_is_no_multiple_of_four_bits_is_not_packed() -> None:
    assert split("w", np.arange(-60, 68, dtype=np.int8).reshape(4, 32), 1) is None


def test_blocks_keep_outputs_better_than_nearest_and_than_one_scale() -> None:
    random = np.random.default_rng(1)
    weights = random.normal(size=(1, 24, 64)) * random.uniform(0.2, 2, (1, 1, 4)).repeat(16, -1)
    rows = inputs(2, 1, 64)
    clever = output_error(weights, round_blocks(weights, *moments(rows), block=16), rows, shift=True)
    nearest = output_error(weights, round_blocks(weights, None, None, block=16), rows, shift=False)
    coarse = output_error(weights, round_blocks(weights, *moments(rows), block=64), rows, shift=True)
    assert clever < 0.85 * nearest and clever < 0.95 * coarse

    covariance = moments(rows)[0]
    errors = []
    for known in (covariance, None):
        whole, scales = round_float_blocks(weights[0], known, block=16)
        left = (weights[0] - whole * scales.astype(np.float64).repeat(16, 1)) @ (rows[0] - rows[0].mean(0)).T
        errors.append(float((left**2).mean()))
    assert errors[0] < 0.9 * errors[1]


@pytest.fixture(scope="module")
def packed_and_not() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    torch.manual_seed(0)
    model = trace(SmallNet().eval(), {"pixels": (torch.from_numpy(photos(2)), {0: "batch"})}, ("grid",), 18)
    fold_pixels(model)
    result = quantize_static(
        model, calibrate(model, [{"pixels": each[None]} for each in photos(12)]), bits=4, spared=0.0
    )
    assert result.cost["four_bits"] == 2  # the two pointwise Convs
    packed = onnx.ModelProto.FromString(model.SerializeToString())
    assert pack(packed).cost["tensors"] == 2
    return packed, model


def test_an_engine_unpacks_the_same_int8_graph(packed_and_not, tmp_path: Path) -> None:
    packed, plain = packed_and_not
    assert not [t for t in packed.graph.initializer if t.data_type == TensorProto.FLOAT and list(t.dims) > [1]]
    for model, name in ((packed, "a"), (plain, "b")):
        engine(model, save=tmp_path / name)
    one, other = (onnx.load(tmp_path / name) for name in "ab")
    assert op_counts(one) == op_counts(other) and op_counts(one)["QLinearConv"] == 4
    weights = [
        sorted((numpy_helper.to_array(t).tobytes() for t in model.graph.initializer if len(t.dims) == 4), key=hash)
        for model in (one, other)
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 4
    pixels = photos(3, seed=5)
    np.testing.assert_array_equal(*(run(model, {"pixels": pixels})[0] for model in (packed, plain)))


def test_short_names_change_names_only(packed_and_not) -> None:
    packed, _ = packed_and_not
    model = onnx.ModelProto.FromString(packed.SerializeToString())
    assert short_names(model).cost["saved_bytes"] > 500
    pixels = photos(2)
    np.testing.assert_array_equal(*(run(each, {"pixels": pixels})[0] for each in (model, packed)))
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["pixels", "grid"]


class Words(nn.Module):
    """A tied embedding with a bias-free layer and one with a bias between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.wide, self.narrow = nn.Linear(64, 80, bias=False), nn.Linear(80, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.narrow(torch.relu(self.wide(self.words(ids))))
        return nn.functional.linear(x, self.words.weight)


@pytest.fixture(scope="module")
def words() -> onnx.ModelProto:
    from edgecap.export.tie import tie_embedding

    torch.manual_seed(0)
    model = trace(Words().eval(), {"ids": (torch.tensor([[3, 1, 4]]), {0: "rows", 1: "length"})}, ("logits",), 18)
    assert tie_embedding(model).cost["changed"]
    return model


@pytest.mark.parametrize("calibrated", [True, False])
def test_matmuls_by_blocks_and_the_embedding_from_the_same_bytes(words: onnx.ModelProto, calibrated: bool) -> None:
    model = onnx.ModelProto.FromString(words.SerializeToString())
    statistics = (
        calibrate(model, [{"ids": np.arange(i, i + 10)[None]} for i in range(0, 40, 4)]) if calibrated else None
    )
    result = quantize_blocks(model, statistics)
    assert result.cost == {"int4": 3, "int8": 0, "embeddings": 1}
    ops = op_counts(model)
    assert ops["MatMulNBits"] == 3 and ops["GatherBlockQuantized"] == 1 and not {"MatMul", "Gather"} & set(ops)
    assert len(save(model)) < 0.25 * len(save(words))
    graph, ids = Graph(model), {"ids": np.array([[7, 0, 49], [1, 1, 2]])}
    tables = [t for t in model.graph.initializer if t.data_type == TensorProto.UINT8]
    assert len(tables) == 3  # the tied one once
    ours, theirs = run(model, ids)[0], run(words, ids)[0]
    assert ours.shape == theirs.shape and cosine(ours.reshape(-1, 50), theirs.reshape(-1, 50)) > 0.97

    # Against the same numbers multiplied in numpy.
    (gather,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    blocks = graph.constant(graph.producer[gather.input[0]].input[0])
    scales = graph.constant(graph.producer[graph.producer[gather.input[2]].input[0]].input[0])
    whole = np.stack([blocks & 15, blocks >> 4], -1).reshape(50, -1).astype(np.float32) - 8
    rows = whole * scales.astype(np.float32).reshape(50, -1).repeat(32, 1)
    model.graph.output.append(helper.make_tensor_value_info(gather.output[0], TensorProto.FLOAT, None))
    np.testing.assert_allclose(run(model, ids)[1], rows[ids["ids"]], rtol=1e-6)


def test_layers_by_blocks_can_be_raised(words: onnx.ModelProto) -> None:
    first, second, last = (layer.node.name for layer in layers_of(Graph(words)))
    errors = []
    for raised in ({}, {last: "int8"}, {first: "int8", second: "fp32", last: "int8"}):
        model = onnx.ModelProto.FromString(words.SerializeToString())
        quantize_blocks(model, precision=raised)
        ids = {"ids": np.arange(50)[None]}
        errors.append(float(np.mean((run(model, ids)[0] - run(words, ids)[0]) ** 2)))
    assert errors[2] < 0.05 * errors[1] and errors[1] < errors[0]
    ops = op_counts(model)
    assert ops["MatMulNBits"] == 2 and ops.get("MatMul", 0) + ops.get("Gemm", 0) == 1


@pytest.fixture(scope="module", params=["gru", "opt"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small) -> Source:
    return small_source(tmp_path_factory.mktemp("int4"), request.param)


def test_every_decoder_both_ways(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = forced_logits(source, onnx_fp32.build(source))
    eight, stored = onnx_int8.build(source), onnx_int4.build(source)
    assert cosine(forced_logits(source, stored), wanted) > 0.75  # random weights; trained ones: above 0.99
    assert sum(map(len, stored.files.values())) < sum(map(len, eight.files.values()))
    assert "MatMulNBits" not in op_counts(onnx.load_from_string(stored.files["decoder.onnx"]))
    monkeypatch.setattr(onnx_quantized, "STREAMED", 0)
    blocks = onnx_int4.build(source)
    ops = op_counts(onnx.load_from_string(blocks.files["decoder.onnx"]))
    assert ops["MatMulNBits"] >= 4 and "Gemm" not in ops
    assert cosine(forced_logits(source, blocks), wanted) > 0.75
    again = onnx_int4.build(replace(source, statistics={}, peaks={}))
    assert {name: again.files[name] == blocks.files[name] for name in blocks.files} == dict.fromkeys(blocks.files, True)


def test_options_choose_the_precision_of_graphs_and_layers(tmp_path: Path, small) -> None:
    source = small_source(tmp_path)

    def build(**options):
        return onnx_int4.build(replace(source, options=BuildOptions(**options)))

    fp32, eight, four = onnx_fp32.build(source), onnx_int8.build(source), build()
    mixed = build(graphs={"encoder": "fp32", "decoder": "int8"})
    assert mixed.files["encoder.onnx"] == fp32.files["encoder.onnx"]
    assert mixed.files["decoder.onnx"] == eight.files["decoder.onnx"]
    pair = source.trunk()
    names = [layer.node.name for layer in layers_of(Graph(pair.decoder))]

    def passed(artifact):
        (found,) = (
            each for each in artifact.passes if each.name == "static_int8" and each.params["graph"] == "decoder"
        )
        return found.cost

    assert passed(build(keep=frozenset({f"decoder:{names[-1]}"})))["four_bits"] == passed(four)["four_bits"] - 1
    assert passed(build(keep=frozenset({f"decoder:{names[-1]}:fp32"})))["layers"] == len(names) - 1
    everything = frozenset(f"{part}:{layer.node.name}:fp32" for part in ("encoder", "decoder")
                           for layer in layers_of(Graph(getattr(pair, part))))  # fmt: skip
    exact = build(keep=everything)
    wanted = forced_logits(source, fp32)
    assert cosine(forced_logits(source, exact), wanted) > 0.999
