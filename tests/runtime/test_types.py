"""The type hints of what apps import hold: mypy over the runtime as it lies here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_runtime_is_typed(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install 'edgecap[test]'")
    (tmp_path / "edgecap").symlink_to(ROOT)  # the folder need not have the package's name
    command = [sys.executable, "-m", "mypy", "-p", "edgecap.runtime", "--config-file", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
