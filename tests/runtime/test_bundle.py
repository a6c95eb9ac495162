"""A bundle is opened only if it is whole and untouched, and written all at once or not at all."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecap.runtime import Bundle, EdgecapError, UsageError, write_bundle
from edgecap.runtime import bundle as module

from .graphs import gru_graphs, manifest, tokenizer_json


def refusal(path: Path, verify: Any = "hash", kind: type[EdgecapError] = EdgecapError) -> str:
    with pytest.raises(kind) as caught:
        Bundle.open(path, verify)
    message = caught.value.message
    assert str(path) in message and len(message) < 600
    return message


def change_manifest(path: Path, change: Any) -> None:
    file = path / "bundle.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(change(values) or values))


def test_opens(bundle_path):
    for verify in ("hash", "sizes"):
        bundle = Bundle.open(bundle_path, verify)
        assert bundle.name == "tiny" and bundle.manifest["version"] == 1
    assert bundle.bytes == sum(file.stat().st_size for file in bundle_path.iterdir())
    assert bundle.file("encoder.onnx").read_bytes() == bundle.read("encoder.onnx")
    with pytest.raises(EdgecapError, match="not a file of this bundle"):
        bundle.file("../secret")


def test_flipped_byte(bundle_copy):
    file = bundle_copy / "decoder.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "decoder.onnx is not the file that was exported" in refusal(bundle_copy)
    Bundle.open(bundle_copy, "sizes")  # what skipping the hashes means


def test_truncated_file(bundle_copy):
    file = bundle_copy / "decoder.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert "decoder.onnx has" in refusal(bundle_copy, "sizes")


def test_missing_file(bundle_copy):
    (bundle_copy / "golden.npy").unlink()
    assert "golden.npy is missing" in refusal(bundle_copy)


def test_missing_manifest(bundle_copy):
    (bundle_copy / "bundle.json").unlink()
    message = refusal(bundle_copy)
    assert "incomplete" in message and "export it again" in message


def test_extra_file(bundle_copy):
    (bundle_copy / "notes.txt").write_text("mine")
    assert "notes.txt is not listed" in refusal(bundle_copy)


def test_extra_folder(bundle_copy):
    (bundle_copy / "weights").mkdir()
    assert "weights is not listed" in refusal(bundle_copy)


def test_what_file_managers_leave_is_no_matter(bundle_copy):
    (bundle_copy / ".DS_Store").write_bytes(b"x")
    Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["decoder.onnx", "bundle.json"])
def test_link(bundle_copy, tmp_path, name):
    (bundle_copy / name).rename(tmp_path / name)
    (bundle_copy / name).symlink_to(tmp_path / name)
    assert "link" in refusal(bundle_copy)


def test_folder_in_place_of_a_file(bundle_copy):
    (bundle_copy / "golden.npy").unlink()
    (bundle_copy / "golden.npy").mkdir()
    assert "golden.npy is not a plain file" in refusal(bundle_copy)


@pytest.mark.parametrize(
    "name",
    ["../evil.onnx", "/etc/passwd", "a/../b", "a//b", "a/", "a\\b", "C:evil", ".hidden", "", "x\n", "bundle.json"],
)
def test_path_that_leaves(bundle_copy, name):
    def change(values):
        values["files"][name] = values["files"]["encoder.onnx"]

    change_manifest(bundle_copy, change)
    assert "plain file name" in refusal(bundle_copy) or name == "bundle.json"


def test_graph_outside(bundle_copy):
    def change(values):
        values["graphs"]["encoder"]["file"] = "../encoder.onnx"

    change_manifest(bundle_copy, change)
    assert "graphs.encoder.file" in refusal(bundle_copy)


def test_newer_version(bundle_copy):
    change_manifest(bundle_copy, lambda values: {**values, "version": 2, "files": "otherwise"})
    message = refusal(bundle_copy)
    assert "version 2" in message and "upgrade edgecap" in message


def test_giant_claim(bundle_copy):
    def change(values):
        values["files"]["encoder.onnx"]["bytes"] = 2**40

    change_manifest(bundle_copy, change)
    assert "larger than a bundle may be" in refusal(bundle_copy)


def test_too_many_files(bundle_copy):
    def change(values):
        entry = values["files"]["encoder.onnx"]
        values["files"] |= {f"f{i}": entry for i in range(module.MAX_FILES)}

    change_manifest(bundle_copy, change)
    assert "more than the limit" in refusal(bundle_copy)


def test_giant_manifest(bundle_copy, monkeypatch):
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 100)
    assert "larger than 100 bytes" in refusal(bundle_copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.bin", pickle.dumps({"a": 1})),
        ("weights.pt", b"anything"),
        ("weights.bin", b"PK\x03\x04archive"),
        ("plugin.so", b"\x7fELF"),
    ],
)
def test_what_could_run_code(tmp_path, name, content):
    files, parts = gru_graphs()
    files |= {name: content, "tokenizer.json": tokenizer_json(), "golden.png": b"x", "golden.npy": b"x"}
    with pytest.raises(EdgecapError, match="pickle, archive or program"):
        write_bundle(tmp_path / "x.edgecap", manifest(parts), files)
    assert list(tmp_path.iterdir()) == []


def test_raw_weights_that_begin_like_a_pickle_pass(tmp_path):
    files, parts = gru_graphs()
    weights = b"\x80\x04" + bytes(64)
    files |= {"w.bin": weights, "tokenizer.json": tokenizer_json(), "golden.png": b"x", "golden.npy": b"x"}
    write_bundle(tmp_path / "x.edgecap", manifest(parts), files)


def test_no_bundle(tmp_path):
    assert "no such bundle" in refusal(tmp_path / "nothing", kind=UsageError)
    (tmp_path / "file").write_text("x")
    assert "a bundle is a folder" in refusal(tmp_path / "file", kind=UsageError)
    (tmp_path / "folder").mkdir()
    assert "incomplete" in refusal(tmp_path / "folder")


# --- malformed manifests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "1",
        '"x"',
        "\ufeff{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"version": NaN}',
        "9" * 5000,
        '{"format": "edgecap", "version": true}',
        '{"format": "edgecap", "version": "1"}',
        '{"format": "edgecap", "version": 1e999}',
        '{"format": "other", "version": 1}',
    ],
    ids=lambda text: repr(text[:20]),
)
def test_malformed_json(bundle_copy, text):
    (bundle_copy / "bundle.json").write_text(text)
    assert "bundle.json" in refusal(bundle_copy)


def test_manifest_that_is_no_text(bundle_copy):
    (bundle_copy / "bundle.json").write_bytes(b"\xff\xfe\x00\x01")
    assert "not valid JSON" in refusal(bundle_copy)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, each in items for inner in places(each, (*path, key)))]


junk = st.sampled_from([None, True, -1, 2**60, 1.5, "", "../x", [], [[]], {}, {"a": 1}, [1, "a", None]])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_wrong_value_anywhere_is_one_line(bundle_path, data):
    """Whatever a key holds, opening the bundle works or says in one line what is wrong."""
    from edgecap.runtime.manifest import parse_manifest

    values = json.loads((bundle_path / "bundle.json").read_text())
    path = data.draw(st.sampled_from([place for place in places(values) if place]))
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[path[-1]] = data.draw(junk)
    else:
        del parent[path[-1]]
    try:
        parse_manifest(json.dumps(values).encode(), "x/bundle.json")
    except EdgecapError as error:
        assert error.message.startswith("x/bundle.json: ") and len(error.message) < 400


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("tokens.eos", 14, "outside the vocabulary"),
        ("golden.token_ids", [99], "outside the vocabulary"),
        ("golden.logits", "other.npy", "not among its files"),
        ("decoding.beam", 0, "beam"),
        ("decoding.colour", 1, "colour"),
        ("preprocess.mode", "stretch", "squash, crop"),
        ("preprocess.size", [16], "size"),
        ("preprocess.size", [32, 16], "graphs.encoder"),
        ("session.ids.input", "words", "ids, words"),
        ("session.logits", "scores", "scores"),
        ("session.state", [], "disagree about h"),
        ("session.photo", {"grid": "features"}, "features"),
        ("files.encoder.onnx.sha256", "0", "64 hexadecimal"),
        ("requires.onnxruntime", 1, "must be a text"),
    ],
)
def test_parts_that_do_not_fit(bundle_copy, path, value, says):
    def change(values):
        *parents, last = path.replace("encoder.onnx", "encoder#onnx").split(".")
        for key in parents:
            values = values[key.replace("#", ".")]
        values[last] = value

    change_manifest(bundle_copy, change)
    assert says in refusal(bundle_copy)


# --- writing ----------------------------------------------------------------------------------------


@pytest.fixture
def parts() -> tuple[dict[str, Any], dict[str, Any]]:
    files, parts = gru_graphs()
    return manifest(parts), {**files, "tokenizer.json": tokenizer_json(), "golden.png": b"x", "golden.npy": b"x"}


def test_writes_paths_and_bytes(tmp_path, parts):
    values, files = parts
    source = tmp_path / "source.onnx"
    source.write_bytes(files["encoder.onnx"])
    bundle = write_bundle(tmp_path / "deep" / "x.edgecap", values, {**files, "encoder.onnx": source})
    assert bundle.read("encoder.onnx") == files["encoder.onnx"]
    assert set(bundle.manifest["files"]) == set(files)
    Bundle.open(bundle.path)


def test_same_parts_give_the_same_bytes(tmp_path, parts):
    first, second = (write_bundle(tmp_path / name, *parts) for name in ("a", "b"))
    assert first.sha256 == second.sha256


def test_replaces_a_bundle_and_leaves_nothing_behind(tmp_path, parts):
    values, files = parts
    out = tmp_path / "x.edgecap"
    write_bundle(out, values, {**files, "old.txt": b"old"})
    write_bundle(out, values, files)
    assert not (out / "old.txt").exists() and list(tmp_path.iterdir()) == [out]
    Bundle.open(out)


def test_a_failed_write_leaves_the_old_bundle(tmp_path, parts):
    values, files = parts
    before = write_bundle(tmp_path / "x.edgecap", values, files).sha256
    with pytest.raises(EdgecapError, match="cannot be written"):
        write_bundle(tmp_path / "x.edgecap", values, {**files, "big.bin": tmp_path / "missing"})
    with pytest.raises(EdgecapError, match="tokens.bos"):
        write_bundle(tmp_path / "x.edgecap", {**values, "tokens": {"bos": "a"}}, files)
    assert Bundle.open(tmp_path / "x.edgecap").sha256 == before
    assert [each.name for each in tmp_path.iterdir()] == ["x.edgecap"]


def test_does_not_replace_what_is_no_bundle(tmp_path, parts):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="is not a bundle"):
        write_bundle(tmp_path / "photos", *parts)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not a bundle"):
        write_bundle(tmp_path / "file", *parts)


WRITER = """
import sys, time
from pathlib import Path
from tests_graphs import gru_graphs, manifest, tokenizer_json
from edgecap.runtime import write_bundle
files, parts = gru_graphs()
files |= {"tokenizer.json": tokenizer_json(), "golden.png": b"x", "golden.npy": b"x", "big.bin": bytes(10**6)}
print("ready", flush=True)
while True:
    write_bundle(Path(sys.argv[1]), manifest(parts), files)
"""


def test_killed_at_any_moment(tmp_path, parts):
    """kill -9 while a bundle is replaced over and over: what lies there is always whole, or is put back."""
    (tmp_path / "tests_graphs.py").write_text(Path(__file__).with_name("graphs.py").read_text())
    out = tmp_path / "out" / "x.edgecap"
    kills = int(os.environ.get("EDGECAP_KILLS", "5"))
    for attempt in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(out)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.017 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.parent.exists():
            module.recover(out)
        if out.exists():
            Bundle.open(out)
    write_bundle(out, *parts)
    assert list(out.parent.iterdir()) == [out]


def test_recover_puts_back_a_bundle_caught_between_two_names(tmp_path, parts):
    out = write_bundle(tmp_path / "x.edgecap", *parts).path
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out.rename(tmp_path / f".x.edgecap.old-{dead.pid}-00000000")
    (tmp_path / f".x.edgecap.new-{dead.pid}-00000000").mkdir()
    living = tmp_path / f".x.edgecap.new-{os.getppid()}-00000000"
    living.mkdir()
    module.recover(out)
    Bundle.open(out)
    assert sorted(tmp_path.iterdir()) == [living, out]
