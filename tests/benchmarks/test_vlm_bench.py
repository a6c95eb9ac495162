"""SmolVLM side by side: one caption of each row a round; a row that fails says why, and the others go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecap.benchmarks import vlm
from edgecap.benchmarks.latency import STAGES
from edgecap.benchmarks.peers.vlm import Task, new_task
from edgecap.benchmarks.record import dumps, parse
from edgecap.benchmarks.report import show
from edgecap.benchmarks.report_html import html
from edgecap.benchmarks.report_markdown import markdown
from edgecap.benchmarks.runner import Worker, WorkerFailed
from edgecap.benchmarks.subjects import Subject, peer_subject
from edgecap.benchmarks.worker import Marks, watched
from edgecap.runtime.errors import UsageError

from ..runtime.graphs import write_gru_bundle

TOKENS = 5
SMOLVLM = {"vision_config": {"patch_size": 16, "image_size": 512}, "scale_factor": 4}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vlm") / "small.edgecap"
    write_gru_bundle(path, 0)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm.draw(tmp_path_factory.mktemp("vlm") / "p.png", 64)


def failed(folder: Path) -> Path:
    folder.mkdir()
    Task("llama_cpp", "m", "q8_0", "What?", 512, 64, failed="no such engine here").write(folder)
    return folder


def test_rows_of_one_run(bundle: Path, photo: Path, tmp_path: Path) -> None:
    subjects = [vlm.subject(path, TOKENS) for path in (bundle, bundle, failed(tmp_path / "x"))]
    record = vlm.run(subjects, photo, rounds=2, starts=1)
    first, second, third = record["rows"]
    times = first["latency"]
    assert first["error"] is None and first["tokens"] == TOKENS == first["same_tokens"] == second["same_tokens"]
    assert times["ttft"]["p50"] + 4 * times["next_token"]["p50"] <= times["end_to_end"]["p50"]
    assert times["ttft"]["runs"] == 2 and times["tokens_per_s"] > 0 and not first["quality"]
    assert second["logits"]["min_cosine"] == pytest.approx(1) and second["logits"]["positions"] == TOKENS
    assert set(second["speedup"][first["name"]]) == set(STAGES) - {"picture_to_text"}
    assert [row["timed_by"] for row in record["rows"]] == ["once", "once", None]
    assert first["bytes"]["total"] > 0 and first["cold_start"]["seconds"] > 0 and first["memory"]["peak_rss"]
    assert third["error"] == "cold start: could not be made: no such engine here"
    assert parse(dumps(record)) == record
    show(record)
    markdown(record)
    pytest.importorskip("jinja2", reason="the report needs the extra `bench`")
    assert first["name"] in html(record)


def test_a_first_row_that_fails_leaves_the_others_without_ratios(bundle: Path, photo: Path, tmp_path: Path) -> None:
    subjects = [vlm.subject(path, 1) for path in (failed(tmp_path / "x"), bundle)]
    record = vlm.run(subjects, photo, rounds=2, starts=0)
    first, second = record["rows"]
    assert first["error"] and not second["speedup"] and second["latency"]["tokens_per_s"] is None
    assert "same_tokens" not in second
    vlm.show(record)


def test_the_command(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgecap.benchmarks.vlm", "run", str(bundle), "--rounds", "2", "--starts", "0"]
    done = subprocess.run(
        [*command, "--tokens", "3", "--json", str(tmp_path / "r.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["settings"]["rounds"] == 2
    assert record["rows"][0]["decoding"]["min_length"] == record["rows"][0]["decoding"]["max_length"] == 3
    assert "| small |" in done.stdout and "limits with 1 thread" in done.stdout
    for more, said in (
        (["no"], "there is no such bundle"),
        ([str(bundle), "--picture", "no.png"], "the picture no.png cannot be read: No such file"),
    ):
        done = subprocess.run([*command[:4], *more], capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr


@pytest.mark.parametrize(
    ("size", "tokens"), [(512, 64), (256, 16), (500, "multiple of 64"), (0, "up to 512"), (1024, "not 1024")]
)
def test_sizes_that_a_model_takes(size: int, tokens: int | str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLVLM))
    if isinstance(tokens, int):
        assert new_task("llama_cpp", tmp_path, "q8_0", size).tokens == tokens
        return
    with pytest.raises(UsageError, match=tokens):
        new_task("llama_cpp", tmp_path, "q8_0", size)
    with pytest.raises(UsageError, match="no SmolVLM's directory"):
        new_task("llama_cpp", tmp_path / "none", "q8_0", 512)


def test_a_peer_that_cannot_be_made_says_why_in_its_row(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SMOLVLM))  # and no weights
    made = vlm.make(model, tmp_path / "peers", kinds=["llama_cpp"])
    assert [place.name for place in made] == ["llama_cpp-f16", "llama_cpp-q8_0", "llama_cpp-q4_0"]
    assert all(Task.read(place).failed for place in made)
    subject = peer_subject(f"llama_cpp:{made[0]}", {"beam": 1})
    with Worker(subject.command) as worker, pytest.raises(WorkerFailed, match="could not be made"):
        worker.ask("load", timeout=120, **subject.load_request(1))


def test_nothing_is_measured_of_an_engine_that_nobody_saw() -> None:
    class Blind:
        def pixels(self, photo: str) -> str:
            return photo

        def run(self, pixels: str, marks: Marks) -> list[int]:
            return [1]

    with pytest.raises(RuntimeError, match="nobody saw"):
        watched(Blind(), "p.png", Marks())


def test_one_round_is_none() -> None:
    with pytest.raises(UsageError, match="two rounds"):
        vlm.run([Subject("a", "b", Path(), ())], Path("p.png"), rounds=1)


def test_logits_are_compared_where_both_are_finite_and_came_by_the_same_tokens() -> None:
    rows: Any = np.array([[1.0, 2.0, -np.inf], [3.0, 4.0, 5.0], [0.0, 1.0, 0.0]])
    other = np.array([[2.0, 4.0, 9.0], [3.0, 4.5, 5.0], [1.0, 0.0, 0.0]])
    found = vlm.agreement(rows, other, 2)
    assert found is not None and found["positions"] == 2 and found["max_abs_difference"] == 2
    assert found["first_cosine"] == pytest.approx(1) and 0.99 < found["min_cosine"] < 0.9999
    assert vlm.agreement(rows, None, 2) is None and vlm.agreement(rows, np.ones((3, 2)), 2) is None


def test_the_pass_for_logits_loses_nothing_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.ones((3, 4), np.float32)
    nothing = np.full((2, 4), np.nan, np.float32)  # and fewer than tokens
    answers = {"a": ([1, 2, 3], logits), "b": ([1, 2, 3], nothing), "c": ([], logits)}

    def said(device: Any, subject: Subject, *_: Any) -> tuple[list[int], Any]:
        if subject.name == "d":
            raise OSError("no file")
        return answers[subject.name]

    monkeypatch.setattr(vlm, "said", said)
    subjects = [Subject(name, "b", Path(), ()) for name in "abcd"]
    record: dict[str, Any] = {"problems": [], "rows": [{"name": name, "status": "ok"} for name in "abcd"]}
    vlm.add_agreement(None, subjects, record, Path("p.png"), 1)  # type: ignore[arg-type]
    a, b, c, d = record["rows"]
    assert a["logits"]["min_cosine"] == pytest.approx(1) and a["logits"]["positions"] == 3
    assert b["logits"] == {"positions": 2, "max_abs_difference": 0.0, "min_cosine": None, "first_cosine": None}
    assert c["logits"] is None and "tokens" not in d
    assert record["problems"] == ["d, its tokens and logits: OSError: no file"]
    dumps(record)
    assert vlm.agreed(b["logits"]) == ("–, all ≥ –", "2", "0")
