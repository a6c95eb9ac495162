"""What a device needs to run bundles, as wheels: edgecap's own, written from the installed package, and those of the
packages that it imports, fetched by pip for the device's Python and processor.

A wheel is a zip file of importable folders, so a device needs no pip: unpacked and put on PYTHONPATH, it is installed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..runtime.errors import EdgecapError

PACKAGES = ("numpy", "pillow", "onnxruntime", "tokenizers")  # what a worker imports; none needs the rest at run time
ROOMS = ("runtime", "devices", "benchmarks")  # of edgecap, on a device
SUFFIXES = (".py", ".toml", ".typed", ".txt")


@dataclass(frozen=True)
class Platform:
    """The Python of a device: what decides which wheels fit."""

    machine: str  # as `platform.machine()` has it there
    python: str  # "3.11"
    glibc: str  # "2.36"

    def pip_options(self) -> list[str]:
        """pip's options for wheels of this platform, whatever it runs on itself."""
        major, minor = self.python.split(".")[:2]
        newest = int(self.glibc.split(".")[1])
        tags = [f"manylinux_2_{k}_{self.machine}" for k in range(newest, 16, -1)] + [f"manylinux2014_{self.machine}"]
        options = ["--python-version", self.python, "--implementation", "cp", "--only-binary=:all:"]
        for tag in tags:
            options += ["--platform", tag]
        for abi in (f"cp{major}{minor}", "abi3", "none"):
            options += ["--abi", abi]
        return options


def requirements() -> list[str]:
    """PACKAGES in the versions that are installed here, so that both sides run the same."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name}=={version(name).split('+')[0]}")
        except PackageNotFoundError:
            found.append(name)
    return found


def download(folder: Path, platform: Platform) -> list[Path]:
    """Fetch the wheels of PACKAGES for a platform into `folder` by pip (its own settings apply: PIP_FIND_LINKS,
    PIP_NO_INDEX); where one has no wheel of the version installed here, any version of it. Raises EdgecapError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = requirements()
    if _pip(folder, platform, wanted):  # one by one, to learn which it is
        for one in wanted:
            said = _pip(folder, platform, [one])
            if said and "==" in one and _no_such_wheel(said):
                said = _pip(folder, platform, [one.partition("==")[0]])
            if said:
                raise EdgecapError(_complaint(one, platform, said))
    return sorted(folder.glob("*.whl"))


def _complaint(requirement: str, platform: Platform, said: str) -> str:
    what = f"no wheel of {requirement}" if _no_such_wheel(said) else f"pip could not fetch {requirement}"
    lines = said.splitlines()
    why = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
    return f"{what} for Python {platform.python} on {platform.machine}: {why.strip()[:300]}"


def _no_such_wheel(said: str) -> bool:
    return "No matching distribution" in said or "Could not find a version" in said


def _pip(folder: Path, platform: Platform, wanted: Sequence[str]) -> str:
    """What pip complained of; empty when the wheels are there."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(folder), *platform.pip_options(), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def package_files() -> dict[str, bytes]:
    """The files of edgecap that a device needs, by their place in a wheel."""
    root = Path(__file__).parent.parent
    files = [root / "__init__.py", root / "__main__.py", root / "cli.py", root / "py.typed"]
    for room in ROOMS:
        found = [path for path in (root / room).rglob("*") if path.suffix in SUFFIXES]
        files += [path for path in found if "node_modules" not in path.parts]
    return {f"edgecap/{path.relative_to(root).as_posix()}": path.read_bytes() for path in sorted(files)}


def own_wheel(folder: Path) -> Path:
    """Write edgecap's wheel of this very code into `folder`; the same code gives the same bytes.

    The format: https://packaging.python.org/en/latest/specifications/binary-distribution-format/
    """
    info = f"edgecap-{__version__}.dist-info"
    needs = "".join(f"Requires-Dist: {name}\n" for name in PACKAGES)
    files = package_files() | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: edgecap\nVersion: {__version__}\n{needs}".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: edgecap\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}\n")
    files[f"{info}/RECORD"] = ("".join(rows) + f"{info}/RECORD,,\n").encode()
    path = folder / f"edgecap-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return path


def wheel_set(cache: Path, platform: Platform) -> list[Path]:
    """The wheels of PACKAGES for a platform, fetched once and kept in `cache`. Raises EdgecapError."""
    key = hashlib.sha256(repr((platform, requirements())).encode()).hexdigest()[:16]
    folder = cache / "wheels" / f"{platform.machine}-py{platform.python}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
            download(Path(part) / "x", platform)
            try:
                os.replace(Path(part) / "x", folder)
            except OSError:  # another process was first
                pass
    return sorted(folder.glob("*.whl"))


def unpack(wheels: Sequence[Path], folder: Path) -> None:
    """Make `folder` importable: the wheels' contents. Raises EdgecapError for a file that is no wheel."""
    for path in wheels:
        try:
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder)  # never outside the folder: zipfile drops what leads there
        except (OSError, zipfile.BadZipFile) as error:
            raise EdgecapError(f"{path} cannot be unpacked: {error}") from error


def glibc_version(text: str) -> str:
    """ "glibc 2.36" → "2.36"; "2.17", the oldest that wheels know, where there is no version."""
    found = re.search(r"(\d+\.\d+)\s*$", text.strip())
    return found[1] if found else "2.17"
