"""The Makefile, with stand-ins for Python and everything that it would install."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("make") or os.name != "posix", reason="needs make and a Unix shell")
# Python, and what a virtual environment holds: each writes what it is asked into a log.
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
sleep 0.05
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && for name in python pip ruff edgecap; do cp "$0" "$3/bin/$name"; done ;;
  "wheel "*) mkdir -p .venv/llama && touch .venv/llama/new.whl ;;
esac
"""


class Project:
    """A copy of the Makefile in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        shutil.copy(Path(__file__).parent.parent / "Makefile", folder)
        (folder / "bin").mkdir()
        for name in ("python3", "c++"):
            (folder / "bin" / name).write_text(PROGRAM)
            (folder / "bin" / name).chmod(0o755)
        for name in ("pyproject.toml", "constraints.txt"):
            (folder / name).touch()

    def make(self, *goals: str) -> list[str]:
        """What was asked of the stand-ins while the goals were made."""
        self.log.write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        kept |= {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "LOG": str(self.log)}
        command = ["make", *goals, "PYTHON=python3", "VENV=.venv", "JOBS=1"]
        done = subprocess.run(command, cwd=self.folder, env=kept, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.log.read_text().splitlines()


def test_goals_follow_one_another(tmp_path: Path) -> None:
    """Before, `make clean test` cleaned while it tested."""
    project = Project(tmp_path)
    asked = project.make("test")
    assert asked[0] == "python3 -m venv .venv" and asked[-1].startswith("python -m pytest")
    assert [line.split("-e ")[1] for line in asked if "install" in line][-1] == ".[gguf] .venv/llama/new.whl"
    assert not any(line.startswith("pip") for line in project.make("test")), "once is enough"
    again = project.make("clean", "test")
    assert again[0] == "python3 -m venv .venv" and sorted(again) == sorted(asked)
    assert (tmp_path / ".venv" / ".engines").exists()


def test_a_wheel_of_another_version_is_not_installed_beside_the_new_one(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.make("engines")
    (tmp_path / ".venv" / "llama" / "old.whl").touch()
    after = (tmp_path / ".venv" / ".engines").stat().st_mtime + 1
    os.utime(tmp_path / "constraints.txt", (after, after))
    assert project.make("engines")[-1].endswith("-e .[gguf] .venv/llama/new.whl")
