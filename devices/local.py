"""What this machine is, from the operating system alone: a time without its CPU and flags says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Flags that decide how fast int8 and fp16 run. Linux's spelling → ours.
_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "neon",  # 32-bit ARM
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
# macOS: sysctl's name → ours.
_SYSCTL_FLAGS = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}


@dataclass(frozen=True)
class CpuFacts:
    """This machine. What the system does not tell is None (or no flags), never a guess."""

    model: str
    isa: str
    flags: tuple[str, ...]
    cores: int  # logical cores this process may use
    memory_mb: int | None  # MiB this process may use
    system: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"flags": list(self.flags)}


def parse_cpuinfo(text: str) -> tuple[str | None, tuple[str, ...]]:
    """Model name and flags of interest from the text of Linux's /proc/cpuinfo, x86 or ARM."""
    first: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            first.setdefault(key.strip(), value.strip())
    words = (first.get("flags") or first.get("Features") or "").split()
    flags = tuple(dict.fromkeys(_FLAGS[w] for w in words if w in _FLAGS))
    model = first.get("model name") or first.get("Model") or first.get("Hardware")
    if model is None and "CPU part" in first:  # ARM kernels name the core by number only
        model = f"ARM core, implementer {first.get('CPU implementer', '?')}, part {first['CPU part']}"
    return model, flags


def isa_name(machine: str) -> str:
    """An instruction set as `platform.machine()` has it, by the one name that Linux gives it."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _sysctl(*names: str) -> dict[str, str]:
    """macOS's sysctl values by name; names it does not know are left out."""
    try:
        run = subprocess.run(["sysctl", *names], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = (line.partition(":") for line in run.stdout.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _memory_bytes() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max")  # a container's own limit
    return min(total, int(limit)) if limit and limit.isdigit() else total


def cache_folder() -> Path:
    """Where caches live: $EDGECAP_CACHE, else the user's cache folder."""
    base = os.environ.get("EDGECAP_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgecap"


def cpu_facts() -> CpuFacts:
    """Facts about this machine's CPU and memory; takes about a millisecond on Linux."""
    model: str | None = None
    flags: tuple[str, ...] = ()
    if sys.platform.startswith("linux"):
        model, flags = parse_cpuinfo(_read("/proc/cpuinfo") or "")
        board = _read("/proc/device-tree/model")  # "Raspberry Pi 5 Model B Rev 1.0"
        model = ", ".join(x for x in dict.fromkeys((board, model)) if x) or None
    elif sys.platform == "darwin":
        values = _sysctl("machdep.cpu.brand_string", *_SYSCTL_FLAGS)
        model = values.get("machdep.cpu.brand_string")
        flags = tuple(ours for name, ours in _SYSCTL_FLAGS.items() if values.get(name) == "1")
    affinity = getattr(os, "sched_getaffinity", None)
    memory = _memory_bytes()
    return CpuFacts(
        model=model or platform.processor() or "unknown",
        isa=isa_name(platform.machine()),
        flags=flags,
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        memory_mb=memory // 2**20 if memory else None,
        system=f"{platform.system()} {platform.release()}",
    )
