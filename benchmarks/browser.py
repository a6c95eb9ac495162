"""A phone's or any other browser as a device of the bench: its page is asked over HTTP what a worker process is asked
over a pipe.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from ..devices import webfiles
from ..devices.browser import Server
from ..devices.certificate import Certificate, certificate
from ..devices.channel import Channel, Lost
from ..devices.confine import choose_cores
from ..devices.headless import Headless
from ..devices.lan import lan_addresses, qr_code
from ..devices.local import cache_folder
from ..runtime.errors import EdgecapError
from ..runtime.progress import Progress
from .browser_answers import browser_name, checked, device_facts
from .device import Device
from .record import machine_load, package_versions
from .runner import Running, Worker, WorkerFailed, no_answer

if TYPE_CHECKING:
    from ..devices import Profile
    from .quality import Photo
    from .subjects import Subject

COLD_START = "from the start of a Web Worker to its first caption; the bundle and the .wasm are in the page by then"
NATIVE = " native"  # after the name of a bundle that is measured on this machine, too
MEMORY_TIMEOUT = 60.0  # seconds; the page itself gives up after 30


@dataclass(frozen=True)
class Options:
    """How a browser is measured."""

    wait: float = 600.0  # seconds for a device to open the page
    http: bool = False  # no certificate: what a LAN's page may then do is little
    webgpu: bool = False  # instead of WebAssembly
    open: str | None = None  # a Chromium on this machine that opens the page, without a window
    lan: bool = False  # others on the network reach the page although `open` opens it
    native: bool = False  # each bundle is measured on this machine, too, on the same photos in the same rounds


class Browser(Device):
    """The first device that opens the page; `prepare` shows its address and waits for it."""

    def __init__(self, profile: Profile, options: Options | None = None) -> None:
        super().__init__(profile)
        self._options = options = options or Options()
        self._load = machine_load()
        self._ort = dict(webfiles.ort_files(webgpu=options.webgpu))  # the one thing that may be missing, so first
        files = [*webfiles.page_files(), *webfiles.package_files(), *self._ort.items()]
        alone = options.open is not None and not options.lan
        self._addresses = [] if alone else lan_addresses()
        self._certificate = None if options.http else _certificate(self._addresses)
        self.channel = Channel()
        self.server = Server(self.channel, certificate=self._certificate, host="127.0.0.1" if alone else "0.0.0.0")
        for path, file in files:
            self.server.add(path, file)
        self._folder = tempfile.TemporaryDirectory(prefix="edgecap-photos-")
        self._photos: dict[str, str] = {}  # file here → path below the address
        self._bundles: dict[Path, tuple[str, dict[str, int]]] = {}  # folder here → address, {path there: bytes}
        self._native: set[str] = set()
        self._hello: dict[str, Any] = {}
        self._headless: Headless | None = None
        self._workers = 0
        self.progress: float | None = None  # share of the present phase; each command takes it along for the screen
        self.server.start()

    @property
    def url(self) -> str:
        """Where the page is, as others on the LAN see it."""
        return self.server.url(self._addresses[0] if self._addresses else "127.0.0.1")

    def subjects(self, subjects: Sequence[Subject]) -> list[Subject]:
        if any(subject.fused for subject in subjects):
            click.echo("one-graph forms are left out: they are not measured in a browser", err=True)
            subjects = [subject for subject in subjects if not subject.fused]
        if not self._options.native:
            return list(subjects)
        self._native = {subject.name + NATIVE for subject in subjects}
        return [*subjects, *map(_native, subjects)]

    def watching(self, progress: Progress) -> Progress:
        def both(phase: str, done: int, total: int) -> None:
            self.progress = done / total if total else None
            progress(phase, done, total)

        return both

    def prepare(self, subjects: Sequence[Subject], photos: Sequence[Photo], progress: Progress) -> None:
        for subject in subjects:
            if subject.kind == "bundle" and subject.path not in self._bundles:
                self._bundles[subject.path] = self._serve_bundle(subject.path, f"bundles/{len(self._bundles)}/")
        for i, photo in enumerate(photos):
            self._photos[photo.path] = f"photos/{i}.png"
            self.server.add(f"photos/{i}.png", partial(png, photo.path), "photo")
        self._announce()
        self._hello = device_facts(self._wait())
        browser, system = browser_name(self._hello["user_agent"])
        click.echo(f"{browser} on {system} opened the page", err=True)
        if not self._hello["isolated"]:
            click.echo("its page is not secure or not isolated: 1 thread", err=True)

    def _serve_bundle(self, folder: Path, base: str) -> tuple[str, dict[str, int]]:
        from ..runtime.bundle import Bundle

        sizes = {}
        for name, found in webfiles.bundle_files(Bundle.open(folder, verify="sizes")):
            self.server.add(base + name, found, "bundle")
            sizes[base + name] = len(found) if isinstance(found, bytes) else found.stat().st_size
        return base, sizes

    def _announce(self) -> None:
        def say(line: str) -> None:
            click.echo(line, err=True)

        options = self._options
        if options.open:
            spki = self._certificate.spki if self._certificate else None
            self._headless = Headless(options.open, self.url, spki=spki)
            return
        say("Open this address on the device, in the same network:")
        say(f"\n  {self.url}\n")
        for other in self._addresses[1:4]:
            say(f"  or, in another network of this machine, {self.server.url(other)}")
        if not self._addresses:
            say("(This machine has no address on a network: only a browser on it can.)")
        elif sys.stderr.isatty():
            say(qr_code(self.url) or "(pip install 'edgecap[browser]' shows it as a QR code, too)")
        if self._certificate:
            say("Its browser will warn once, because the certificate was made here: go on to the page.")
        else:
            say("Plain HTTP: 1 thread, no WebGPU, and the screen may go dark.")
        say(f"Waiting up to {options.wait:g} s; Ctrl-C ends.")

    def _wait(self) -> Any:
        """What the device says of itself. EdgecapError where none comes, or the browser started here ends."""
        until = monotonic() + self._options.wait
        while True:
            try:
                return self.channel.wait(min(1.0, max(0.0, until - monotonic())))
            except Lost:
                if self._headless and self._headless.ended is not None:
                    code, said = self._headless.ended, self._headless.said
                    raise EdgecapError(
                        f"{self._options.open} ended with exit code {code} before it opened the page"
                        + (said and f": {said}")
                    ) from None
                if monotonic() >= until:
                    raise EdgecapError(
                        f"no device opened {self.url} within {self._options.wait:g} s: is it in the same network, and "
                        "does a firewall let it in? --wait gives it longer"
                    ) from None

    def start(self, subject: Subject, threads: int) -> Running:
        if subject.name in self._native:
            return Native(subject, threads, self)
        if subject.kind != "bundle":
            raise WorkerFailed("peers do not run in a browser")
        self._workers += 1
        return PageWorker(self, subject, f"w{self._workers}")

    def imports(self, modules: Sequence[str], threads: int) -> Running:
        raise WorkerFailed("a browser's page imports no Python")

    def facts(self, threads: int) -> dict[str, Any]:
        hello = self._hello
        browser, system = browser_name(hello["user_agent"])
        cpu = {
            "model": f"{browser} on {system}",
            "isa": "wasm32",
            "flags": ["simd", *(["threads"] if hello["isolated"] else []), *(["webgpu"] if hello["webgpu"] else [])],
            "cores": hello["cores"] or 1,
            "memory_mb": int(hello["memory_gb"] * 1024) if hello["memory_gb"] else None,
            "system": system,
        }
        about = hello | {"engine": "webgpu" if self._options.webgpu else "wasm", "cold_start": COLD_START}
        versions = package_versions() | {"onnxruntime-web": webfiles.ort_version()}
        load = self._load if self._headless else None  # of this machine, where it is the browser's, too
        return {"cpu": cpu, "load": load, "versions": versions, "browser": about}

    def check(
        self, subjects: Sequence[Subject], photos: Sequence[Photo], threads: int, timeout: float, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Token by token against this machine, where it is measured, too (its rows are among the subjects)."""
        by_name = {subject.name: subject for subject in subjects}
        pairs = [(by_name[name.removesuffix(NATIVE)], by_name[name]) for name in sorted(self._native)]
        pairs = [(page, here) for page, here in pairs if page.kind == "bundle"]
        found, done = {}, 0
        for page, here in pairs:
            same = {"same_tokens": 0, "same_captions": 0}
            try:
                with self.start(page, threads) as a, self.start(here, threads) as b:
                    for worker, subject in ((a, page), (b, here)):
                        worker.ask("load", timeout=timeout, **subject.load_request(threads))
                    for photo in photos:
                        (theirs,) = a.ask("caption", photos=[photo.path], timeout=timeout)["captions"]
                        (ours,) = b.ask("caption", photos=[photo.path], timeout=timeout)["captions"]
                        same["same_tokens"] += theirs["ids"] == ours["ids"]
                        same["same_captions"] += theirs["text"] == ours["text"]
                        progress("tokens", done := done + 1, len(pairs) * len(photos))
            except WorkerFailed as failure:
                found[page.name] = {"ok": False, "error": str(failure)}
                continue
            ok = same["same_tokens"] == len(photos) if page.facts.get("precision") == "fp32" else None
            found[page.name] = {"photos": len(photos), **same, "min_cosine": None, "ok": ok, "error": None}
        return found

    def done(self, record: dict[str, Any]) -> None:
        """Show the results on the device itself."""
        super().done(record)
        self.channel.end(result(record))

    def close(self) -> None:
        self.channel.end({"text": "The bench was stopped."})
        self.server.close()
        if self._headless:
            self._headless.close()
        self._folder.cleanup()

    def load_command(self, subject: Subject, request: dict[str, Any]) -> dict[str, Any]:
        """A worker's "load" request as the page takes it."""
        base, files = self._bundles[subject.path]
        script, _, wasm = self._ort
        return {
            "op": "load",
            "name": subject.name,
            "bundle": base,
            "files": files,
            "ort": {"script": script, "wasm": wasm, "bytes": self._ort[wasm].stat().st_size},
            "threads": request["threads"],
            "decoding": request["decoding"],
            "webgpu": self._options.webgpu,
        }

    def weight(self, subject: Subject) -> dict[str, int]:
        """Bytes that the page fetched to caption with a bundle, as they went over the wire: by gzip, but for the
        "as_is" of them (large files, see devices/browser.py).
        """
        runtime, bundle = self.server.weight("runtime"), self.server.weight("bundle", self._bundles[subject.path][0])
        return {"runtime": runtime[0], "bundle": bundle[0], "as_is": runtime[1] + bundle[1]}

    def photo(self, file: str) -> str:
        return self._photos[file]

    def png_file(self, file: str) -> str:
        """The photo that a page gets, as a file here."""
        path = Path(self._folder.name) / Path(self._photos[file]).name
        if not path.exists():
            path.write_bytes(png(file))
        return str(path)


