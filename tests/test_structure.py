"""The rules of the house: who imports whom, what the wheel holds, and what the runtime must not pull in."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["runtime", "devices", "benchmarks", "train", "export"]  # each may import itself and the rooms before it
HEAVY = ("torch", "transformers", "accelerate", "onnx", "safetensors")


def modules(room: str) -> list[Path]:
    return [path for path in (ROOT / room).rglob("*.py") if "peers" not in path.parts or path.name == "__init__.py"]


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found += [(node.level, f"{base}.{alias.name}".strip(".")) for alias in node.names]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_leftwards_only(room: str) -> None:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in modules(room):
        depth = len(path.relative_to(ROOT).parts) - 1  # folders between the root and the file
        for level, name in imports(path):
            if level == 0:
                assert not name.startswith("edgecap"), f"{path}: import {name} relatively"
                continue
            if level > depth:  # reaches the package's root: the first part is a room or a module there
                first = name.split(".")[0]
                assert first in [*allowed, "__version__"], f"{path} imports {first}; {room} may use {allowed}"


def test_peers_scripts_are_run_and_not_imported() -> None:
    places = (ROOT / "benchmarks" / "peers").glob("*.py")
    scripts = {path.stem for path in places if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert "llama_cpp" in scripts and "vlm" not in scripts
    for path in (path for room in ROOMS for path in modules(room)):
        for _, name in imports(path):
            _, _, inside = f".{name}.".partition(".peers.")
            assert inside.split(".")[0] not in scripts, f"{path} imports {name}: run it as a process"


@pytest.mark.parametrize("room", ["runtime", "devices", "benchmarks"])
def test_the_light_rooms_name_no_heavy_package(room: str) -> None:
    for path in modules(room):
        for level, name in imports(path):
            assert level or name.split(".")[0] not in HEAVY, f"{path} imports {name}"


@pytest.mark.parametrize("room", ["runtime", "devices", "benchmarks"])
def test_importing_a_light_room_is_light(room: str) -> None:
    code = f"import edgecap.{room}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_with_code_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {
        ".".join(("edgecap", *path.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    assert folders | {"edgecap"} == set(settings["packages"])
    for package, patterns in settings["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_only_package_code_lies_at_the_root() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


def test_modules_say_why_they_exist_and_stay_readable() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if not text.strip():
                continue
            assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
            assert len(text.splitlines()) <= 450, f"{path} is too long for one sentence"


def test_no_file_names_a_pickle_loader() -> None:
    """Nothing that a user passes around is unpickled."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            names = {name.split(".")[0] for _, name in imports(path)}
            assert not names & {"pickle", "dill", "joblib", "shelve"}, path
            assert "torch.load" not in path.read_text(encoding="utf-8"), path


def test_help_of_every_command_has_examples() -> None:
    from click.testing import CliRunner

    from edgecap.cli import ROOMS as COMMANDS
    from edgecap.cli import cli

    for name in COMMANDS:
        result = CliRunner().invoke(cli, [name, "--help"], prog_name="edgecap")
        assert result.exit_code == 0 and "Examples:" in result.output and f"edgecap {name}" in result.output, name
