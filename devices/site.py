"""A captioner as a web page: plain files for any server, kept by the browser for when it is offline; edgecap site."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..runtime.bundle import Bundle, folder_beside, swap
from ..runtime.errors import EdgecapError, UsageError
from .browser import ISOLATED, TYPES
from .webfiles import PACKAGE, bundle_files, ort_files, package_files

DEMO = PACKAGE / "demo"
FILES = "files.json"  # path and SHA-256 of every other file: what the service worker keeps
VERSION = 'const VERSION = "development";'
HEADERS = ISOLATED | {"Cache-Control": "no-cache"}  # asked again each time; the service worker keeps what it needs


@dataclass(frozen=True)
class Weight:
    """Bytes of a part of a site, as they are and by gzip (level 9)."""

    part: str  # "page" (with the JavaScript runtime), "engine" (ONNX Runtime) or "bundle"
    bytes: int
    gzip: int


def write_site(bundle: Bundle, out: Path) -> list[Weight]:
    """Write the folder `out`, in the place of an earlier site; what it weighs.

    Raises UsageError where `out` holds anything else, for a bundle of another backend, and without onnxruntime-web.
    """
    out = out.resolve()
    if bundle.manifest["backend"] != "onnx":
        raise UsageError(f"{bundle.path} is for {bundle.manifest['backend']}: pages run onnx bundles alone")
    _check_place(out)
    sums: dict[str, list[int]] = {}
    listed = []
    with folder_beside(out) as new:
        for part, path, data in _files(bundle):
            place = new / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            listed.append({"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
            both = sums.setdefault(part, [0, 0])
            both[0] += len(data)
            both[1] += len(gzip.compress(data, 9, mtime=0))
        text = json.dumps({"files": listed}, indent=1)
        (new / FILES).write_text(text, encoding="utf-8")
        script = (DEMO / "sw.js").read_text(encoding="utf-8")
        version = hashlib.sha256((text + script).encode()).hexdigest()[:16]
        (new / "sw.js").write_text(script.replace(VERSION, f'const VERSION = "{version}";'), encoding="utf-8")
        swap(new, out)
    return [Weight(part, *both) for part, both in sums.items()]


def _check_place(out: Path) -> None:
    """UsageError unless nothing is lost by replacing `out`: it is free, empty, or holds the files of a site alone."""
    here = Path.cwd()
    if out == here or out in here.parents:
        raise UsageError(f"{out} is the current folder, or above it; choose another place")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; choose another place or remove it")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    try:
        listed = {each["path"] for each in json.loads((out / FILES).read_bytes())["files"]} if present else set()
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(f"{out} exists and is no such site; choose another place or remove it") from None
    if others := sorted(present - listed - {FILES, "sw.js"}):
        raise UsageError(f"{out} holds {others[0]}, which is of no such site; choose another place or move it away")


def _files(bundle: Bundle) -> Iterator[tuple[str, str, bytes]]:
    """(part, path in the site, contents) of all but the service worker and its list."""
    for file in sorted(DEMO.iterdir()):
        if file.name != "sw.js":
            yield "page", file.name, file.read_bytes()
    for path, file in package_files():
        yield "page", path, file.read_bytes()
    for path, file in ort_files(webgpu=False):
        yield "engine", path, file.read_bytes()
    for name, found in bundle_files(bundle):
        yield "bundle", f"bundle/{name}", found if isinstance(found, bytes) else bundle.read(name)


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **TYPES}

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Serves a site on this machine alone: browsers take localhost for secure, with no certificate. port 0: any."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=os.fspath(folder)))
    except OSError as error:
        raise EdgecapError(f"port {port} cannot be used ({error.strerror}): choose another --port") from None


def show(out: Path, weights: list[Weight], as_json: bool) -> None:
    """Print what a site weighs: a table, or one JSON object."""
    whole = Weight("all", sum(each.bytes for each in weights), sum(each.gzip for each in weights))
    if as_json:
        print(json.dumps({"site": str(out), "weight": [asdict(each) for each in (*weights, whole)]}), flush=True)
        return
    for each in (*weights, whole):
        print(f"{each.part:8}{each.bytes / 1e6:8.2f} MB{each.gzip / 1e6:8.2f} MB gzip")
    print(f"written to {out}", flush=True)
