"""The whole command on small checkpoints: every target's artifact against torch, reproducibly, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from edgecap import cli
from edgecap.benchmarks.datasets import open_dataset
from edgecap.benchmarks.datasets.summary import write_sample
from edgecap.benchmarks.metrics import Interval
from edgecap.export import gate, job, onnx_int8, pipeline, smaller
from edgecap.export.artifact import BuildOptions
from edgecap.export.golden import draw, make_golden
from edgecap.export.pipeline import export
from edgecap.export.smaller import Smaller
from edgecap.export.targets import TARGETS
from edgecap.runtime import Captioner, UsageError, verify_golden
from edgecap.runtime.backends import BACKENDS
from edgecap.runtime.bundle import Bundle
from edgecap.runtime.errors import EdgecapError
from edgecap.runtime.fused import FusedCaptioner
from edgecap.runtime.verify import teacher_forced
from edgecap.train.checkpoint import load_checkpoint
from edgecap.train.run import latest_run

from .nets import DECODERS, SCENES, photos, save_run

TOLERANCE = {"onnx-fp32": 1e-3, "onnx-fp16": 0.1, "onnx-int8": None}  # of logits; none for int8 of random nets


@pytest.fixture(scope="module", params=DECODERS)
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / request.param, request.param)


def make(run_folder: Path, target: str, out: Path, **options):
    return export(run_folder, target=target, out=out, max_cider_drop=10, calibration=6, **options)


@pytest.mark.parametrize("target", ["onnx-fp32", "onnx-fp16", "onnx-int8"])
def test_the_whole_export_of_every_decoder(run_folder: Path, target: str, tmp_path: Path) -> None:
    result = make(run_folder, target, tmp_path / "a.edgecap")
    assert result.path == tmp_path / "a.edgecap" and result.gate.passed
    checkpoint = load_checkpoint(run_folder)
    with Captioner.load(result.path) as captioner:
        assert verify_golden(captioner).ok
        manifest = captioner.bundle.manifest
        assert manifest["target"] == target and manifest["lineage"]["checkpoint"]["sha256"] == checkpoint.sha256
        assert manifest["lineage"]["data"] == SCENES and "seconds" not in json.dumps(manifest["lineage"])
        measured = manifest["measured"]
        assert measured["photos"] == 12 and measured["split"] == "val" and measured["gate"] == "pass"
        files = manifest["files"]
        assert measured["graph_bytes"] == files["encoder.onnx"]["bytes"] + files["decoder.onnx"]["bytes"]
        assert measured["bytes"] == sum(entry["bytes"] for entry in files.values())
        pixels, ids = photos(1, seed=3)[0], [5, 9, 4, 4]
        ours = teacher_forced(captioner, pixels, ids)
        session = checkpoint.model.session()
        theirs = [session.start(pixels[None])] + [session.step(np.array([i]), np.zeros(1, int)) for i in ids]
        difference = np.abs(ours - np.concatenate(theirs)).max()
        if TOLERANCE[target] is not None:
            assert difference < TOLERANCE[target]
        else:
            assert 1e-6 < difference  # quantized indeed
            for part in ("encoder", "decoder"):
                tensors = onnx.load(result.path / f"{part}.onnx").graph.initializer
                assert not [t.name for t in tensors if len(t.dims) > 1 and t.data_type == onnx.TensorProto.FLOAT]
    card = (result.path / "MODEL_CARD.md").read_text()
    assert "which training\nused to choose the checkpoint:" in card and measured["chose_checkpoint"] is True
    assert measured["data"] == SCENES and measured["data_fingerprint"] == open_dataset(SCENES).fingerprint
    assert checkpoint.sha256 in card and f"**{measured['gate']}**" in card and str(tmp_path) not in card


FAMILIES = [("onnx-int8", "gru"), ("onnx-int4", "llama"), ("openvino-int4", "llama"), ("coreml-int8", "gru")]


@pytest.mark.parametrize(("target", "decoder"), [*FAMILIES, ("gguf-q4_0", "gpt2")])
def test_the_same_command_writes_the_same_bytes(tmp_path: Path, target: str, decoder: str, trace_anew) -> None:
    """Traced anew the second time: torch's names are part of the bytes."""
    need_engine(target)
    folder = save_run(tmp_path / "run", decoder)
    options = BuildOptions(fused=target.startswith("onnx"))
    one = make(folder, target, tmp_path / "a" / "x.edgecap", options=options).path
    trace_anew()
    two = make(folder, target, tmp_path / "b" / "x.edgecap", options=options).path
    assert_same_bundle(one, two)
    simulated = (
        "**Simulated**: the artifact's programs computed op by op in torch" in (one / "MODEL_CARD.md").read_text()
    )
    assert simulated == (not TARGETS[target].runs_here)