def _native(subject: Subject) -> Subject:
    """The same on this machine; its row's facts say so."""
    return replace(subject, name=subject.name + NATIVE, facts=dict(subject.facts) | {"on": "native"})


class PageWorker(Running):
    """A Web Worker in the device's page. Answers come in the order of the requests."""

    def __init__(self, device: Browser, subject: Subject, id: str) -> None:
        self._device, self._subject, self._id = device, subject, id
        self._visit = device.channel.visit
        self._asked: list[tuple[int, dict[str, Any]]] = []

    def send(self, request: dict[str, Any]) -> None:
        if request["op"] == "load":
            command = self._device.load_command(self._subject, request)
        else:
            command = dict(request)
            if "photos" in request:
                command["photos"] = [self._device.photo(file) for file in request["photos"]]
        try:
            id = self._device.channel.send(command | {"worker": self._id, "done": self._device.progress}, self._visit)
        except Lost as lost:
            raise WorkerFailed(str(lost)) from None
        self._asked.append((id, command))

    def receive(self, timeout: float) -> dict[str, Any]:
        id, command = self._asked.pop(0)
        try:
            answer = self._device.channel.take(id, self._visit, timeout)
        except Lost as lost:
            raise WorkerFailed(str(lost)) from None
        except TimeoutError:
            raise WorkerFailed(no_answer(timeout)) from None
        found = checked(command, answer)
        if command["op"] == "load":
            found["facts"]["page_weight"] = self._device.weight(self._subject)
        return {"peak_rss": None} | found

    def peak_memory(self, answer: dict[str, Any], timeout: float) -> int | None:
        return self.ask("memory", timeout=min(timeout, MEMORY_TIMEOUT))["bytes"]

    def close(self) -> None:
        try:
            self._device.channel.send({"op": "close", "worker": self._id}, self._visit)
        except Lost:
            pass  # it ended with its page


