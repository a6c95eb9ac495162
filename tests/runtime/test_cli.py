"""edgecap caption, inspect and verify: what is printed where, exit codes, and never a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgecap.cli import cli

from .graphs import photo


def edgecap(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The real process, as a shell runs it."""
    command = [sys.executable, "-m", "edgecap", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for i in range(3):
        photo(i).save(folder / f"{i}.png")
    return folder


def run(*arguments: object, stdin: str = "") -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_caption_of_one_photo(bundle_path, album, captioner):
    path = album / "0.png"
    assert run("caption", bundle_path, path) == captioner(path).text + "\n"
    beam = captioner(path, beam=3, prompt="the blue")
    assert run("caption", bundle_path, path, "--beam", 3, "--prompt", "the blue", "--threads", 1) == beam.text + "\n"


def test_captions_of_a_folder(bundle_path, album, captioner):
    expected = [f"{album / name}\t{captioner(album / name)}" for name in ("0.png", "1.png", "2.png")]
    assert run("caption", bundle_path, album).splitlines() == expected
    listed = "".join(f"{album / name}\n" for name in ("0.png", "1.png", "2.png"))
    assert run("caption", bundle_path, "-", stdin=listed).splitlines() == expected


def test_caption_as_json(bundle_path, album, captioner):
    lines = [json.loads(line) for line in run("caption", bundle_path, album, "--beam", 2, "--json").splitlines()]
    assert [line["source"] for line in lines] == [str(album / f"{i}.png") for i in range(3)]
    for line in lines:
        expected = captioner(line["source"], beam=2)
        assert line["caption"] == expected.text and tuple(line["tokens"]) == expected.token_ids
        assert line["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
        assert [other["caption"] for other in line["alternatives"]] == [expected.alternatives[0].text]
    (line,) = map(json.loads, run("caption", bundle_path, album / "0.png", "--json").splitlines())
    assert "alternatives" not in line


def test_bad_photos_among_good_ones(bundle_path, album):
    (album / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    done = edgecap("caption", bundle_path, album, album / "none.jpg")
    assert done.returncode == 1
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [str(album / "0.png"), str(album / "2.png")]
    errors = done.stderr.splitlines()
    assert [line.startswith("Error: ") for line in errors] == [True, True, False, False, False, False]
    assert errors[2].startswith("2 photos, ") and errors[2].endswith(" photos/s")
    assert errors[3] == "2 could not be captioned:"
    assert str(album / "1.png") in errors[4] and str(album / "none.jpg") in errors[5]

    done = edgecap("caption", bundle_path, album, "--json")
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in line for line in lines] == [False, True, False]


def test_one_bad_photo_is_one_line(bundle_path, tmp_path):
    done = edgecap("caption", bundle_path, tmp_path / "none.jpg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path / 'none.jpg'}: there is no such file\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are no Unicode")
def test_file_names_that_are_no_unicode(bundle_path, album):
    os.rename(album / "0.png", os.fsencode(album) + b"/\xff.png")
    done = edgecap("caption", bundle_path, album)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("command", ["caption", "inspect", "verify"])
def test_no_bundle(command, tmp_path, album):
    photos = [album] if command == "caption" else []
    done = edgecap(command, tmp_path / "none.edgecap", *photos)
    assert done.returncode == 2
    assert done.stderr == f"Error: {tmp_path / 'none.edgecap'}: there is no such bundle\n"


@pytest.mark.parametrize("command", ["caption", "inspect", "verify"])
def test_changed_bundle(command, bundle_copy, album):
    data = bytearray((bundle_copy / "encoder.onnx").read_bytes())
    data[100] ^= 4
    (bundle_copy / "encoder.onnx").write_bytes(data)
    done = edgecap(command, bundle_copy, *([album] if command == "caption" else []))
    assert done.returncode == 2 and done.stdout == ""
    assert "encoder.onnx is not the file that was exported" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("wrong", [["--beam", "0"], ["--threads", "x"], ["--colour"]], ids=" ".join)
def test_bad_usage(bundle_path, album, wrong):
    assert edgecap("caption", bundle_path, album, *wrong).returncode == 2


def test_words_that_the_model_does_not_know(bundle_path, album):
    done = edgecap("caption", bundle_path, album, "--prompt", "zeppelin")
    assert done.returncode == 2 and done.stdout == "" and "zeppelin" in done.stderr


def test_inspect(bundle_path):
    text = run("inspect", bundle_path)
    for part in ("onnx-fp32", "16×16", "squash", "encoder.onnx", "export", "cosine 1", "identical_captions", "0.9"):
        assert part in text
    values = json.loads(run("inspect", bundle_path, "--json"))
    assert values["manifest"]["name"] == "tiny" and values["bytes"] > 1000 and len(values["sha256"]) == 64


def test_inspect_does_not_obey_markup(bundle_copy):
    from .test_bundle import change_manifest

    change_manifest(bundle_copy, lambda values: {**values, "name": "[bold]x[/bold][/nothing]"})
    assert "[bold]x[/bold][/nothing]" in run("inspect", bundle_copy)


def test_verify(bundle_path, bundle_copy):
    assert "verified yes" in run("verify", bundle_path)
    assert json.loads(run("verify", bundle_path, "--json"))["ok"] is True

    from .test_bundle import change_manifest

    def change(values):
        values["golden"]["token_ids"][0] ^= 1

    change_manifest(bundle_copy, change)
    done = edgecap("verify", bundle_copy)
    assert done.returncode == 1 and "differ at position 0" in done.stdout
    done = edgecap("verify", bundle_copy, "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["tokens_differ_at"] == 0
