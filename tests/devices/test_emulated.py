"""arm64 under emulation: what it lacks is told; with a root prepared, a bundle gives this machine's own captions."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgecap.benchmarks.device import Device, Local
from edgecap.benchmarks.emulated import Emulated
from edgecap.benchmarks.parity import native_parity
from edgecap.benchmarks.quality import Photo
from edgecap.benchmarks.row import Row
from edgecap.benchmarks.runner import Running, Worker
from edgecap.benchmarks.subjects import Subject, bundle_subject
from edgecap.benchmarks.suite import Settings, run
from edgecap.benchmarks.wording import against_line, confinement
from edgecap.cli import cli
from edgecap.devices import emulated_arm64, get_profile, wheels
from edgecap.devices.wheels import Platform, glibc_version, own_wheel, package_files, unpack
from edgecap.runtime.errors import EdgecapError

from ..runtime.graphs import write_gru_bundle

QUIET: Any = lambda phase, done, total: None  # noqa: E731


def test_what_emulation_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path))
    monkeypatch.setattr(emulated_arm64.sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "qemu-aarch64-static" in str(get_profile("emulated-arm64").missing)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/qemu" if "qemu" in name else None)
    assert "apt-get and dpkg-deb" in str(get_profile("emulated-arm64").missing)
    monkeypatch.setattr(emulated_arm64.sys, "platform", "darwin")
    assert get_profile("emulated-arm64").missing == "it needs Linux"
    with pytest.raises(EdgecapError, match="arm64 cannot be emulated: it needs Linux"):
        emulated_arm64.prepare()


def test_a_step_that_fails_tells_what_and_why() -> None:
    with pytest.raises(EdgecapError, match="it cannot be had: no such source"):
        emulated_arm64._run(["sh", "-c", "echo no such source >&2; exit 100"], "it cannot be had")


def test_the_wheels_that_fit_a_platform() -> None:
    options = Platform("aarch64", "3.11", "2.28").pip_options()
    tags = [b for a, b in zip(options, options[1:], strict=False) if a == "--platform"]
    assert tags[0] == "manylinux_2_28_aarch64" and tags[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert "cp311" in options
    assert glibc_version("glibc 2.36") == "2.36" and glibc_version("musl") == "2.17"


def test_a_wheel_that_is_not_there_is_named_and_older_versions_will_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def pip(folder: Path, platform: Platform, wanted: list[str]) -> str:
        asked.append(list(wanted))
        bad = [one for one in wanted if one.startswith("onnxruntime")]
        return "ERROR: Could not find a version\nERROR: No matching distribution found for onnxruntime" if bad else ""

    monkeypatch.setattr(wheels, "_pip", pip)
    with pytest.raises(
        EdgecapError, match=r"no wheel of onnxruntime==.* for Python 3.13 on armv7l: ERROR: No matching"
    ):
        wheels.download(tmp_path, Platform("armv7l", "3.13", "2.36"))
    assert asked[0] == wheels.requirements() and asked[-1] == ["onnxruntime"]


def test_our_own_wheel_holds_what_a_worker_imports_and_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    wheel = own_wheel(tmp_path)
    assert own_wheel(tmp_path / "again").read_bytes() == wheel.read_bytes()
    unpack([wheel], tmp_path / "site")
    for name in ("__init__.py", "benchmarks/worker.py", "devices/profiles/cpu.toml", "runtime/backends/__init__.py"):
        assert (tmp_path / "site" / "edgecap" / name).is_file()
    assert not any(name.startswith(("edgecap/train", "edgecap/export")) for name in package_files())
    assert zipfile.ZipFile(wheel).testzip() is None
    (tmp_path / "bad.whl").write_bytes(b"no zip")
    with pytest.raises(EdgecapError, match="bad.whl cannot be unpacked"):
        unpack([tmp_path / "bad.whl"], tmp_path / "site")


# --- the comparison, on this machine in place of the other --------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arm64") / "x.edgecap"
    lineage = {"lineage": {"data": "scenes:train=1,val=1,test=2,size=32", "passes": []}}
    write_gru_bundle(path, 0, **lineage)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Photo]:
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    found = []
    for k in range(2):
        noise = np.random.default_rng(k).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
        found.append(Photo(str(k), str(folder / f"{k}.png"), ("a dog",)))
    return found


class Elsewhere(Device):
    """A device that runs another bundle than it is asked for, or dies."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(get_profile("cpu"))
        self.path = path

    def start(self, subject: Subject, threads: int) -> Running:
        if self.path is None:
            return Worker(["sh", "-c", "echo illegal instruction >&2; exit 4"])
        other = bundle_subject(self.path)[0]

        class Other(Worker):
            def send(self, request: dict[str, Any]) -> None:
                super().send(request | ({"path": str(other.path)} if "path" in request else {}))

        return Other(other.command, threads=threads)


