"""A worker's cores and its limit on memory, kept by the operating system where it lets us.

Resident memory is what is limited. RLIMIT_AS would count weights that are mapped and never read, RLIMIT_DATA stacks and
arenas that are reserved and never touched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ..runtime.errors import UsageError

MIB = 2**20
POLL = 0.005  # s between two looks of the watchdog
_names = count()


def parse_size(text: str) -> int:
    """ "512M", "1.5G", "800MiB" (binary units) or plain bytes → bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if size < 16 * MIB:
        raise UsageError(f"a memory limit is 16M or more, such as 512M or 2G, not {text!r}")
    return size


def size_text(size: float) -> str:
    return f"{size / MIB:.0f} MiB"


# --- cores --------------------------------------------------------------------------------------------


def choose_cores(number: int) -> tuple[int, ...]:
    """The logical cores to pin `number` threads to, of those this process may use: the fastest first, one of each
    physical core before its sibling, and core 0, which serves most interrupts, last. All where there are no more;
    none where the system does not pin.
    """
    if not hasattr(os, "sched_setaffinity"):
        return ()
    allowed = os.sched_getaffinity(0)
    places = {core: _place(core) for core in allowed}

    def order(core: int) -> tuple[bool, int, bool, int]:
        speed, physical = places[core]
        sibling = any(places[other] == (speed, physical) and other < core for other in allowed)
        return sibling, -speed, core == 0, core

    return tuple(sorted(sorted(allowed, key=order)[:number]))


def _place(core: int) -> tuple[int, object]:
    """(highest frequency in kHz, physical core) of a logical core."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core}")

    def read(name: str, default: str) -> str:
        try:
            return (folder / name).read_text().strip()
        except OSError:
            return default

    speed = read("cpufreq/cpuinfo_max_freq", read("cpu_capacity", "0"))
    package, physical = read("topology/physical_package_id", "0"), read("topology/core_id", str(core))
    return int(speed) if speed.isdigit() else 0, (package, physical)


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """What is started by this thread in here runs on these cores alone; with none nothing changes."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)  # of this thread: what others start meanwhile is left alone
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# --- memory -------------------------------------------------------------------------------------------


class MemoryLimit:
    """The limit of one process. This one only judges what the process tells of its peak; see `memory_limits`.

    wrapper: an argv put in front of the process's own. It prints an empty line when the process itself begins.
    """

    enforced_by = "its own peak, after each answer"

    def __init__(self, size: int) -> None:
        self.size = size
        self.wrapper: tuple[str, ...] = ()

    def watch(self, pid: int, kill: Callable[[], None]) -> None:
        """Called once the process runs; kill: ends it."""

    def ended(self, code: int | None) -> bool:
        """Whether a process that ended so was ended for its memory."""
        return False

    def over(self, peak: int) -> bool:
        """Whether a process that held `peak` bytes should have been ended."""
        return peak > self.size

    def reason(self) -> str:
        return f"was ended: over its memory limit of {size_text(self.size)}"

    def close(self) -> None:
        """Called once the process is gone."""


class Watchdog(MemoryLimit):
    """Looks at the process's resident memory every 5 ms and ends it at once; what a look misses its peak tells."""

    enforced_by = f"a watchdog, every {POLL * 1e3:.0f} ms"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._gone, self._killed = threading.Event(), False

    def watch(self, pid: int, kill: Callable[[], None]) -> None:
        threading.Thread(target=self._look, args=(Path(f"/proc/{pid}/statm"), kill), daemon=True).start()

    def _look(self, statm: Path, kill: Callable[[], None]) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._gone.wait(POLL):
            try:
                resident = int(statm.read_text().split()[1]) * page
            except (OSError, IndexError, ValueError):
                return
            if resident > self.size:
                self._killed = True
                kill()
                return

    def ended(self, code: int | None) -> bool:
        return self._killed

    def close(self) -> None:
        self._gone.set()


class Cgroup(MemoryLimit):
    """A cgroup (v2) of its own: the kernel ends what is in it."""

    enforced_by = "cgroup v2"

    def __init__(self, size: int, parent: Path) -> None:
        super().__init__(size)
        self._folder = parent / f"edgecap-{os.getpid()}-{next(_names)}"
        self._folder.mkdir()
        (self._folder / "memory.max").write_text(str(size))
        swap = self._folder / "memory.swap.max"
        if swap.exists():  # not where the kernel has no swap
            swap.write_text("0")
        join = 'echo $$ > "$0" && echo && exec "$@"'
        self.wrapper = ("sh", "-c", join, str(self._folder / "cgroup.procs"))

    def ended(self, code: int | None) -> bool:
        try:
            events = dict(line.split() for line in (self._folder / "memory.events").read_text().splitlines())
        except (OSError, ValueError):
            return False
        return int(events.get("oom_kill", 0)) > 0

    def close(self) -> None:
        for _ in range(50):  # a process that was just ended leaves its cgroup a moment later
            try:
                self._folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)


class Scope(MemoryLimit):
    """A scope of systemd's, which makes the cgroup for users who may not."""

    enforced_by = "systemd-run --scope"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.wrapper = (*scope_command(size), "sh", "-c", 'echo && exec "$@"', "sh")

    def ended(self, code: int | None) -> bool:
        return code == -9  # nobody else ends it so: a worker that we end is no longer asked


def scope_command(size: int) -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user"]
    limits = ["-p", f"MemoryMax={size}", "-p", "MemorySwapMax=0"]
    return ["systemd-run", *user, "--scope", "--quiet", "--collect", *limits, "--"]


def _cgroup_parent() -> Path | None:
    """A folder of the cgroup tree in which we may make groups that limit memory."""
    try:
        mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        tree = next(Path(left.split()[4]) for left, right in mounts if right.split()[0] == "cgroup2")
        own = Path("/proc/self/cgroup").read_text().split("0::", 1)[1].splitlines()[0]
    except (OSError, StopIteration, IndexError, ValueError):
        return None
    group = tree / own.lstrip("/")
    for parent in (group, group.parent):  # processes beside groups: only the tree's root may have both
        if parent != tree.parent:
            try:
                able = "memory" in (parent / "cgroup.subtree_control").read_text().split()
            except OSError:
                continue
            if able and os.access(parent, os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK):
                return parent
    return None


def _works(limit: MemoryLimit) -> bool:
    """Whether a process can be started within the limit."""
    try:
        command = [*limit.wrapper, "true"]
        return subprocess.run(command, capture_output=True, timeout=10, check=False, text=True).stdout == "\n"
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        limit.close()


def memory_limits(size: int) -> Callable[[], MemoryLimit]:
    """A maker of limits of `size` bytes, one for each process, by the best means this system allows us."""
    if sys.platform.startswith("linux"):
        parent = _cgroup_parent()
        if parent is not None:
            try:
                if _works(Cgroup(size, parent)):
                    return lambda: Cgroup(size, parent)
            except OSError:
                pass
        if shutil.which("systemd-run") and _works(Scope(size)):
            return lambda: Scope(size)
        return lambda: Watchdog(size)
    return lambda: MemoryLimit(size)
