"""Captioners larger than a ModelProto: weights outside of their graphs, and the same bundles. The limit is lowered."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgecap.export import artifact, external, graph, onnx_quantized, onnx_target, pipeline, statistics, trunk
from edgecap.export.artifact import Source
from edgecap.export.calibration import Calibration
from edgecap.export.external import ExternalData, external_of
from edgecap.export.graph import Graph, save
from edgecap.export.pipeline import export
from edgecap.export.rounding import round_float_blocks
from edgecap.export.smaller import Smaller
from edgecap.export.targets import TARGETS
from edgecap.runtime import Captioner, verify_golden
from edgecap.runtime.errors import EdgecapError, UsageError
from edgecap.train.adopt import adopt
from edgecap.train.framing import frames_of
from edgecap.train.models import keep_16bit

from ..train.vlms import pictures, save_vlm

SCENES = "scenes:train=2,val=2,test=2,size=64"


@pytest.fixture(scope="module")
def low() -> Iterator[pytest.MonkeyPatch]:
    """Every captioner is large, every decoder streamed, and all but the smallest constants lie external."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep_16bit, "MOST", 1000)
        patch.setattr(keep_16bit, "SMALLEST", 1000)
        patch.setattr(onnx_quantized, "STREAMED", 1000)
        patch.setattr(onnx_target, "LARGE", 1000)
        for module in (external, trunk, graph):
            patch.setattr(module, "SMALLEST", graph.BESIDE + 1)
        yield patch


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in bfloat16, as published."""
    from transformers import AutoModelForImageTextToText

    folder = save_vlm(tmp_path_factory.mktemp("outside") / "vlm", "idefics3", layers=1)
    AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large(vlm: Path, low: pytest.MonkeyPatch) -> Source:
    """Traced once: most of the time that an export takes."""
    loaded = adopt(str(vlm))
    assert keep_16bit.is_large(loaded.model)
    keep_16bit.keep_16bit(loaded.model)
    assert {keep_16bit.Linear16, keep_16bit.Embedding16} <= {type(module) for module in loaded.model.modules()}
    words, frames = np.random.default_rng(1).integers(20, 40, (2, 5)).tolist(), frames_of(loaded)
    calibration = Calibration(list(pictures(2, 48)), words, loaded.tokens, frames=frames)
    source = Source(loaded, calibration, vlm.parent, frames=frames)
    assert source.trunk().external is not None
    return source


def whole(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its weights in it."""
    return onnx.load_from_string(save(model))


def contents(files: dict[str, bytes | Path]) -> dict[str, bytes]:
    return {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}


def test_weights_outside_make_the_same_bundles(large: Source) -> None:
    pair = large.trunk()
    inside = trunk.OnnxPair(whole(pair.encoder), whole(pair.decoder), pair.session, pair.passes)
    assert pair.decoder.ByteSize() < inside.decoder.ByteSize() / 2
    not_looked_at = {"encoder": None, "decoder": None}  # as those outside are not
    small = dataclasses.replace(large, _trunk=inside, statistics={}, peaks=not_looked_at)
    for target in ("onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int4"):
        ours, theirs = (TARGETS[target].build(source) for source in (large, small))
        assert isinstance(ours.files["decoder.bin"], Path) and ours.graphs == theirs.graphs
        ours_said, theirs_said = contents(ours.files), contents(theirs.files)
        if target == "onnx-int4":  # calibrated in a session of its own, whose sums are in another order
            ours_bin, theirs_bin = (
                np.frombuffer(said.pop("decoder.bin"), np.uint8) for said in (ours_said, theirs_said)
            )
            assert ours_bin.shape == theirs_bin.shape and (ours_bin == theirs_bin).mean() > 0.98
        assert ours_said == theirs_said, target


