"""The command `edgecap bench` on tiny bundles: what it chooses and refuses, what it prints, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from edgecap.benchmarks.bench import bench, choose
from edgecap.benchmarks.subjects import Origin, Subject, newest_bundle, unique_names, ways
from edgecap.cli import cli
from edgecap.runtime.errors import EdgecapError, UsageError

from ..runtime.graphs import write_gru_bundle
from .lineage import DATA, QUICK


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


# --- what is measured ---------------------------------------------------------------------------------


def test_without_a_bundle_the_newest_is_meant(folder: Path) -> None:
    assert newest_bundle(folder / "runs").name == "second.edgecap"
    ((subject,), origin) = choose([], [], runs=folder / "runs")
    assert subject.name == "second" and origin == Origin(DATA, skip_bad=False)


def test_a_folder_without_a_manifest_is_no_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "half.edgecap").mkdir(parents=True)
    with pytest.raises(UsageError, match="run edgecap export first"):
        newest_bundle(tmp_path / "runs")


def test_the_beam_that_is_asked_for_replaces_every_bundle_s_own(folder: Path) -> None:
    path = folder / "runs" / "first.edgecap"
    (own,), _ = choose([path], [])
    (asked,), _ = choose([path], [], beams=[3])
    assert own.decoding["beam"] == 1
    assert asked.decoding == {**own.decoding, "beam": 3}


def test_peers_decode_as_the_first_bundle_does(folder: Path) -> None:
    subjects, _ = choose([folder / "runs" / "first.edgecap"], [f"torch:{folder}"], beams=[2])
    assert subjects[1].decoding == subjects[0].decoding


def test_the_same_bundle_twice_has_two_names(folder: Path) -> None:
    path = folder / "runs" / "first.edgecap"
    subjects, _ = choose([path, path], [])
    assert [subject.name for subject in subjects] == ["first", "first #2"]


def test_a_bundle_with_a_fused_graph_is_a_second_row_that_says_so(folder: Path) -> None:
    (plain,), _ = choose([folder / "runs" / "first.edgecap"], [])
    assert ways(plain) == [plain] and plain.facts["run_by"] == "graphs"
    subject = replace(plain, facts={**plain.facts, "graphs": ["decoder", "encoder", "fused"]})
    first, second = ways(subject)
    assert first == subject and (second.name, second.fused) == ("first fused", True)
    assert (second.facts["run_by"], second.facts["of"]) == ("fused", "first")


def test_names_that_occur_twice_are_told_apart(tmp_path: Path) -> None:
    def names(*subjects: Subject) -> list[str]:
        return [subject.name for subject in unique_names(subjects)]

    paths = [tmp_path / name for name in ("one/runs/a", "two/runs/a", "other/a")]
    assert names(*(Subject("a", "bundle", path, ()) for path in paths)) == ["one/runs/a", "two/runs/a", "other/a"]
    peers = [Subject("torch moda", "torch", path, (), peer_of=(name,)) for path, name in zip(paths, "xyz", strict=True)]
    assert names(*peers) == ["torch moda of x", "torch moda of y", "torch moda of z"]
    twice = Subject("b", "bundle", tmp_path, ())
    assert names(twice, replace(twice, name="b #2"), twice) == ["b", "b #2", "b #3"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--device", "raspberry-pi-5"], r"raspberry-pi-5 \(over ssh\): name its host"),
        (["nowhere.edgecap"], "nowhere.edgecap: there is no such bundle"),
        (["--peer", "pigeon:x", "BUNDLE"], "unknown peer 'pigeon:x'; there are torch:CHECKPOINT"),
        (["--peer", "torch:nowhere", "BUNDLE"], "there is nothing at nowhere"),
        (["--data", "sunsets", "BUNDLE"], "unknown data set 'sunsets'"),
        (["--split", "best", "BUNDLE"], "no split 'best'"),
        (["--json", "BUNDLE", "BUNDLE"], "cannot write to"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder: Path, arguments: list[str], said: str) -> None:
    bundle = str(folder / "runs" / "first.edgecap")
    result = invoke(*(bundle if argument == "BUNDLE" else argument for argument in arguments))
    assert isinstance(result.exception, EdgecapError) and result.exception.exit_code == 2
    assert re.search(said, result.exception.message) and "\n" not in result.exception.message


def test_a_bundle_that_was_changed_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write_gru_bundle(tmp_path / "x.edgecap")
    (tmp_path / "x.edgecap" / "decoder.onnx").write_bytes(b"other")
    with pytest.raises(EdgecapError, match="decoder.onnx has 5 bytes instead"):
        choose([tmp_path / "x.edgecap"], [])


def test_a_bundle_without_data_in_its_lineage_needs_data(tmp_path: Path) -> None:
    write_gru_bundle(tmp_path / "x.edgecap", lineage={"passes": []})
    with pytest.raises(UsageError, match="name some with --data"):
        bench([tmp_path / "x.edgecap"], settings=QUICK)


def test_data_whose_folder_the_bundle_does_not_know_must_be_named(tmp_path: Path) -> None:
    write_gru_bundle(tmp_path / "x.edgecap", lineage={"data": "flickr8k", "passes": []})
    with pytest.raises(UsageError, match=r"was trained on flickr8k; name the data with --data \(.*flickr8k:DIR"):
        bench([tmp_path / "x.edgecap"], settings=QUICK)


@pytest.fixture(scope="module")
def one_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos of which one in test does not decode."""
    from edgecap.benchmarks.datasets import open_dataset
    from edgecap.benchmarks.datasets.summary import write_sample

    path = tmp_path_factory.mktemp("photos")
    write_sample(open_dataset("scenes:train=2,val=2,test=6,size=32"), 6, path)
    broken = sorted(path.glob("test_*.jpg"))[4]
    broken.write_bytes(broken.read_bytes()[:300])
    return path


