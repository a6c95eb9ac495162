"""arm64 without an ARM machine: qemu's user-mode emulation over a folder with Debian's arm64 Python and its wheels.

It proves that a bundle works there and gives the same captions. It says nothing about speed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import EdgecapError
from ..runtime.progress import Progress, silent
from .local import cache_folder, parse_cpuinfo
from .wheels import Platform, glibc_version, requirements, unpack, wheel_set

CPU = "cortex-a76"  # a Raspberry Pi 5's
LAYOUT = 1  # of the prepared folder
DEBIAN = ("python3", "libstdc++6")  # with what they need
# What the emulated program reads of a machine; without it ONNX Runtime dies while it is imported.
CPUINFO = (
    "processor\t: 0\nBogoMIPS\t: 108.00\n"
    "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n"
)
SYSTEM = {
    "proc/cpuinfo": CPUINFO,
    **{f"sys/devices/system/cpu/{name}": "0\n" for name in ("possible", "present", "online")},
    "sys/devices/system/cpu/cpu0/topology/core_id": "0\n",
    "sys/devices/system/cpu/cpu0/topology/physical_package_id": "0\n",
    "sys/devices/system/cpu/cpu0/regs/identification/midr_el1": "0x00000000414fd0b1\n",
}
PROBE = (
    "import json, platform, sys\nimport numpy, PIL, onnxruntime, tokenizers\n"
    "print(json.dumps({'python': platform.python_version(), 'numpy': numpy.__version__, 'pillow': PIL.__version__,"
    " 'onnxruntime': onnxruntime.__version__, 'tokenizers': tokenizers.__version__, 'machine': platform.machine()}))"
)


def emulator() -> str | None:
    """qemu's program for arm64, or None."""
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def root_folder() -> Path:
    """Where the root for these versions of packages lies, or will."""
    key = hashlib.sha256(repr((LAYOUT, DEBIAN, SYSTEM, requirements())).encode()).hexdigest()[:12]
    return cache_folder() / "devices" / f"arm64-{key}"


def prepared() -> bool:
    return (root_folder() / "facts.json").is_file()


def missing() -> str | None:
    """What emulating lacks here, in one line; None when it can run, or be prepared."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if emulator() is None:
        return "it needs qemu-aarch64-static (Debian: apt-get install qemu-user-static)"
    if not prepared() and (lacking := [name for name in ("apt-get", "dpkg-deb") if not shutil.which(name)]):
        return f"preparing it once needs {' and '.join(lacking)} (Debian or a system made of it)"
    return None


@dataclass(frozen=True)
class Root:
    """A prepared root."""

    folder: Path
    versions: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        """The argv of its Python. Paths in `arguments` are looked up in the root first, then here."""
        program = emulator()
        assert program is not None
        return [program, "-cpu", CPU, "-L", str(self.folder / "root"), str(self.python), "-s", *arguments]

    @property
    def python(self) -> Path:
        major, minor = self.versions["python"].split(".")[:2]
        return self.folder / "root" / "usr" / "bin" / f"python{major}.{minor}"

    def environment(self, *folders: Path) -> dict[str, str]:
        """Its packages, and more folders to import from."""
        return {"PYTHONPATH": os.pathsep.join(map(str, (*folders, self.folder / "site"))), "PYTHONHOME": ""}

    def cpu(self) -> dict[str, Any]:
        """As CpuFacts, of the emulated machine."""
        model, flags = parse_cpuinfo(CPUINFO)
        return {
            "model": f"{CPU} emulated by qemu ({model})",
            "isa": "aarch64",
            "flags": list(flags),
            "cores": 1,
            "memory_mb": None,
            "system": "Linux, user-mode emulation",
        }


def prepare(progress: Progress = silent) -> Root:
    """The root, made once: arm64 packages of this system's own sources with an apt state of their own, wheels by pip,
    and a trial of all imports. Raises EdgecapError in one line.
    """
    folder = root_folder()
    if not prepared():
        if lacks := missing():
            raise EdgecapError(f"arm64 cannot be emulated: {lacks}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
            _make(Path(part) / "x", progress)
            try:
                os.replace(Path(part) / "x", folder)
            except OSError as error:
                if not prepared():  # another process was not first either
                    raise EdgecapError(f"{folder} cannot be made: {error.strerror}") from error
    return Root(folder, json.loads((folder / "facts.json").read_text()))


def _make(folder: Path, progress: Progress) -> None:
    steps = 5
    root = folder / "root"
    root.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="edgecap-apt-") as scratch:
        packages = _debian_packages(Path(scratch), lambda done: progress("arm64 Python", done, steps))
        for package in packages:
            _run(["dpkg-deb", "-x", str(package), str(root)], f"{package.name} cannot be unpacked")
    progress("arm64 Python", 3, steps)
    for name, text in SYSTEM.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = sorted((root / "usr" / "bin").glob("python3.[0-9]*"))
    if not found:
        raise EdgecapError("the arm64 packages hold no Python")
    python = found[-1].name.removeprefix("python")
    libc = next(iter(root.glob("**/libc.so.6")), None)
    glibc = _glibc_of(libc.resolve()) if libc else "2.17"
    unpack(wheel_set(cache_folder() / "devices", Platform("aarch64", python, glibc)), folder / "site")
    progress("arm64 Python", 4, steps)
    trial = Root(folder, {"python": python})
    said = _run(trial.command("-c", PROBE), "the emulated Python does not work", trial.environment())
    (folder / "facts.json").write_text(said)
    progress("arm64 Python", 5, steps)


def _glibc_of(library: Path) -> str:
    """The version that libc.so.6 names itself: "GNU C Library (…) stable release version 2.36." """
    _, _, after = library.read_bytes().partition(b"stable release version ")
    return glibc_version(after[:8].split(b"\n")[0].rstrip(b". ").decode("ascii", "replace")[:4])


def _debian_packages(scratch: Path, progress: Callable[[int], None]) -> list[Path]:
    """DEBIAN and what it needs, for arm64, without touching the system's own lists and packages."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    status = scratch / "state" / "status"
    status.write_text("")  # nothing is installed yet
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Dir::State": scratch / "state",
        "Dir::State::status": status,
        "Dir::Cache": scratch / "cache",
    }
    apt = ["apt-get", "-q", "-y", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    environment = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    subprocess.run([*apt, "update"], capture_output=True, check=False, env=os.environ | environment)
    progress(1)  # sources without arm64 fail, which need not matter
    what = "this system's apt sources do not give arm64's Python"
    _run([*apt, "install", "--download-only", "--no-install-recommends", *DEBIAN], what, environment)
    progress(2)
    return sorted((scratch / "cache" / "archives").glob("*.deb"))


def _run(command: Sequence[str], what: str, environment: dict[str, str] | None = None) -> str:
    """stdout of a command; raises EdgecapError with `what` and its last line of complaint."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, check=False, env=os.environ | (environment or {})
        )
    except OSError as error:
        raise EdgecapError(f"{what}: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise EdgecapError(f"{what}: {said[-1][:300]}")
    return done.stdout