def assert_same_bundle(one: Path, two: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for name in names:
        if str(name) != "bundle.json":
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    manifests = [Bundle.open(path).manifest for path in (one, two)]
    for manifest in manifests:
        manifest["measured"].pop("speed", None)  # the only times in it
    assert manifests[0] == manifests[1]


def need_engine(target: str) -> None:
    entry = TARGETS[target]
    for package in (*entry.packages, BACKENDS[entry.backend].package):
        pytest.importorskip(package, reason=f"{target} needs {package}: pip install 'edgecap[{entry.extra}]'")


def test_one_graph_beside_the_two(tmp_path: Path) -> None:
    result = make(save_run(tmp_path / "run"), "onnx-int8", tmp_path / "x.edgecap", options=BuildOptions(fused=True))
    measured, manifest = result.gate.measured, Bundle.open(result.path).manifest
    assert measured["fused"]["same_tokens"] == {"beam 1": 1, "beam 3": 1} and measured["fused"]["photos"] == 12
    files = manifest["files"]
    assert measured["graph_bytes"] == files["encoder.onnx"]["bytes"] + files["decoder.onnx"]["bytes"]
    assert measured["fused"]["bytes"] == files["fused.onnx"]["bytes"]
    picture = np.array(draw())
    with Captioner.load(result.path) as captioner:
        one = FusedCaptioner.load(result.path)(picture)
        assert one.text == captioner(picture).text


def test_a_tuned_export_is_repeated_from_its_file(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", "llama")
    result = make(folder, "onnx-int8", tmp_path / "a" / "x.edgecap", autotune="cpu")
    tuned = result.path
    file = tuned / "tuning.json"
    graphs = json.loads(file.read_text())["graphs"]
    assert sorted(graphs) == ["decoder", "encoder"]
    assert f"the encoder in {graphs['encoder']} and the decoder in {graphs['decoder']}" in result.notes[0]
    again = make(folder, "onnx-int8", tmp_path / "b" / "x.edgecap", tuning=file).path
    assert_same_bundle(tuned, again)
    with pytest.raises(UsageError, match="raspberry-pi-5 .* must be reached to be timed"):
        make(folder, "onnx-int8", tmp_path / "c.edgecap", autotune="raspberry-pi-5")
    with pytest.raises(UsageError, match="--autotune and --tuning go with onnx-int8 and onnx-int4"):
        make(folder, "openvino-fp16", tmp_path / "c.edgecap", tuning=file)


def test_pruned_fine_tuned_and_judged_against_the_unpruned(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_run(Path("runs") / "run")
    asked = Smaller(("hidden=0.3,vocab=2",), epochs=1)
    options = {"target": "onnx-int8", "max_cider_drop": 10, "calibration": 6}
    result = export(folder, smaller=asked, **options)
    assert result.path == Path("runs/run-pruned-onnx-int8.edgecap")
    manifest = Bundle.open(result.path).manifest
    assert manifest["measured"]["reference"] == "onnx-fp32, unpruned"
    (first, *_) = manifest["lineage"]["passes"]
    assert first["name"] == "prune" and first["params"]["items"] == list(asked.items)
    before, after = (first["cost"][key]["parameters"]["decoder"] for key in ("before", "after"))
    assert after < before and first["cost"]["after"]["macs"]["word"] < first["cost"]["before"]["macs"]["word"]
    assert latest_run() == folder  # the pruned checkpoint is no run of its own
    (tuned,) = folder.glob("pruned/*-finetuned1")
    assert manifest["lineage"]["checkpoint"]["sha256"] == load_checkpoint(tuned).sha256
    (pruned,) = (path for path in folder.glob("pruned/*") if path != tuned)
    direct = Bundle.open(export(tuned, out=Path("direct.edgecap"), **options).path).manifest
    assert direct["lineage"]["passes"][0] == first and direct["measured"]["reference"] == "onnx-fp32"
    monkeypatch.setattr(smaller, "prune_checkpoint", None)  # made once, taken again
    again = export(folder, smaller=asked, out=Path("b") / result.path.name, **options)
    assert_same_bundle(result.path, again.path)
    with pytest.raises(UsageError, match="--finetune goes with --prune"):
        export(folder, smaller=Smaller((), epochs=1), **options)
    with pytest.raises(UsageError, match="--prune 'half': write KEY=VALUE"):
        export(folder, smaller=Smaller(("half",)), **options)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    weights = (pruned / "model.safetensors").read_bytes()
    (pruned / "recipe.toml").unlink()  # as a kill before its last file leaves it
    export(folder, smaller=Smaller(asked.items), **options)
    assert (pruned / "model.safetensors").read_bytes() == weights
    other = SCENES.replace("val=12", "val=11")
    with pytest.raises(UsageError, match="was pruned by other photos: remove it"):
        export(folder, smaller=Smaller(asked.items), data=other, **options)
    save_run(folder, seed=1)
    with pytest.raises(UsageError, match="was not pruned from these weights: remove it"):
        export(folder, smaller=asked, **options)


def test_layers_are_raised_until_the_gate_holds(tmp_path: Path, monkeypatch) -> None:
    """The gate is told to be content once two layers are kept at a higher precision."""
    folder, kept = save_run(tmp_path / "run"), []
    build = onnx_int8.build

    def building(source):
        kept.append(len(source.options.keep))
        return build(source)

    monkeypatch.setattr(onnx_int8, "build", building)
    drop = {True: Interval(0.001, 0.0, 0.002), False: Interval(0.3, 0.2, 0.4)}
    monkeypatch.setattr(gate, "paired_bootstrap", lambda a, b: drop[kept[-1] >= 2])
    result = export(folder, target="onnx-int8", out=tmp_path / "x.edgecap", calibration=6, raise_layers=True)
    assert result.gate.passed and "--recover raised the precision of 2 of" in result.notes[0]
    last = Bundle.open(result.path).manifest["lineage"]["passes"][-1]
    assert last["name"] == "recover" and len(last["cost"]["raised"]) == 2


def test_a_refused_bundle_is_not_left_unless_forced(tmp_path: Path, monkeypatch) -> None:
    folder = save_run(tmp_path / "run")
    out = tmp_path / "x.edgecap"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".x.edgecap.new-{dead.pid}-00000000" / "artifact").mkdir(parents=True)  # an export that was killed
    monkeypatch.setattr(gate, "paired_bootstrap", lambda a, b: Interval(0.3, 0.2, 0.4))
    refused = export(folder, target="onnx-fp16", out=out)
    assert refused.path is None and refused.gate.verdict == "fail" and not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    forced = export(folder, target="onnx-fp16", out=out, force=True)
    measured = Bundle.open(forced.path).manifest["measured"]
    assert measured["gate"] == "fail" and measured["forced"] is True
    assert "--force" in (out / "MODEL_CARD.md").read_text()

    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(cli.cli, ["export", "run", "--target", "onnx-fp16", "--json", "-o", "y.edgecap"])
    assert answer.exit_code == 1 and not (tmp_path / "y.edgecap").exists()
    assert "no bundle written" in answer.exception.message and "exceeds the limit" in answer.exception.message
    said = json.loads(answer.stdout)
    assert said["bundle"] is None and said["gate"]["verdict"] == "fail"


def test_a_missed_golden_pair_is_an_error_unless_forced(tmp_path: Path, monkeypatch) -> None:
    folder, out = save_run(tmp_path / "run"), tmp_path / "x.edgecap"
    monkeypatch.setattr(gate, "paired_bootstrap", lambda a, b: Interval(0.0, 0.0, 0.0))
    monkeypatch.setattr(
        job, "verify_golden", lambda captioner: dataclasses.replace(verify_golden(captioner), min_cosine=0.5)
    )
    with pytest.raises(EdgecapError, match=r"logit cosine 0.50000, needed 0.999; .* \(or --force\)"):
        export(folder, target="onnx-fp16", out=out)
    assert not out.exists()
    forced = export(folder, target="onnx-fp16", out=out, force=True)
    measured = Bundle.open(forced.path).manifest["measured"]
    assert measured["gate"] == "pass" and measured["forced"] is True and not measured["golden"]["reproduced"]
    assert "cosine of 0.50000" in forced.notes[0] and "edgecap verify refuses" in forced.notes[0]
    card = (out / "MODEL_CARD.md").read_text()
    assert "**missed**" in card and "**pass**, written" not in card


def test_lineage_says_what_was_trained_on_and_measured_what_was_measured_on(tmp_path: Path) -> None:
    folder, other = save_run(tmp_path / "run"), tmp_path / "photos"
    write_sample(open_dataset("scenes:train=6,val=5,test=1,size=48"), 6, other)
    broken = sorted(other.glob("val_*.jpg"))[2]
    broken.write_bytes(broken.read_bytes()[:300])
    spec = f"folder:{other}"
    with pytest.raises(UsageError, match=r"1 bad example .*truncated file.* leave these out with --skip-bad"):
        make(folder, "onnx-fp32", tmp_path / "x.edgecap", data=spec)
    result = make(folder, "onnx-fp32", tmp_path / "x.edgecap", data=spec, skip_bad=True)
    manifest = Bundle.open(result.path).manifest
    lineage, measured = manifest["lineage"], manifest["measured"]
    assert lineage["data"] == lineage["checkpoint"]["recipe"]["data"]["spec"] == SCENES
    assert "data_fingerprint" not in lineage
    assert (measured["data"], measured["split"], measured["photos"]) == ("folder", "val", 4)
    assert measured["data_fingerprint"] == open_dataset(spec, skip_bad=True).fingerprint
    assert measured["chose_checkpoint"] is False
    card = (result.path / "MODEL_CARD.md").read_text()
    assert "On 4 photos of the val split of folder:" in card and "choose the checkpoint" not in card
    assert str(other) not in json.dumps(manifest)


def test_the_newest_finished_run_is_taken_and_named_after(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "old")
    save_run(tmp_path / "runs" / "newer", finished=False)
    result = export(None, target="onnx-fp32", limit=5)
    assert str(result.path) == str(Path("runs") / "old-onnx-fp32.edgecap")
    assert result.gate.measured["photos"] == 5
    assert result.gate.measured["identical_captions"] == 1 and result.gate.measured["reference"] == "torch"


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no finished run under runs/: train one"):
        export(None, target="onnx-fp32")
    save_run(tmp_path / "runs" / "half", finished=False)
    with pytest.raises(UsageError, match="has not finished; continue it with: edgecap train --resume --out runs/half"):
        export(None, target="onnx-fp32")
    with pytest.raises(UsageError, match="has not finished"):
        export(Path("runs/half"), target="onnx-fp32")
    with pytest.raises(UsageError, match="unknown target 'onnx-int3'; choices: onnx-fp32, onnx-fp16, onnx-int8"):
        export(Path("runs/half"), target="onnx-int3")
    with pytest.raises(UsageError, match="is not a checkpoint"):
        export(tmp_path, target="onnx-fp32")
    with pytest.raises(UsageError, match="unknown data set"):
        export(Path("runs/half"), target="onnx-fp32", data="nothing", unfinished_ok=True)


def test_what_does_not_go_together_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch) -> None:
    folder = save_run(tmp_path / "run")
    monkeypatch.setattr(pipeline, "Source", None)
    monkeypatch.setattr(pipeline, "make_smaller", None)
    with pytest.raises(UsageError, match="--recover raises the precision of int8 and int4 layers: onnx-fp16 has none"):
        export(folder, target="onnx-fp16", raise_layers=True)
    with pytest.raises(UsageError, match="run exists and is not a bundle"):
        export(folder, target="onnx-int8", out=folder)
    with pytest.raises(UsageError, match="--encoder-lr goes with --finetune"):
        export(folder, target="onnx-int8", smaller=Smaller(("hidden=0.3",), encoder_lr=0.1))
    answer = CliRunner().invoke(cli.cli, ["export", str(folder), "--target", "onnx-int8", "--device", "cpu"])
    assert answer.exit_code == 2 and "--device says where --autotune measures" in answer.stderr


def test_a_missing_package_names_the_extra(monkeypatch) -> None:
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else original(name))
    answer = CliRunner().invoke(cli.cli, ["export", "--target", "onnx-int8"])
    wanted = "edgecap export needs onnxscript, which is not installed: pip install 'edgecap[export]'"
    assert answer.exception.message == wanted


def test_the_golden_pair_does_not_depend_on_how_many_threads_torch_has(tmp_path: Path, monkeypatch) -> None:
    loaded, used = load_checkpoint(save_run(tmp_path / "run")), []
    photo = loaded.model.photo
    monkeypatch.setattr(loaded.model, "photo", lambda **view: used.append(torch.get_num_threads()) or photo(**view))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_golden(loaded)
        assert set(used) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_golden_picture_is_always_the_same() -> None:
    assert draw().tobytes() == draw().tobytes()
    assert draw().size == (192, 160) and len(draw().getcolors()) > 90