def test_a_photo_that_does_not_decode_is_one_line_before_anything_is_measured(folder: Path, one_broken: Path) -> None:
    result = invoke(folder / "runs" / "first.edgecap", "--data", f"folder:{one_broken}")
    assert isinstance(result.exception, UsageError)
    said = r"1 bad example .*broken image \(truncated file\)\): .* leave these out with --skip-bad"
    assert re.search(said, result.exception.message)


@pytest.mark.parametrize("by", ["option", "recipe"])
def test_bad_photos_are_left_out_when_asked_for_here_or_in_training(by: str, one_broken: Path, tmp_path: Path) -> None:
    recipe = {"data": {"skip_bad": by == "recipe"}}
    lineage = {"data": "folder", "checkpoint": {"recipe": recipe, "metrics": {}}, "passes": []}
    path = tmp_path / "x.edgecap"
    write_gru_bundle(path, lineage=lineage)
    found = bench([path], data=f"folder:{one_broken}", skip_bad=by == "option", settings=QUICK)
    assert found["rows"][0]["status"] == "ok" and found["data"]["photos"] == 5


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["--device", "cpu", "--rounds", "10", "--limit", "4", "--json", "-", "--history", "runs/bench.jsonl"]
    arguments += ["--report", "runs/bench.html", "--embed-photos"]
    return subprocess.run(
        [sys.executable, "-m", "edgecap", "bench", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_json_on_stdout_is_the_record_alone(command: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert command.returncode == 0, command.stderr
    found = json.loads(command.stdout)
    assert [row["name"] for row in found["rows"]] == ["second"] and found["data"]["photos"] == 4
    latency = found["rows"][0]["latency"]
    assert latency["end_to_end"]["runs"] >= 30
    line = json.loads((folder / "runs" / "bench.jsonl").read_text())
    assert line["rows"][0]["sha256"] == found["rows"][0]["sha256"]


def test_the_report_is_written_with_the_photos_asked_for(
    command: subprocess.CompletedProcess[str], folder: Path
) -> None:
    html = (folder / "runs" / "bench.html").read_text()
    assert html.count('<img src="data:image/jpeg;base64,') == 4 and "the history held no record yet" in html


def test_progress_goes_to_stderr(command: subprocess.CompletedProcess[str]) -> None:
    assert command.stderr.split() == "photos: 4 limits: 2 cold start: 12 latency: 10".split()


@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_ctrl_c_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    """Interrupted while workers run: no record, no history line, no temporary file, no process."""
    temporary, out = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    out.mkdir()
    command = [sys.executable, "-m", "edgecap", "bench", "--rounds", "2000"]
    command += ["--json", str(out / "r.json"), "--history", str(out / "h.jsonl")]
    environment = os.environ | {"TMPDIR": str(temporary)}
    options = {"cwd": folder, "env": environment, "stderr": subprocess.PIPE, "text": True}

    def listen() -> None:  # a shell's background jobs inherit that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=listen, **options) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("latency"):
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in said and "nothing is written" in said
    assert not any(worker.is_running() for worker in workers)
    assert not list(temporary.glob("edgecap*")) and not list(out.iterdir())
