"""A device as the suite sees it: workers are started through it, so one suite measures here, over ssh, under emulation
and in a browser's page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from ..devices import cpu_facts, get_profile
from ..devices.confine import MemoryLimit, choose_cores, memory_limits
from ..devices.throttle import read_clock
from ..runtime.progress import Progress
from . import limits, rss
from .record import machine_load, package_versions
from .runner import Running, Worker, WorkerFailed

if TYPE_CHECKING:
    from ..devices import Profile
    from .quality import Photo
    from .subjects import Subject


class Device:
    """One device, reached. Use as a context manager: leaving it ends what it holds open."""

    timed = True  # False: its times and memory mean nothing, and are not measured
    slower: float = 1  # times --timeout that an answer may take at least
    photos: int | None = None  # captioned where nobody says how many; None: the whole split
    memory_limit: int | None = None  # bytes that a worker may hold; see reach.py

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def subjects(self, subjects: Sequence[Subject]) -> list[Subject]:
        """What is measured where these are asked for; a device may put others beside them."""
        return list(subjects)

    def watching(self, progress: Progress) -> Progress:
        """What is told of the progress; a device may show it, too."""
        return progress

    def prepare(self, subjects: Sequence[Subject], photos: Sequence[Photo], progress: Progress) -> None:
        """Bring there what workers will read, before anything is measured. Raises EdgecapError in one line."""

    def start(self, subject: Subject, threads: int) -> Running:
        """A fresh worker of the subject; its requests name paths here. Raises WorkerFailed."""
        raise NotImplementedError

    def imports(self, modules: Sequence[str], threads: int) -> Running:
        """A fresh interpreter that imports the modules, answers once with its "peak_rss" and ends. Raises WorkerFailed,
        also where there is no such thing.
        """
        raise NotImplementedError

    def limits(self, threads: int) -> Running:
        """A fresh worker of limits.py. Raises WorkerFailed, also where there is no such thing."""
        raise WorkerFailed("its limits are not measured")

    def facts(self, threads: int) -> dict[str, Any]:
        """The device's own "cpu", "load" and "versions", for the record; more keys join the record's "device"."""
        raise NotImplementedError

    def clock(self, threads: int) -> dict[str, Any] | None:
        """What tells whether its clock falls (see devices/throttle.py), read now; None where nothing does."""
        return None

    def done(self, record: Mapping[str, Any]) -> None:
        """Tell whoever watches the device what came out; here, of rows that the profile's memory could not hold."""
        limit = self.profile.memory_mb
        if limit is None:
            return
        for row in record["rows"]:
            if (peak := (row["memory"] or {}).get("peak_rss")) and peak > limit * 2**20:
                import click  # which is not on a device behind ssh, where this file is imported, too

                said = f"{row['name']} held {peak / 2**20:,.0f} MiB at its peak"
                click.echo(f"{said}, and {self.profile.name} has {limit:,} MiB by its profile", err=True)

    def check(
        self, subjects: Sequence[Subject], photos: Sequence[Photo], threads: int, timeout: float, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """What a device has to show besides, by the subjects' names: their rows' "against_native" (see parity.py)."""
        return {}

    def close(self) -> None:
        """End what is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Local(Device):
    """This machine: workers pinned to as many cores as they have threads, each within the memory limit."""

    def __init__(self, profile: Profile | None = None) -> None:
        super().__init__(profile or get_profile("cpu"))
        self._load = machine_load()  # before we make some ourselves

    def start(self, subject: Subject, threads: int) -> Running:
        return self.process(subject.command, threads)

    def process(self, command: Sequence[str], threads: int) -> Worker:
        limit = self._confine() if self._confine else None
        return Worker(command, threads=threads, cores=choose_cores(threads), limit=limit)

    def imports(self, modules: Sequence[str], threads: int) -> Running:
        command = [sys.executable, rss.__file__, *modules]
        return Worker(command, threads=threads, cores=choose_cores(threads))

    def limits(self, threads: int) -> Running:
        return Worker(limits.COMMAND, threads=threads, cores=choose_cores(threads))

    def clock(self, threads: int) -> dict[str, Any] | None:
        return read_clock()

    @cached_property
    def _confine(self) -> Callable[[], MemoryLimit] | None:
        return memory_limits(self.memory_limit) if self.memory_limit else None

    def facts(self, threads: int) -> dict[str, Any]:
        limit = {"bytes": self.memory_limit, "enforced_by": self._confine().enforced_by} if self._confine else None
        return {
            "cpu": cpu_facts().to_dict(),
            "load": self._load,
            "versions": package_versions(),
            "pinned": list(choose_cores(threads)),
            "memory_limit": limit,
        }
