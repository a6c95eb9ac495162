"""The npm package runtime/web against the Python runtime: its own tests, run by Node, on what is written down here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .web_fixture import write_fixture

WEB = Path(__file__).resolve().parents[2] / "runtime" / "web"
NPM = "npm ci --ignore-scripts in runtime/web"


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if not found:
        pytest.skip("no node on this machine: the JavaScript runtime is not tested")
    if not (WEB / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip(f"the npm packages are not installed ({NPM}): the JavaScript runtime is not tested")
    return found


@pytest.fixture(scope="module")
def fixture(node: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    with pytest.MonkeyPatch.context() as patch:  # edgecap may be installed elsewhere
        patch.setenv("EDGECAP_ORT_WEB", str(WEB / "node_modules" / "onnxruntime-web"))
        write_fixture(folder)
    return folder


@pytest.mark.parametrize("name", sorted(path.name for path in (WEB / "test").glob("*.test.js")))
def test_in_node(node: str, fixture: Path, name: str) -> None:
    environment = {**os.environ, "EDGECAP_WEB_FIXTURE": str(fixture)}
    command = [node, "--test", "--test-reporter=tap", str(WEB / "test" / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if "# skipped 0" not in done.stdout:
        reasons = [line.split("# SKIP", 1)[1].strip() for line in done.stdout.splitlines() if "# SKIP" in line]
        pytest.skip(f"{name}: {'; '.join(sorted(set(reasons)))}")


def test_the_types_are_right(node: str) -> None:
    compiler = WEB / "node_modules" / "typescript" / "bin" / "tsc"
    done = subprocess.run([node, str(compiler), "-p", str(WEB)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_package_is_what_it_says() -> None:
    """Every module is among its files and small, versions agree, and the lock names no machine's registry."""
    import edgecap

    package = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    lock = json.loads((WEB / "package-lock.json").read_text(encoding="utf-8"))
    assert package["version"] == lock["version"] == edgecap.__version__ and package["license"] == "Apache-2.0"
    assert not any("resolved" in each for each in lock["packages"].values())
    assert "dependencies" not in package
    for path in WEB.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("/**") and len(text.splitlines()) <= 450, path
