"""arm64 under emulation on the bench: captions, and how far they and their logits are from this machine's own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import Profile
from ..devices.emulated_arm64 import Root, prepare
from ..runtime.progress import Progress
from .device import Device, Local
from .parity import native_parity
from .record import machine_load
from .runner import Running, Worker, WorkerFailed

if TYPE_CHECKING:
    from .quality import Photo
    from .subjects import Subject

SLOWER = 30  # times --timeout: int8 products are emulated a hundred times slower than they run


class Emulated(Device):
    """Workers under qemu. They read this machine's files, so nothing is shipped."""

    timed = False
    slower = SLOWER
    photos = 20

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self._load = machine_load()
        self._root: Root | None = None
        # edgecap alone, and not the folder it lies in: that holds packages of this machine's own processor.
        self._code = tempfile.TemporaryDirectory(prefix="edgecap-arm64-")
        (Path(self._code.name) / "edgecap").symlink_to(Path(__file__).resolve().parent.parent)

    def prepare(self, subjects: Sequence[Subject], photos: Sequence[Photo], progress: Progress) -> None:
        self._root = prepare(progress)

    def start(self, subject: Subject, threads: int) -> Running:
        if subject.kind != "bundle":
            raise WorkerFailed("peers run on this machine alone")
        assert self._root is not None
        command = self._root.command("-m", "edgecap.benchmarks.worker")
        return Worker(command, threads=threads, environment=self._root.environment(Path(self._code.name)))

    def facts(self, threads: int) -> dict[str, Any]:
        from .. import __version__

        assert self._root is not None
        versions = {"python": "", "edgecap": __version__} | self._root.versions
        versions.pop("machine", None)
        return {"cpu": self._root.cpu(), "load": self._load, "versions": versions, "times": "emulated"}

    def check(
        self, subjects: Sequence[Subject], photos: Sequence[Photo], threads: int, timeout: float, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        more = timeout * SLOWER
        return native_parity(Local(), self, subjects, photos, threads=threads, timeout=more, progress=progress)

    def close(self) -> None:
        self._code.cleanup()
