"""A device over ssh on the bench: ships edgecap, bundles and photos once, and has the device measure itself."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from .. import __version__
from ..devices import Profile
from ..devices.local import cache_folder
from ..devices.ssh import Host, file_hash
from ..devices.wheels import own_wheel, wheel_set
from ..runtime.errors import EdgecapError
from ..runtime.progress import Progress
from .device import Device
from .runner import Running, Worker, WorkerFailed

if TYPE_CHECKING:
    from .quality import Photo
    from .subjects import Subject

RELAY = "edgecap.benchmarks.relay"
ANSWER = 7 * 24 * 3600.0  # s that the relay waits for its worker: how long an answer may take is decided here
Files = list[tuple[str, Path]]


class Ssh(Device):
    """Workers on a device that ssh reaches; each has a relay (see relay.py) beside it."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.host = Host(profile)
        self._there: dict[str, str] = {}  # paths here → paths there
        self._environment: dict[str, str] = {}
        self._found: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Connect: a device that cannot be reached is told before anything is prepared for it."""
        try:
            self._found = self.host.probe()
        except BaseException:
            self.close()
            raise
        return self

    def prepare(self, subjects: Sequence[Subject], photos: Sequence[Photo], progress: Progress) -> None:
        found = self._found
        wanted: dict[str, Files] = {}
        with tempfile.TemporaryDirectory(prefix="edgecap-wheel-") as folder:
            if not self.profile.python:
                wheels = [own_wheel(Path(folder)), *wheel_set(cache_folder() / "devices", self.host.platform(found))]
                sites = {f"sites/{file_hash(path)}": path for path in wheels}
                wanted |= {place: [(path.name, path)] for place, path in sites.items()}
                self._environment = {"PYTHONPATH": ":".join(f"{found['cache']}/{place}" for place in sites)}
            for place, files, path in _units(subjects, photos):
                wanted[place] = files
                self._there[path] = f"{found['cache']}/{place}"
            self.host.ship(wanted, found["free"], lambda done, total: progress("ship", done, total))

    def start(self, subject: Subject, threads: int) -> Running:
        if subject.kind != "bundle":
            raise WorkerFailed("peers run on this machine alone")
        return self._relay(threads, start="bundle", memory_limit=self.memory_limit)

    def imports(self, modules: Sequence[str], threads: int) -> Running:
        return self._relay(threads, start="imports", modules=list(modules))

    def limits(self, threads: int) -> Running:
        return self._relay(threads, start="limits")

    def _relay(self, threads: int, **first: Any) -> Running:
        command = self.host.module(RELAY, self._environment)
        return Relayed(command, {"threads": threads, "timeout": ANSWER, **first}, self._there)

    def facts(self, threads: int) -> dict[str, Any]:
        try:
            with self._relay(threads, start="facts", memory_limit=self.memory_limit) as relay:
                facts = dict(relay.receive(60)["facts"])
        except WorkerFailed as failure:
            raise EdgecapError(f"{self.host.name}: {self.host.python} cannot run edgecap there: {failure}") from None
        there = facts["versions"].get("edgecap")
        if self.profile.python and there and there != __version__:
            click.echo(f"{self.host.name} measures edgecap {there}; this machine has {__version__}", err=True)
        return facts

    def clock(self, threads: int) -> dict[str, Any] | None:
        try:
            with self._relay(threads, start="clock") as relay:
                return dict(relay.receive(60)["clock"])
        except (WorkerFailed, LookupError, TypeError):  # an edgecap of its own may be older
            return None

    def close(self) -> None:
        self.host.close()


class Relayed(Worker):
    """A worker behind ssh and a relay; requests name paths here, and it maps them."""

    def __init__(self, command: Sequence[str], first: dict[str, Any], there: Mapping[str, str]) -> None:
        super().__init__(command)
        self._there = there
        super().send(first)

    def send(self, request: dict[str, Any]) -> None:
        mapped = dict(request)
        for key in ("path", "photo"):
            if key in mapped:
                mapped[key] = self._there[mapped[key]]
        if "photos" in mapped:
            mapped["photos"] = [self._there[photo] for photo in mapped["photos"]]
        super().send(mapped)


def _units(subjects: Sequence[Subject], photos: Sequence[Photo]) -> list[tuple[str, Files, str]]:
    """(place on the device, files, path here) of every bundle and photo; places are named by contents."""
    units: list[tuple[str, Files, str]] = []
    for subject in subjects:
        if subject.kind == "bundle":
            files = [path for path in sorted(subject.path.rglob("*")) if path.is_file()]
            named = [(path.relative_to(subject.path).as_posix(), path) for path in files]
            # Of every file, and not the manifest's claims alone: a changed one must be seen there as it would be here.
            key = hashlib.sha256("".join(f"{name} {file_hash(path)}\n" for name, path in named).encode())
            units.append((f"bundles/{key.hexdigest()[:32]}", named, str(subject.path)))
    for photo in photos:
        path = Path(photo.path)
        units.append((f"photos/{file_hash(path)}{path.suffix.lower()}", [("", path)], photo.path))
    return units
