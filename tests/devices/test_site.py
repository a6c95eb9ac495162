"""A captioner as a folder of plain files: what it holds, weighs, replaces and refuses."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from edgecap.devices import site
from edgecap.devices.webfiles import lacking
from edgecap.runtime import Bundle, UsageError

from ..runtime.graphs import write_fused_bundle, write_gru_bundle
from ..runtime.test_cli import edgecap


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that lies where onnxruntime-web would."""
    folder = tmp_path / "ort"
    folder.mkdir()
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        (folder / name).write_bytes(name.encode() * 50)
    monkeypatch.setenv("EDGECAP_ORT_WEB", str(folder))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_gru_bundle(tmp_path / "tiny.edgecap", seed=3)


def test_a_site_is_complete_and_says_what_it_weighs(engine: None, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "site"
    weights = {each.part: each for each in site.write_site(bundle, out)}
    listed = {each["path"]: each for each in json.loads((out / "files.json").read_text())["files"]}
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert present == set(listed) | {"files.json", "sw.js"}
    for path, each in listed.items():
        data = (out / path).read_bytes()
        assert (each["bytes"], each["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {"index.html", "app.js", "worker.js", "edgecap/index.js", "bundle/bundle.json"} <= present
    assert weights["bundle"].bytes == bundle.bytes and 0 < weights["engine"].gzip < weights["engine"].bytes
    assert Bundle.open(out / "bundle").sha256 == bundle.sha256
    first = (out / "sw.js").read_text()
    assert site.VERSION not in first
    site.write_site(bundle, out)  # in its place, and the same
    assert (out / "sw.js").read_text() == first
    other = write_gru_bundle(tmp_path / "other.edgecap", seed=4)
    site.write_site(other, out)
    assert (out / "sw.js").read_text() != first


def test_refusals_are_one_line(engine: None, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    for arguments, code, message in (
        ([bundle.path, "-o", tmp_path / "mine"], 2, "is no such site"),
        ([tmp_path / "none", "-o", tmp_path / "site"], 2, "no such bundle"),
        ([bundle.path, "--port", 1], 2, "--port goes with --serve"),
        ([bundle.path, "-o", "/dev/null/site"], 1, "cannot be written"),
    ):
        done = edgecap("site", *arguments)
        assert done.returncode == code and message in done.stderr.splitlines()[-1], done.stderr
        assert not done.stdout
    foreign = Bundle(bundle.path, {**bundle.manifest, "backend": "gguf"})
    with pytest.raises(UsageError, match="pages run onnx bundles alone"):
        site.write_site(foreign, tmp_path / "site")
    monkeypatch.setenv("EDGECAP_ORT_WEB", str(tmp_path / "nothing"))
    assert lacking()
    with pytest.raises(UsageError, match="npm install"):
        site.write_site(bundle, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_nothing_of_anybody_elses_is_replaced(
    engine: None, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    for text in ("{}", "[]", "no JSON", '{"files": 1}', '{"files": [{}]}', '{"files": []}'):
        (foreign / "files.json").write_text(text)
        with pytest.raises(UsageError, match="no such site"):
            site.write_site(bundle, foreign)
    assert (foreign / "notes.txt").read_text() == "mine"
    out = tmp_path / "site"
    site.write_site(bundle, out)
    (out / "bundle" / "mine.jpg").touch()
    with pytest.raises(UsageError, match="holds bundle/mine.jpg"):
        site.write_site(bundle, out)
    (out / "bundle" / "mine.jpg").unlink()
    (tmp_path / "link").symlink_to(out)
    site.write_site(bundle, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (out / "sw.js").is_file()
    monkeypatch.chdir(out)
    for place in (Path(), out, tmp_path):
        with pytest.raises(UsageError, match="current folder"):
            site.write_site(bundle, place)
    assert (out / "sw.js").is_file() and not list(tmp_path.glob(".*"))


def test_a_fused_graph_stays_behind(engine: None, bundle: Bundle, tmp_path: Path) -> None:
    with_fused = write_fused_bundle(tmp_path / "fused.edgecap", seed=3)
    assert with_fused.manifest["files"]["fused.onnx"]["bytes"] > 1000
    plain, fused = site.write_site(bundle, tmp_path / "a")[-1], site.write_site(with_fused, tmp_path / "b")[-1]
    shipped = Bundle.open(tmp_path / "b" / "bundle")  # nothing is missing that it lists
    assert shipped.manifest == bundle.manifest and shipped.bytes == fused.bytes
    assert abs(fused.bytes - plain.bytes) < 100  # bundle.json's spaces, perhaps


def test_it_is_served_with_what_threads_need(engine: None, bundle: Bundle, tmp_path: Path) -> None:
    site.write_site(bundle, tmp_path / "site")
    with site.server(tmp_path / "site") as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        base = f"http://127.0.0.1:{serving.server_address[1]}/"
        with urllib.request.urlopen(f"{base}ort/ort.wasm.min.mjs") as reply:
            assert reply.headers["Content-Type"] == "text/javascript"
            assert reply.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        with urllib.request.urlopen(f"{base}ort/ort-wasm-simd-threaded.wasm") as reply:
            assert reply.headers["Content-Type"] == "application/wasm"
        serving.shutdown()


def test_the_command_writes_weighs_and_serves(engine: None, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "site"
    told = json.loads(edgecap("site", bundle.path, "-o", out, "--json").stdout)
    assert told["site"] == str(out) and [each["part"] for each in told["weight"]] == ["page", "engine", "bundle", "all"]
    assert (out / "bundle" / "bundle.json").is_file()
    command = [sys.executable, "-m", "edgecap", "site", bundle.path, "-o", out, "--serve", "--port", "0"]
    interruptible = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # shells in the background ignore it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible) as serving:
        try:
            address = serving.stderr.readline().split()[0]
            taken = edgecap("site", bundle.path, "-o", out, "--serve", "--port", address.rstrip("/").rsplit(":", 1)[1])
            assert taken.returncode == 1 and "choose another --port" in taken.stderr
            with urllib.request.urlopen(f"{address}bundle/bundle.json") as reply:
                assert reply.status == 200
        finally:
            serving.send_signal(signal.SIGINT)
        assert serving.wait(10) == 0
