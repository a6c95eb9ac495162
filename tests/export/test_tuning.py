"""--recover raises what is sensitive and no more than it must; --autotune's choice and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecap.benchmarks.metrics import Interval
from edgecap.export import onnx_fp32, onnx_int4, onnx_int8, tuning
from edgecap.export.artifact import Artifact, BuildOptions, Source
from edgecap.export.gate import GateResult, judge
from edgecap.export.graph import Graph
from edgecap.export.onnx_quantized import PARTS
from edgecap.export.recover import note, recover
from edgecap.export.sensitivity import sensitivities
from edgecap.export.statistics import layers_of
from edgecap.export.tuning import Tuning, autotune, candidates, timeable
from edgecap.runtime.errors import EdgecapError, UsageError

from .small_source import forced_logits, small_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, small) -> Source:
    return small_source(tmp_path_factory.mktemp("tuning"))


class LogitGate:
    """Stands in for CIDEr: an artifact's "drop" is the relative squared error of its logits."""

    def __init__(self, source: Source, limit: float) -> None:
        self.source, self.limit = source, limit
        self.wanted = forced_logits(source, onnx_fp32.build(source))
        self.drops: list[float] = []

    def __call__(self, artifact: Artifact) -> GateResult:
        error = float(np.mean((forced_logits(self.source, artifact) - self.wanted) ** 2) / np.mean(self.wanted**2))
        self.drops.append(error)
        drop = Interval(error, error, error)
        return GateResult(judge(drop, self.limit), drop, self.limit, {"photos": 8})


@pytest.fixture(scope="module")
def errors(source: Source) -> dict[str, float]:
    """The drop of int8 and int4 as they are."""
    gate = LogitGate(source, 0)
    return {"int8": gate(onnx_int8.build(source)).drop.mean, "int4": gate(onnx_int4.build(source)).drop.mean}


def fresh(source: Source, tmp_path: Path) -> Source:
    return replace(source, scratch=tmp_path)


def test_every_layer_is_measured_by_itself(source: Source) -> None:
    pair = source.trunk()
    names = {f"{part}:{layer.node.name}" for part in PARTS for layer in layers_of(Graph(getattr(pair, part)))}
    eight, four = sensitivities(source, 8), sensitivities(source, 4)
    assert {each.layer for each in eight} == {each.layer for each in four} == names
    assert [each.error for each in four] == sorted((each.error for each in four), reverse=True)
    assert sum(each.error for each in four) > 2 * sum(each.error for each in eight) > 0


def test_recover_raises_the_most_sensitive_layers_until_the_gate_holds(
    source: Source, errors: dict[str, float], tmp_path: Path
) -> None:
    gate = LogitGate(source, errors["int4"] * 0.6)
    artifact, result, done = recover(fresh(source, tmp_path), "onnx-int4", onnx_int4.build, gate)
    assert result.passed and gate(artifact).drop.mean == result.drop.mean
    raised = [entry["layer"] for entry in done.cost["raised"]]
    assert 0 < len(raised) < done.cost["layers"] and done.cost["gate_runs"] == len(gate.drops) - 1 <= 8
    assert raised == [each.layer for each in sensitivities(source, 4) if each.bits == 4][: len(raised)]
    line = note(done)
    assert f"{len(raised)} of {done.cost['layers']} layers" in line and raised[0] in line and "\n" not in line
    again = onnx_int4.build(replace(source, options=BuildOptions(keep=frozenset(raised))))
    assert again.files == artifact.files


def test_recover_ends_with_everything_raised_where_nothing_helps(source: Source, tmp_path: Path) -> None:
    gate = LogitGate(source, -1.0)
    artifact, result, done = recover(fresh(source, tmp_path), "onnx-int8", onnx_int8.build, gate)
    assert not result.passed and len(done.cost["raised"]) == done.cost["layers"]
    assert result.drop.mean < 1e-3 and len(gate.drops) <= 2 + int(np.log2(done.cost["layers"])) + 1


def test_recover_leaves_what_passes_and_refuses_what_it_cannot_do(source: Source, tmp_path: Path) -> None:
    gate = LogitGate(source, 100.0)
    _, result, done = recover(fresh(source, tmp_path), "onnx-int8", onnx_int8.build, gate)
    assert result.passed and done.cost["raised"] == [] and len(gate.drops) == 1 and "no layer" in note(done)
    with pytest.raises(UsageError, match="onnx-fp32 has none"):
        recover(source, "onnx-fp32", onnx_fp32.build, gate)
    with pytest.raises(UsageError, match="--recover is for the onnx and openvino targets"):
        recover(source, "coreml-int8", onnx_fp32.build, gate)
    deaf = fresh(source, tmp_path / "deaf")
    deaf.scratch.mkdir()
    first = onnx_int8.build(source)
    with pytest.raises(EdgecapError, match="cannot raise single layers of onnx-int8"):
        recover(deaf, "onnx-int8", lambda source: first, LogitGate(source, 0.0))


