"""A device as the suite sees it: workers are started through it, so one suite measures here, over ssh, under emulation
and in a browser's page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from ..devices import cpu_facts, get_profile
from . import limits, rss
from .record import machine_load, package_versions
from .runner import Running, Worker, WorkerFailed

if TYPE_CHECKING:
    from ..devices import Profile
    from .quality import Photo
    from .subjects import Subject

# (phase, steps done, steps in all)
Progress = Callable[[str, int, int], None]


class Device:
    """One device, reached. Use as a context manager: leaving it ends what it holds open."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

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

    def facts(self) -> dict[str, Any]:
        """The device's own "cpu", "load" and "versions", for the record; more keys join the record's "device"."""
        raise NotImplementedError

    def close(self) -> None:
        """End what is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Local(Device):
    """This machine."""

    def __init__(self, profile: Profile | None = None) -> None:
        super().__init__(profile or get_profile("cpu"))
        self._load = machine_load()  # before we make some ourselves

    def start(self, subject: Subject, threads: int) -> Running:
        return Worker(subject.command, threads=threads)

    def imports(self, modules: Sequence[str], threads: int) -> Running:
        return Worker([sys.executable, rss.__file__, *modules], threads=threads)

    def limits(self, threads: int) -> Running:
        return Worker(limits.COMMAND, threads=threads)

    def facts(self) -> dict[str, Any]:
        return {"cpu": cpu_facts().to_dict(), "load": self._load, "versions": package_versions()}


# One entry per kind of profile: how a device of that kind is reached.
WAYS: dict[str, Callable[[Profile], Device]] = {
    "local": Local,
}


def reach(profile: Profile) -> Device:
    """The device of a profile that can be reached (see require_reachable). Raises EdgecapError in one line."""
    return WAYS[profile.kind](profile)
