"""`edgecap cache`: what is in the cache by what it is for, and nothing else is ever deleted."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecap.cli import cli
from edgecap.devices import agent
from edgecap.runtime.errors import UsageError

KEY = "0123456789abcdef0123"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = ["peers/torch-fp32-1/a/x", "peers/inductor/y", "devices/wheels/aarch64/n.whl", "devices/arm64-1/root/z"]
    files += ["browser/certificate-1.pem", "hf/one/images/i", *(f"{KEY}.{end}" for end in ("npy", "json", "lock"))]
    files += ["thesis.npy", "photos/mine.jpg"]  # of whoever pointed the cache here
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 1000)
    old = time.time() - 40 * 86400
    os.utime(tmp_path / "peers/torch-fp32-1/a/x", (old, old))
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path))
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["cache", *arguments])


def listed(*arguments: str) -> dict[str, int]:
    return {entry["name"]: entry["bytes"] for entry in json.loads(run("--json", *arguments).output)["entries"]}


def test_what_is_there(folder: Path) -> None:
    ours = {
        "peers/torch-fp32-1",
        "peers/inductor",
        "devices/wheels/aarch64",
        "devices/arm64-1",
        "browser",
        "hf/one",
        KEY,
    }
    found = listed()
    assert set(found) == ours and found[KEY] == 3000
    assert set(listed("--older-than", "30")) == {"peers/torch-fp32-1"} and set(listed("devices")) == {
        "devices/wheels/aarch64",
        "devices/arm64-1",
    }
    said = run().output
    assert "7 entries" in said and "40 days" in said and "wheels for devices" in said and "thesis" not in said


def test_what_is_deleted(folder: Path) -> None:
    assert "1 entry" in run("--clear", "--older-than", "30").output
    assert not (folder / "peers/torch-fp32-1").exists() and (folder / "peers/inductor").exists()
    run("--clear", "peers", KEY)
    assert not (folder / "peers/inductor").exists() and not list(folder.glob(f"{KEY}*")) and listed("hf")
    assert isinstance(run("--clear", "photos").exception, UsageError)
    run("--clear")
    assert not listed() and (folder / "thesis.npy").exists() and (folder / "photos/mine.jpg").exists()


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "none"))
    assert "0 entries" in run().output


def test_a_device_forgets_what_no_bench_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = time.time() - 31 * 86400
    for name in ("bundles/a/x", "bundles/b/x", "sites/c/x", ".part-1/x", "other/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
        os.utime((tmp_path / name).parent, (old, old))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "new.jpg").write_text("x")
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(["bundles/a", "sites/none"])))
    assert agent.have(str(tmp_path)) == {"have": ["bundles/a"]}
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"bundles/a/x", "photos/new.jpg", "other/x"}