def test_the_fastest_pair_comes_first_and_fp32_last() -> None:
    times = {
        "encoder": {"fp32": 6.0, "int8": 3.0, "int4": 3.05},
        "decoder": {"fp32": 1.0, "int8": 0.5, "int4": 0.7},
    }
    sizes = {part: {"fp32": 8, "int8": 2, "int4": 1} for part in PARTS}
    found = [(pair["encoder"], pair["decoder"]) for pair in candidates(times, sizes)]
    assert found[:2] == [("int4", "int8"), ("int8", "int8")]  # as fast, and smaller; a slower decoder is not hidden
    assert found[-1] == ("fp32", "fp32") and len(found) == len(set(found)) == 9
    times["decoder"] |= {"int8": 30.0, "int4": 40.0}  # as on WASM
    assert ("fp32", "int8") not in [(pair["encoder"], pair["decoder"]) for pair in candidates(times, sizes)]


def test_autotune_keeps_the_fastest_that_passes_and_its_file_makes_the_same_bundle(
    source: Source, errors: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "ROUNDS", 3)
    monkeypatch.setattr(tuning, "WARM", 1)
    gate = LogitGate(source, errors["int8"] / 1e3)  # nothing quantized may pass
    found, artifact, result = autotune(fresh(source, tmp_path), onnx_int8.build, "cpu", gate)
    assert result.passed and found.graphs == {"encoder": "fp32", "decoder": "fp32"}
    tried = found.facts["tried"]
    assert len(tried) == len(gate.drops) and [each["gate"] for each in tried[:-1]] == ["fail"] * (len(tried) - 1)
    speeds = found.facts["speed_against_fp32"]
    assert set(speeds) == set(PARTS) and all(set(each) == {"fp32", "int8", "int4"} for each in speeds.values())
    assert all(value > 0 for each in speeds.values() for value in each.values())
    assert found.facts["device"] == "cpu" and found.facts["cpu"]["isa"]

    path = tmp_path / "tuning.json"
    path.write_text(found.to_json())
    loaded = Tuning.load(path)
    assert loaded.to_json() == path.read_text() and loaded.options == BuildOptions(graphs=found.graphs)
    assert onnx_int8.build(replace(source, options=loaded.options)).files == artifact.files


def test_only_this_machine_can_be_timed() -> None:
    assert timeable("cpu").name == "cpu"
    with pytest.raises(UsageError, match=r"raspberry-pi-5 \(over ssh\) must be reached to be timed"):
        timeable("raspberry-pi-5")
    with pytest.raises(UsageError, match="unknown device"):
        timeable("toaster")


GOOD = {"format": "edgecap-tuning", "version": 1, "graphs": {"encoder": "int8", "decoder": "int4"}, "device": "cpu"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "is no tuning file"),
        (json.dumps(GOOD).encode()[:-9], "not JSON"),
        (json.dumps(GOOD | {"format": "x"}).encode(), "is no tuning file"),
        (json.dumps(GOOD | {"version": 2}).encode(), "is of version 2"),
        (json.dumps(GOOD | {"version": True}).encode(), "is of version True"),
        (json.dumps(GOOD | {"graphs": {"encoder": "int8"}}).encode(), '"graphs" must give encoder and decoder'),
        (json.dumps(GOOD | {"graphs": {"encoder": "int8", "decoder": ["int8"]}}).encode(), '"graphs" must give'),
        (json.dumps(GOOD | {"graphs": {"encoder": "int8", "decoder": "int2"}}).encode(), '"graphs" must give'),
        (b" " * 1_000_001, "is no tuning file"),
    ],
)
def test_a_damaged_file_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        Tuning.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_whole_file_is_kept_word_for_word(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    text = json.dumps(GOOD)
    path.write_text(text)
    loaded = Tuning.load(path)
    assert loaded.to_json() == text and loaded.graphs == GOOD["graphs"] and loaded.facts == {"device": "cpu"}
    with pytest.raises(UsageError, match="cannot read the tuning file"):
        Tuning.load(tmp_path / "none.json")
