"""`edgecap score`: the files it reads, the one line it says of bad ones, and METEOR through Java."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgecap.benchmarks.metrics import caption_metrics
from edgecap.benchmarks.metrics.coco import read_references, read_results
from edgecap.benchmarks.metrics.external import java_metric
from edgecap.cli import cli
from edgecap.runtime.errors import EdgecapError, MissingExtra, UsageError

RESULTS = [{"image_id": 1, "caption": "A dog runs."}, {"image_id": 2, "caption": "Two cats sit on a red mat"}]
ANNOTATIONS = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "A dog is running."},
        {"id": 11, "image_id": 2, "caption": "Two cats on a mat"},
        {"id": 12, "image_id": 1, "caption": "the brown dog runs fast"},
    ],
}
PLAIN = {"1": ["A dog is running.", "the brown dog runs fast"], "2": ["Two cats on a mat"]}


def score(folder: Path, results: Any, references: Any, *flags: str) -> Result:
    """Run the command on files with this content (text as it is, everything else as JSON)."""
    paths = []
    for name, content in (("R.json", results), ("C.json", references)):
        paths.append(folder / name)
        paths[-1].write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return CliRunner().invoke(
        cli, ["score", "--results", str(paths[0]), "--references", str(paths[1]), *flags], catch_exceptions=True
    )


@pytest.mark.parametrize("references", [ANNOTATIONS, PLAIN], ids=["coco", "plain"])
def test_json_holds_what_the_library_gives(tmp_path: Path, references: Any) -> None:
    result = score(tmp_path, RESULTS, references, "--json")
    expected = caption_metrics({"1": "A dog runs.", "2": "Two cats sit on a red mat"}, PLAIN).to_dict()
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == expected


def test_table_shows_every_metric(tmp_path: Path) -> None:
    result = score(tmp_path, RESULTS, ANNOTATIONS)
    figures = json.loads(score(tmp_path, RESULTS, ANNOTATIONS, "--json").stdout)
    assert result.exit_code == 0
    for name in ("CIDEr", "BLEU-4", "ROUGE-L", "distinct", "mean length", "2 photos"):
        assert name in result.stdout
    assert f"{figures['cider']:.4f}" in result.stdout and f"{figures['cider_interval']['low']:.4f} –" in result.stdout


@pytest.mark.parametrize(
    ("results", "references", "message"),
    [
        ("[{]", PLAIN, "R.json, line 1, column 3: not JSON"),
        ('[\n {"image_id": 1,}\n]', PLAIN, "R.json, line 2, column "),
        ({"a": 1}, PLAIN, "R.json: expected a list of"),
        ([3], PLAIN, "R.json, entry 1: expected an object, found a number"),
        ([{"caption": "x"}], PLAIN, "R.json, entry 1: image_id must be"),
        ([{"image_id": True, "caption": "x"}], PLAIN, "R.json, entry 1: image_id must be"),
        ([{"image_id": 1, "caption": None}], PLAIN, "R.json, entry 1 (image_id 1): caption must be a text"),
        ([*RESULTS, RESULTS[0]], PLAIN, "R.json, entry 3: image_id 1 has a caption already"),
        ([], PLAIN, "no captions to score"),
        (RESULTS, [], "C.json: expected COCO annotations"),
        (RESULTS, {"1": "a dog"}, "C.json: the references of '1' must be a list of texts"),
        (RESULTS, {"annotations": [{"image_id": 1}]}, "C.json, annotation 1 (image_id 1): caption must be"),
        (RESULTS, {"1": ["a dog"]}, "photo '2' has a caption but no references"),
        (RESULTS[:1], PLAIN, "1 of 2 photos with references have no caption, the first is '2'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, results: Any, references: Any, message: str) -> None:
    result = score(tmp_path, results, references)
    assert isinstance(result.exception, UsageError) and result.exception.exit_code == 2
    assert message in result.exception.message
    assert "\n" not in result.exception.message and result.stdout == ""


def test_a_missing_file_and_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.json cannot be read: No such file"):
        read_results(tmp_path / "nowhere.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"x.json: not UTF-8 text \(byte 0\)"):
        read_references(tmp_path / "x.json")


def test_numbers_and_texts_name_the_same_photo(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('\ufeff[{"image_id": 42, "caption": "a"}]', encoding="utf-8")
    (tmp_path / "c.json").write_text('{"42": ["a"]}', encoding="utf-8")
    assert read_results(tmp_path / "r.json").keys() == read_references(tmp_path / "c.json").keys()


def test_without_java_or_the_package_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    error = score(tmp_path, RESULTS, PLAIN, "--meteor").exception
    assert isinstance(error, UsageError) and "METEOR needs Java" in error.message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = score(tmp_path, RESULTS, PLAIN, "--spice").exception
    assert isinstance(error, MissingExtra) and error.message.endswith("pip install 'edgecap[bench]'")


def test_meteor_is_pycocoevalcaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("pycocoevalcap.meteor.meteor", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("no java on the PATH")
    seen: list[Any] = []
    compute = module.Meteor.compute_score
    monkeypatch.setattr(
        module.Meteor, "compute_score", lambda self, *args: seen.append((args, compute(self, *args))) or seen[0][1]
    )
    result = score(tmp_path, RESULTS, ANNOTATIONS, "--meteor", "--json")
    assert result.exit_code == 0, result.output
    ((wanted, said), (expected, _)) = seen[0]
    assert list(wanted.values()) == [["a dog is running", "the brown dog runs fast"], ["two cats on a mat"]]
    assert list(said.values()) == [["a dog runs"], ["two cats sit on a red mat"]]
    assert 0.2 < json.loads(result.stdout)["meteor"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["meteor", "spice"])
def test_a_java_program_that_fails_is_one_line(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")

    class Broken:
        def compute_score(self, wanted: dict, said: dict) -> tuple[float, list]:
            print("progress")
            raise BrokenPipeError(32, "Broken pipe")

    module, name = {"meteor": ("meteor.meteor", "Meteor"), "spice": ("spice.spice", "Spice")}[metric]
    monkeypatch.setitem(sys.modules, f"pycocoevalcap.{module}", type("Fake", (), {name: Broken}))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(EdgecapError, match=f"{metric.upper()} gave no score .*Broken pipe"):
        java_metric(metric, {1: "a dog"}, {1: ["a dog"]})
    assert "progress" not in capsys.readouterr().out