def test_a_large_captioner_is_exported_and_compared_with_torch(
    vlm: Path, large: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(statistics, "MOST", 1000)  # its covariances are in stretches
    monkeypatch.setattr(statistics, "STRETCH", 16)
    monkeypatch.setattr(statistics, "WHOLE", 16)
    monkeypatch.setattr(artifact, "to_onnx", lambda *args, **options: large.trunk())
    options = {"source": str(vlm), "data": SCENES, "limit": 1, "calibration": 1, "max_cider_drop": 10}
    for target in ("onnx-fp32", "onnx-int4"):
        done = export(None, target=target, out=tmp_path / f"{target}.edgecap", **options)
        assert done.path is not None and done.gate.measured["reference"] == "torch"
        assert "speed" not in done.gate.measured
        with Captioner.load(done.path) as captioner:
            assert verify_golden(captioner).ok and captioner(pictures(1, 48), max_length=3)
        if target == "onnx-fp32":
            assert done.gate.measured["parity"]["max_abs_difference"] < 1e-4
            assert done.gate.measured["identical_captions"] == 1
    monkeypatch.setattr(pipeline, "make_smaller", None)  # what is refused is refused before anything is pruned
    for wrong in (
        {"options": artifact.BuildOptions(fused=True)},
        {"autotune": "cpu"},
        {"autotune": "cpu", "smaller": Smaller(("layers=1",))},
    ):
        with pytest.raises(UsageError, match=r"up to 2 GB a part in fp32, and this one is larger: leave it out"):
            export(None, target="onnx-int8", out=tmp_path / "no.edgecap", **options, **wrong)


def test_constants_outside_are_read_and_written_like_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": (torch.randn(2, 64), {0: "rows"})}
    beside = ExternalData(tmp_path)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    usual, thin = (trunk.trace(net, inputs, ("y",), 18, where) for where in (None, beside))
    assert external_of(usual) is None and external_of(thin) is beside
    assert thin.ByteSize() < 2000 < 64 * 64 * 4 < usual.ByteSize() and plain(thin) == plain(usual)
    ours, theirs = Graph(thin), Graph(usual)
    (name,) = (name for name in ours.initializers if ours.shape(name) == (64, 64))
    assert ours.dtype(name) == np.float32
    np.testing.assert_array_equal(ours.constant(name), theirs.constant(name))
    for each in (ours, theirs):
        each.set_made("turned", [name], (64, 64), np.transpose)
        each.set_constant(name, np.full((64, 64), 7, np.int8))
        each.set_made("whole", [name], (64, 64), np.transpose)  # int8, as its source
        each.set_made("wide", [name], (64, 64), partial(np.ndarray.astype, dtype=np.float32), np.float32)
        each.set_made("small", [name], (3,), lambda value: value[0, :3])
        each.set_constant("few", np.arange(3))
    assert all(ours.initializers[each].data_location == onnx.TensorProto.DEFAULT for each in ("few", "small"))
    assert ours.dtype("whole") == np.int8 and ours.dtype("wide") == np.float32 == ours.constant("wide").dtype
    assert plain(thin) == plain(usual)  # "turned" is of the values of then
    net[0].weight.data.zero_()
    assert not ours.constant("turned").any()  # what lies outside is torch's own


def test_constants_that_are_gone_are_named(tmp_path: Path) -> None:
    graph, beside = Graph(onnx.ModelProto()), ExternalData(tmp_path)
    beside.own(graph.model)
    graph.set_constant("large", np.zeros((64, 64), np.float32))
    del beside
    gc.collect()
    for read in (lambda: external_of(graph.model), lambda: graph.constant("large"), lambda: save(graph.model)):
        with pytest.raises(EdgecapError, match="constants of this graph are gone"):
            read()


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """What is saved of it, without whether a tensor's empty comment was set."""
    found = whole(model)
    for tensor in found.graph.initializer:
        tensor.ClearField("doc_string")
    return found


def test_tied_weights_stay_tied_and_odd_ones_wide() -> None:
    torch.manual_seed(0)
    words, head, odd = nn.Embedding(512, 128), nn.Linear(128, 512, bias=False), nn.Linear(512, 128)
    head.weight = words.weight
    words.weight.data = words.weight.data.bfloat16().float()
    net = nn.ModuleList([words, head, odd])
    ids = torch.arange(5)
    before = head(words(ids))
    keep_16bit.keep_16bit(net)
    assert words.weight is head.weight and words.weight.dtype == torch.bfloat16
    assert type(odd) is nn.Linear and odd.weight.dtype == torch.float32  # no 16 bits hold it
    assert words(ids).dtype == torch.float32
    assert torch.equal(head(words(ids)), before)


def test_stretches_of_a_covariance_are_rounded_apart() -> None:
    random = np.random.default_rng(0)
    weights, rows = random.normal(size=(24, 64)), random.normal(size=(200, 64)) @ random.normal(size=(64, 64))
    apart = np.stack([np.cov(rows[:, part].T) for part in (slice(32), slice(32, 64))])
    rounded, scales = round_float_blocks(weights, apart, block=16)
    for place, part in enumerate((slice(32), slice(32, 64))):
        scaled = apart[place : place + 1]
        alone, _ = round_float_blocks(weights[:, part], scaled, block=16)
        assert (alone == rounded[:, part]).mean() > 0.9  # the scales weigh inputs by the variance of all
    assert scales.shape == (24, 4)
    assert [statistics.stretch(width) for width in (8192, 4304, 2560, 64)] == [2048, 4304, 1280, 64]