def compared(bundle: Path, photos: list[Photo], other: Device) -> dict[str, Any]:
    subject = bundle_subject(bundle)[0]
    options: Any = {"threads": 1, "timeout": 60, "progress": QUIET}
    return native_parity(Local(), other, [subject], photos, **options)[subject.name]


def test_the_same_bundle_on_the_same_machine_is_the_same(bundle: Path, photos: list[Photo]) -> None:
    found = compared(bundle, photos, Local())
    assert found["same_tokens"] == found["same_captions"] == found["photos"] == 2 and found["ok"]
    assert found["min_cosine"] == pytest.approx(1) and "same tokens for 2 of 2 photos" in against_line(found)


def test_other_weights_are_told_apart_and_a_failure_is_a_reason(
    bundle: Path, photos: list[Photo], tmp_path: Path
) -> None:
    write_gru_bundle(tmp_path / "y.edgecap", 1)
    found = compared(bundle, photos, Elsewhere(tmp_path / "y.edgecap"))
    assert found["min_cosine"] < 0.99 and not found["ok"] and "fail" in against_line(found)
    found = compared(bundle, photos, Elsewhere(None))
    assert not found["ok"] and "exit code 4: illegal instruction" in against_line(found)


def test_a_worker_that_hangs_is_noticed_in_its_time(
    bundle: Path, photos: list[Photo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, what captions took so far was multiplied, too, though it was measured under emulation: 27 hours."""

    class Here(emulated_arm64.Root):
        def command(self, *arguments: str) -> list[str]:
            return [sys.executable, *arguments]

        def environment(self, *folders: Path) -> dict[str, str]:
            return {}

    def receive(self: Worker, timeout: float) -> dict[str, Any]:
        waits.append(timeout)
        return real(self, timeout)

    waits: list[float] = []
    real = Worker.receive
    monkeypatch.setattr(Worker, "receive", receive)
    monkeypatch.setattr(Row, "patience", lambda self, timeout, captions: timeout + 1000)
    device = Emulated(get_profile("emulated-arm64"))
    device._root = Here(bundle, {})
    try:
        (row,) = run([bundle_subject(bundle)[0]], photos, Settings(timeout=100), QUIET, device)["rows"]
    finally:
        device.close()
    assert row["status"] == "ok", row["error"]
    assert waits == [3000, 4000, 4000]


def test_how_workers_were_confined_is_told() -> None:
    limit = {"bytes": 512 * 2**20, "enforced_by": "cgroup v2"}
    assert confinement({"pinned": [1, 3], "memory_limit": limit}) == " on cores 1, 3, at most 512 MiB (cgroup v2)"
    assert confinement({}) == ""


# --- qemu ---------------------------------------------------------------------------------------------


def ready() -> bool:
    return emulated_arm64.missing() is None and (emulated_arm64.prepared() or "EDGECAP_TEST_ARM64" in os.environ)


@pytest.mark.skipif(
    not ready(), reason="no arm64 root in EDGECAP_CACHE; EDGECAP_TEST_ARM64=1 makes one (qemu, apt, pip, a minute)"
)
def test_under_emulation_the_captions_are_this_machine_s_and_no_times_are_told(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "arm64.json"
    options = ["--device", "emulated-arm64", "--limit", "2", "--json", str(file)]
    result = CliRunner().invoke(cli, ["bench", str(bundle), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert found["device"]["times"] == "emulated" and found["device"]["cpu"]["isa"] == "aarch64"
    assert row["status"] == "ok" and row["latency"] is row["memory"] is row["cold_start"] is None
    assert row["against_native"]["ok"] and row["against_native"]["same_tokens"] == 2
    said = " ".join(result.output.split())
    assert "emulated: times would mean nothing" in said and "same tokens for 2 of 2 photos" in said
    assert "Time, ms" not in said and "cold start" not in said
