"""Whether a machine's clock fell while something was measured: boards throttle when they are hot or short of power.

Linux tells in several places, none of them everywhere: caps and cooling devices (kernel.org, admin-guide/pm/cpufreq and
driver-api/thermal/sysfs-api), x86's counters, and the firmware's flags of a Raspberry Pi (vcgencmd get_throttled).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
# Bits of the firmware's flags; each 16 places further left is the same since the board was switched on.
FLAGS = {0: "under-voltage", 1: "its clock is capped", 2: "throttled", 3: "at its soft limit of temperature"}
SLOWER = 0.85  # of products after the rounds over before, below which something slowed the machine


def read_clock(root: Path = Path("/")) -> dict[str, Any]:
    """What the system tells now; None (or 0) where it does not: "cap", the lowest share of its highest clock that
    a core may have; "cooling", states of cooling devices that slow processors; "events", how often x86 cores were
    throttled; "flags" of a Raspberry Pi's firmware; "celsius", the hottest zone.
    """
    cpus = root / "sys/devices/system/cpu"
    caps = []
    for folder in cpus.glob("cpu[0-9]*/cpufreq"):
        cap, most = _number(folder / "scaling_max_freq"), _number(folder / "cpuinfo_max_freq")
        if cap and most:
            caps.append(cap / most)
    thermal = root / "sys/class/thermal"
    cooling = [
        _number(folder / "cur_state") or 0
        for folder in thermal.glob("cooling_device*")
        if re.search("processor|cpu", _text(folder / "type") or "", re.IGNORECASE)
    ]
    events: dict[str, int] = {}
    for file in cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        cpu = file.parent.parent
        core = _text(cpu / "topology/thread_siblings_list") or cpu.name  # its siblings count the same events
        events[core] = max(events.get(core, 0), _number(file) or 0)
    hot = [_number(file) or 0 for file in thermal.glob("thermal_zone*/temp")]  # thousandths of a degree
    return {
        "cap": min(caps, default=None),
        "cooling": sum(cooling) if cooling else None,
        "events": sum(events.values()) if events else None,
        "flags": _flags(root),
        "celsius": next((t / 1000 for t in sorted(hot, reverse=True) if 0 < t < 150_000), None),
    }


def fell(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Signs between two readings, in words: a cap that fell and cores that were throttled meanwhile, a cooling device
    at work in either reading, what the firmware flags in either or since the first. A cap that stayed is a wish.
    """
    caps = [reading.get("cap") for reading in (before, after)]
    if all(caps) and caps[1] < 0.99 * caps[0]:
        yield f"its clock was capped at {caps[1]:.0%} of the highest"
    if (before.get("cooling") or 0) + (after.get("cooling") or 0) > 0:
        yield "a cooling device slows its processor"
    if (events := (after.get("events") or 0) - (before.get("events") or 0)) > 0:
        yield f"its cores were throttled {events:,} times"
    first, last = before.get("flags") or 0, after.get("flags") or 0
    for bit, word in FLAGS.items():
        if (first | last) >> bit & 1 or (last & ~first) >> (bit + 16) & 1:
            yield f"its firmware says: {word}"


def slowed(before: Mapping[str, float | None] | None, after: Mapping[str, float | None] | None) -> Iterator[str]:
    """The same by the machine's own limits (see limits.limits), before and after the rounds."""
    for name, what in (("fp32_gflops", "fp32"), ("int8_gops", "int8")):
        one, two = ((found or {}).get(name) for found in (before, after))
        if one and two and two < SLOWER * one:
            yield f"{what} products ran at {two / one:.0%} of their rate before (a clock that fell, or other work)"


def _flags(root: Path) -> int | None:
    text = _text(root / FIRMWARE)  # 50005, or 0x50005
    if text is None and root == Path("/") and shutil.which("vcgencmd"):
        try:
            done = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        text = done.stdout  # throttled=0x50000
    found = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-f]{1,8})", (text or "").strip(), re.IGNORECASE)
    return int(found[1], 16) if found else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text and re.fullmatch(r"-?\d+", text) else None