class Native(Worker):
    """The same bundle in a process on this machine, captioning the same PNG files as the page."""

    def __init__(self, subject: Subject, threads: int, device: Browser) -> None:
        self._device = device
        super().__init__(subject.command, threads=threads, cores=choose_cores(threads))

    def send(self, request: dict[str, Any]) -> None:
        if "photos" in request:
            request = request | {"photos": [self._device.png_file(file) for file in request["photos"]]}
        if "photo" in request:
            request = request | {"photo": self._device.png_file(request["photo"])}
        super().send(request)


def png(file: str) -> bytes:
    """A photo upright and in RGB as a PNG file: every decoder gives the same pixels, which JPEG's do not promise."""
    from ..runtime.preprocess import load_image

    out = io.BytesIO()
    load_image(file).save(out, "PNG", compress_level=3)
    return out.getvalue()


def result(record: dict[str, Any]) -> dict[str, Any]:
    """What the page shows at the end."""

    def ms(seconds: float | None) -> str:
        return "–" if seconds is None else f"{seconds * 1e3:,.0f} ms"

    rows: list[dict[str, Any]] = []
    for row in record["rows"]:
        if row["status"] != "ok":
            rows.append({"name": row["name"], "error": row["error"]})
            continue
        whole, cold = row["latency"]["end_to_end"], row["cold_start"] or {}
        times = [cold.get("seconds"), whole["p50"], whole["p90"]]
        cider = f"{row['quality']['cider']:.3f}" if row["quality"] else "–"  # photos without references
        rows.append({"name": row["name"], "values": [*map(ms, times), cider]})
    text = "Done. You may close this page."
    return {"text": text, "columns": ["cold start", "a caption, p50", "p90", "CIDEr"], "rows": rows}


def _certificate(addresses: Sequence[str]) -> Certificate | None:
    if find_spec("cryptography") is None:
        click.echo("HTTPS needs the package cryptography: pip install 'edgecap[browser]'", err=True)
        return None
    return certificate(cache_folder() / "browser", ["127.0.0.1", "localhost", *addresses])
