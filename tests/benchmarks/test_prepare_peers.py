"""Every kind of peer beside every bundle: which run a model, from which weights, prepared once; the others say why."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecap.benchmarks import prepare_peers as module
from edgecap.benchmarks.bench import bench
from edgecap.benchmarks.peers import CHECKPOINT, PEERS, PUBLISHED, Model
from edgecap.benchmarks.prepare_peers import prepare_peers
from edgecap.benchmarks.runner import run_script
from edgecap.benchmarks.subjects import Subject, bundle_subject
from edgecap.benchmarks.suite import Settings
from edgecap.cli import cli
from edgecap.runtime.errors import UsageError

from .lineage import RECIPE, write_bundle_of

GRU = Model("mobilenet_v2", "linear", "gru", source=CHECKPOINT)
MODA = Model("clip", "mlp", "opt", source=CHECKPOINT)
GPT2 = Model("mobilenet_v2", "prefix", "gpt2", source=CHECKPOINT)
SMOLVLM = Model("siglip", "pixel_shuffle", "llama", source=PUBLISHED)
ANY = ("torch", "torch_compile", "onnxruntime", "openvino")
SHA = hashlib.sha256(b"weights").hexdigest()
NO_PARTS = r"knows no captioner of mobilenet_v2 × prefix × gpt2"


@pytest.mark.parametrize(
    ("model", "runs", "words"),
    [
        (GRU, ANY, {"llama_cpp": r"not this decoder \(gru\)", "optimum_onnx": "no captioner of mobilenet_v2"}),
        (MODA, ANY, {"llama_cpp": "OPT is not an architecture", "onnxruntime_genai": "knows no captioner of clip"}),
        (GPT2, (*ANY, "llama_cpp"), {"transformers": NO_PARTS, "optimum_intel": NO_PARTS, "openvino_genai": NO_PARTS}),
        (SMOLVLM, tuple(kind for kind in PEERS if kind != "optimum_onnx"), {"optimum_onnx": "exports no SmolVLM"}),
        (replace(SMOLVLM, beam=3), ANY, {"llama_cpp": "beam 1, not 3", "transformers": "beam 1, not 3"}),
        (replace(SMOLVLM, tiles=True), (), {"onnxruntime": "--no-tiles", "llama_cpp": "--no-tiles"}),
        (
            replace(SMOLVLM, smaller=True),
            (*ANY, "transformers", "llama_cpp", "onnxruntime_genai"),
            {"optimum_intel": "512 px alone", "openvino_genai": "512 px alone"},
        ),
        (replace(SMOLVLM, source=CHECKPOINT), (*ANY, "llama_cpp"), {"transformers": "a checkpoint of edgecap"}),
    ],
)
def test_which_peers_run_a_model(model: Model, runs: Sequence[str], words: dict[str, str]) -> None:
    reasons = {kind: peer.refuses(model) for kind, peer in PEERS.items()}
    assert [kind for kind, reason in reasons.items() if reason is None] == [kind for kind in PEERS if kind in runs]
    for kind, reason in reasons.items():
        assert reason is None or "\n" not in reason
        if kind in words:
            assert reason is not None and re.search(words[kind], reason)


@pytest.mark.parametrize(
    ("kind", "bits", "precision"),
    [("torch", 8, "fp32"), ("onnxruntime", 8, "int8"), ("onnxruntime", 16, "fp32"), ("llama_cpp", 32, "f16")],
)
def test_a_peer_has_the_bundle_s_bits_or_the_next_more_or_its_most(kind: str, bits: int, precision: str) -> None:
    peer = PEERS[kind]
    assert peer.precisions[peer.bits(bits)] == precision


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder of the shape of a checkpoint, whose weights are no such thing."""
    folder = tmp_path / "kept" / "small"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The scripts of peers that would run: they are listed, and write nothing."""
    ran: list[list[str]] = []
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "run_script", lambda command, timeout: ran.append([str(part) for part in command]))
    return ran


def kinds(monkeypatch: pytest.MonkeyPatch, *wanted: str) -> None:
    monkeypatch.setattr(module, "PEERS", {kind: peer for kind, peer in PEERS.items() if kind in wanted})


def subject(path: Path, **more: Any) -> Subject:
    return replace(bundle_subject(path)[0], **more)


def test_weights_are_found_by_their_hash(
    tmp_path: Path, checkpoint: Path, scripts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds(monkeypatch, "torch")
    bundle = subject(write_bundle_of(tmp_path / "x.edgecap", SHA))
    (missing,) = prepare_peers([bundle], runs=tmp_path / "none")
    assert missing.refused == "needs its checkpoint: --checkpoint DIR" and missing.peer_of == ("x",)
    for found in (prepare_peers([bundle], runs=tmp_path / "kept"), prepare_peers([bundle], checkpoints=[checkpoint])):
        assert [(each.path, each.refused, each.name) for each in found] == [(checkpoint, None, "torch fp32 small")]
        assert found[0].command[-1] == PEERS["torch"].module and found[0].facts == {"precision": "fp32"}
    near = subject(write_bundle_of(checkpoint.parent / "x.edgecap", SHA))
    assert prepare_peers([near], runs=tmp_path / "none")[0].path.resolve() == checkpoint.resolve()
    assert [command[-1] for command in scripts] == ["--installed"] * 3


def test_a_folder_that_belongs_to_no_bundle_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    bundle = subject(write_bundle_of(tmp_path / "x.edgecap", "0" * 64))
    with pytest.raises(UsageError, match="belongs to no bundle here"):
        prepare_peers([bundle], checkpoints=[checkpoint])
    with pytest.raises(UsageError, match="neither a checkpoint nor a Hugging Face directory"):
        prepare_peers([bundle], checkpoints=[tmp_path])


def test_a_bundle_that_was_imported_has_no_peers(tmp_path: Path) -> None:
    path = write_bundle_of(tmp_path / "x.edgecap", "")
    assert {each.refused for each in prepare_peers([subject(path)])} == {
        "the bundle's lineage names no checkpoint: it was not exported from one"
    }


def test_what_is_prepared_is_kept_and_made_of_what_lies_before_it(
    tmp_path: Path, checkpoint: Path, scripts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds(monkeypatch, "onnxruntime", "openvino")
    bundles = [
        subject(write_bundle_of(tmp_path / f"{name}.edgecap", SHA, precision=name)) for name in ("fp32", "int8", "int4")
    ]
    said: list[str] = []
    progress: Any = lambda phase, done, total: said.append(phase) if not done else None  # noqa: E731
    found = prepare_peers(bundles, checkpoints=[checkpoint], progress=progress)
    assert [each.facts["precision"] for each in found] == ["fp32", "fp32", "int8", "int8", "int4", "int4"]
    assert said[0] == "prepare onnxruntime fp32 of small" and len(said) == len(set(said)) == 6
    made = [command for command in scripts if "--installed" not in command]
    assert len(made) == 6 and "--graphs" not in made[0]
    graphs = {command[command.index("--graphs") + 1] for command in made[1:]}
    assert graphs == {str(found[0].path)}
    assert all(each.path.is_dir() and each.path.parent == tmp_path / "cache" / "peers" for each in found)
    again = prepare_peers(bundles, checkpoints=[checkpoint], progress=progress)
    assert [each.path for each in again] == [each.path for each in found] and len(said) == 6


def test_one_peer_serves_two_bundles_where_it_is_the_same(
    tmp_path: Path, checkpoint: Path, scripts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds(monkeypatch, "torch", "llama_cpp")
    paths = [write_bundle_of(tmp_path / f"{name}.edgecap", SHA, precision=name) for name in ("fp32", "int8")]
    two = [subject(path) for path in paths]
    found = prepare_peers([*two, subject(paths[0], name="fp32 beam 3", decoding={"beam": 3})], checkpoints=[checkpoint])
    assert [(each.name, each.peer_of) for each in found] == [
        ("torch fp32 small", ("fp32", "int8")),
        ("llama_cpp small", ("fp32", "int8")),
        ("torch fp32 small beam 3", ("fp32 beam 3",)),
        ("llama_cpp small", ("fp32 beam 3",)),
    ]


def test_a_pruned_bundle_has_the_peers_of_the_whole_one(
    tmp_path: Path, checkpoint: Path, scripts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds(monkeypatch, "torch", "llama_cpp")
    whole = subject(write_bundle_of(tmp_path / "whole.edgecap", SHA))
    pruned = subject(write_bundle_of(tmp_path / "pruned.edgecap", "1" * 64))
    pruned = replace(pruned, facts={**pruned.facts, "pruned_from": SHA})
    found = prepare_peers([pruned, whole], checkpoints=[checkpoint])
    assert [(each.kind, each.peer_of) for each in found] == [
        ("torch", ("whole", "pruned")),
        ("llama_cpp", ("whole", "pruned")),
    ]
    otherwise = replace(pruned, decoding={"beam": 3})  # and so no peer searches as it does
    assert ("pruned",) in [each.peer_of for each in prepare_peers([otherwise, whole], checkpoints=[checkpoint])]


def test_a_script_that_fails_gives_its_reason_and_leaves_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds(monkeypatch, "onnxruntime", "torch")
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    answers = {"--installed": None}
    monkeypatch.setattr(module, "run_script", lambda command, timeout: answers.get(command[-1], "no such layer"))
    bundle = subject(write_bundle_of(tmp_path / "x.edgecap", SHA))
    torch, plain = prepare_peers([bundle], checkpoints=[checkpoint])
    assert torch.refused is None and plain.refused == "could not be prepared: no such layer"
    assert not list((tmp_path / "cache" / "peers").iterdir())
    monkeypatch.setattr(module, "run_script", lambda command, timeout: "onnxruntime is not installed for python")
    assert {each.refused for each in prepare_peers([bundle], checkpoints=[checkpoint])} == {
        "onnxruntime is not installed for python"
    }


def test_the_last_line_of_a_script_is_its_reason(tmp_path: Path) -> None:
    code = "import sys; print('much'); sys.exit('first\\nlast  ')"
    assert run_script([sys.executable, "-c", code], timeout=60) == "last"
    assert run_script([sys.executable, "-c", "raise SystemExit(3)"], timeout=60) == "its script ended with exit code 3"
    assert run_script([sys.executable, "-c", ""], timeout=60) is None
    assert "could not be started" in str(run_script([str(tmp_path / "none")], timeout=60))


def test_a_script_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']);"
    code += f" open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(99)"
    assert "not ready within 2 s" in str(run_script([sys.executable, "-c", code], timeout=2))
    if sys.platform == "linux" and child.exists() and child.read_text():
        state = Path(f"/proc/{child.read_text()}/stat")
        for _ in range(50):
            if not state.exists() or ") Z " in state.read_text():
                return
            time.sleep(0.1)
        pytest.fail("its child goes on")


def test_a_smolvlm_s_directory_is_taken_by_its_name_and_checked_first(
    tmp_path: Path, scripts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds(monkeypatch, "torch", "openvino_genai", "optimum_intel", "llama_cpp")
    parts = {"encoder": {"kind": "siglip", "source": "org/Smol"}, "bridge": {"kind": "pixel_shuffle"}}
    recipe = RECIPE | parts | {"decoder": {"kind": "llama"}, "prompt": {"chat": "What?"}}
    path = write_bundle_of(tmp_path / "x.edgecap", "1" * 64, recipe=recipe, precision="int8")
    (tmp_path / "Smol").mkdir()
    (tmp_path / "Smol" / "config.json").write_text("{}")
    found = prepare_peers([subject(path)], runs=tmp_path / "none")
    assert {each.kind: each.refused for each in found} == dict.fromkeys(module.PEERS)
    made = [command for command in scripts if "--installed" not in command]
    assert made[0][2] == PEERS["torch"].module and "--bundle" in made[0]
    vlm = {command[2].rpartition(".")[2]: command for command in made[1:]}
    assert list(vlm) == ["optimum_intel", "openvino_genai", "llama_cpp"]
    assert vlm["optimum_intel"][3] == vlm["llama_cpp"][3] == str(tmp_path / "Smol")
    assert vlm["optimum_intel"][5:7] == ["--precision", "int8"] and vlm["llama_cpp"][6] == "q8_0"
    assert "optimum_intel-int8" in vlm["openvino_genai"][3] and "--precision" not in vlm["openvino_genai"]
    assert vlm["llama_cpp"][-2:] == ["--chat", "What?"]


def test_a_refused_peer_is_a_row_of_the_record_and_a_line_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds(monkeypatch, "llama_cpp", "torch")
    path = write_bundle_of(tmp_path / "x.edgecap", "0" * 64)
    quick = Settings(
        rounds=3, min_runs=3, min_seconds=0.01, warmup=1, cold_starts=0, memory_photos=1, limit_seconds=0.0
    )
    record = bench([path], all_peers=True, runs=tmp_path, settings=quick)
    first, *others = record["rows"]
    assert first["status"] == "ok" and first["peer_of"] == []
    assert [(row["status"], row["peer_of"], row["latency"], row["captions"]) for row in others] == [
        ("refused", ["x"], None, None)
    ] * 2
    assert others[0]["error"] == "needs its checkpoint: --checkpoint DIR"
    assert "not this decoder" in others[1]["error"]
    json.dumps(record, allow_nan=False)


def test_checkpoint_goes_with_peers(tmp_path: Path) -> None:
    path = write_bundle_of(tmp_path / "x.edgecap", "0" * 64)
    result = CliRunner().invoke(cli, ["bench", str(path), "--checkpoint", str(tmp_path)])
    assert isinstance(result.exception, UsageError) and "add --peers" in result.exception.message
    result = CliRunner().invoke(cli, ["bench", str(path), "--peers", "--device", "browser"])
    assert isinstance(result.exception, UsageError)
