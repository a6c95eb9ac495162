"""The bundle on disk: opened only if whole, untouched and honest, written all at once or not at all."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .claims import check_npy, check_onnx, check_openvino, gguf_summary
from .errors import BundleError, EdgecapError, UsageError
from .graphfile import GraphError
from .manifest import check_manifest, check_path, parse_manifest

Bytes: TypeAlias = bytes  # which a bundle has a property of the same name as

MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 2 * 2**20
MAX_FILE_BYTES = 8 * 2**30  # a decoder of 1.8 billion weights in fp32 has 7.3 GB
MAX_BUNDLE_BYTES = 12 * 2**30
MAX_FILES = 256

_IGNORED = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file managers leave these; they are never read
_CODE = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".py", ".pyc", ".so", ".dll", ".dylib"}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest (docs: the format of bundle.json)."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: Literal["hash", "sizes"] = "hash") -> Bundle:
        """Open a bundle folder: check every file's size and, with "hash", SHA-256, then what its graphs claim.

        No engine sees anything yet: the checks read headers and run nothing. "sizes" saves the hashing when a bundle
        already verified is loaded again. Raises UsageError if there is no bundle at `path`, BundleError if it is
        incomplete, changed, unsafe, too large, from a newer edgecap, or if its graphs are not what it says.
        """
        if verify not in ("hash", "sizes"):
            raise UsageError(f"verify must be 'hash' or 'sizes', not {verify!r}")
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file; a bundle is a folder" if folder.exists() else "there is no such bundle"
            raise UsageError(f"{folder}: {what}")
        try:
            manifest = _read_manifest(folder)
            _check_folder(folder, manifest["files"], verify)
            _check_contents(folder, manifest)
        except OSError as error:
            raise BundleError(f"{folder}: cannot be read ({error.strerror or error})") from None
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def bytes(self) -> int:
        """Size of all its files, bundle.json included."""
        listed = sum(entry["bytes"] for entry in self.manifest["files"].values())
        return listed + (self.path / MANIFEST).stat().st_size

    @property
    def sha256(self) -> str:
        """Hash of bundle.json, which holds the hash of every other file: it identifies the bundle."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def file(self, name: str) -> Path:
        """Path of a listed file, or of a folder of listed files; anything else is a BundleError."""
        if name not in self.manifest["files"] and name not in _folders(self.manifest["files"]):
            raise BundleError(f"{self.path}: {name} is not a file of this bundle")
        return self.path / name

    def read(self, name: str) -> Bytes:
        """Contents of a listed file."""
        try:
            return self.file(name).read_bytes()
        except OSError as error:
            raise BundleError(f"{self.path}: {name} cannot be read ({error.strerror or error})") from None


# --- reading ----------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise BundleError(f"{folder}: there is no {MANIFEST}, so the bundle is incomplete; export it again")
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{folder}: {MANIFEST} is not a plain file; a bundle holds no links")
    if info.st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{folder}: {MANIFEST} is larger than {MAX_MANIFEST_BYTES:,} bytes")
    return parse_manifest(path.read_bytes(), str(path))


def _check_folder(folder: Path, files: Mapping[str, Any], verify: str) -> None:
    if MANIFEST in files:
        raise BundleError(f"{folder}: {MANIFEST} lists itself; export the bundle again")
    if len(files) > MAX_FILES:
        raise BundleError(f"{folder}: {len(files)} files, more than the limit of {MAX_FILES}")
    total = 0
    for name, entry in files.items():
        total += entry["bytes"]
        if entry["bytes"] > MAX_FILE_BYTES or total > MAX_BUNDLE_BYTES:
            raise BundleError(f"{folder}: {name} makes it larger than a bundle may be ({MAX_BUNDLE_BYTES:,} bytes)")
    present = set(_walk(folder, files, _folders(files)))
    for name, entry in files.items():
        if name not in present:
            raise BundleError(f"{folder}: {name} is missing; copy the bundle again or export it again")
        _check_file(folder, name, entry, verify)


def _folders(files: Mapping[str, Any]) -> set[str]:
    """The folders that listed files lie in."""
    return {name[:at] for name in files for at, character in enumerate(name) if character == "/"}


def _walk(folder: Path, files: Mapping[str, Any], folders: set[str], prefix: str = "") -> Iterator[str]:
    """Names of what lies in the bundle. BundleError at the first link, and at what is not listed."""
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.name in _IGNORED:
                continue
            if entry.is_symlink():
                raise BundleError(f"{folder}: {name} is a link; a bundle holds plain files")
            if name in folders and entry.is_dir(follow_symlinks=False):
                yield from _walk(folder, files, folders, name + "/")
            elif name in files or name == MANIFEST:
                yield name
            else:
                raise BundleError(f"{folder}: {name} is not listed in {MANIFEST}; remove it or export again")


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], verify: str) -> None:
    path, where, again = folder / name, f"{folder}: {name}", "copy the bundle again or export it again"
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{where} is not a plain file")
    if info.st_size != entry["bytes"]:
        raise BundleError(f"{where} has {info.st_size:,} bytes instead of {entry['bytes']:,}; {again}")
    if _may_run_code(path, info.st_size):
        raise BundleError(f"{where} is a pickle, archive or program, which a bundle may not hold")
    if verify == "hash" and _sha256(path) != entry["sha256"]:
        raise BundleError(f"{where} is not the file that was exported (SHA-256 differs); {again}")


def _check_contents(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Read what every graph and array claims to be, so that no engine is handed one that lies.

    A file is read as what its name ends in says, for so do the engines; a graph of the onnx backend always as ONNX.
    """
    files, graphs = manifest["files"], {graph["file"]: graph for graph in manifest.get("graphs", {}).values()}
    for name, entry in files.items():
        graph = graphs.get(name)
        kind = ".onnx" if graph and manifest["backend"] == "onnx" else Path(name).suffix.lower()
        if kind not in (".onnx", ".gguf", ".npy") and not (kind == ".xml" and graph):
            continue
        try:
            with _mapped(folder / name, entry["bytes"]) as data:
                weights = files[graph["weights"]]["bytes"] if graph and "weights" in graph else None
                if kind == ".onnx":
                    check_onnx(data, graph, weights)
                elif kind == ".gguf":
                    gguf_summary(data)
                elif kind == ".npy":
                    check_npy(data)
                else:
                    check_openvino(data, weights)
        except GraphError as error:
            raise BundleError(f"{folder}: {name} cannot be loaded: {error}") from None


@contextmanager
def _mapped(path: Path, size: int) -> Iterator[memoryview]:
    """A file's contents without reading more of it than is looked at."""
    if not size:
        yield memoryview(b"")
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        with memoryview(pages) as view:
            yield view


def _may_run_code(path: Path, size: int) -> bool:
    """Whether loading this file could run code: by name, or by a pickle's or torch archive's first bytes."""
    if path.suffix.lower() in _CODE:
        return True
    with open(path, "rb") as file:
        head = file.read(4)
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            file.seek(size - 1)
            return file.read(1) == b"."  # the pickle STOP opcode: raw weights may begin with the same two bytes
    return head == b"PK\x03\x04"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing ----------------------------------------------------------------------------------------

_writing: set[str] = set()  # unfinished folders of this process


def write_bundle(out: str | os.PathLike[str], manifest: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> Bundle:
    """Write a bundle folder atomically and return it, opened.

    manifest: without "files", which is filled in here with the size and SHA-256 of each of `files` (name →
    path or contents; a name may be in folders: "x.mlpackage/Manifest.json"). All is written and synced beside
    `out`, bundle.json last, and only then takes the place of an earlier bundle; what a killed process left is
    cleaned up. Raises UsageError if something that is no bundle lies at `out`.
    """
    out = Path(out).absolute()
    check_place(out)
    for name in files:
        check_path(name, str(out / MANIFEST))
    with folder_beside(out) as temporary:
        try:
            for name in sorted(_folders(files)):
                (temporary / name).mkdir(exist_ok=True)
            complete = {
                **manifest,
                "files": {name: _write(temporary / name, files[name]) for name in sorted(files)},
            }
            check_manifest(complete, str(out / MANIFEST))
            text = json.dumps(complete, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            _write(temporary / MANIFEST, text.encode())
            for name in sorted(_folders(files), reverse=True):
                _sync_folder(temporary / name)
            _sync_folder(temporary)
            Bundle.open(temporary, verify="sizes")
            swap(temporary, out)
        except OSError as error:
            raise _unwritable(out, error) from None
    return Bundle.open(out, verify="sizes")


def check_place(out: Path) -> None:
    """Raise UsageError if something that is no bundle lies at `out`: a bundle cannot be written there."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or not _replaceable(out)):
        raise UsageError(f"{out} exists and is not a bundle; choose another place or remove it")


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A folder of this process beside `out`, gone in the end; those of killed processes are cleaned up first."""
    out = out.absolute()
    folder = out.parent / f".{out.name}.new-{os.getpid()}-{os.urandom(4).hex()}"
    _writing.add(folder.name)
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            recover(out)
            folder.mkdir()
        except OSError as error:
            raise _unwritable(out, error) from None
        yield folder
    finally:
        _remove(folder)
        _writing.discard(folder.name)


def _unwritable(out: Path, error: OSError) -> EdgecapError:
    return EdgecapError(f"{out}: the bundle cannot be written ({error.strerror or error})")


def recover(out: Path) -> None:
    """Clean up what a killed process left beside `out`; a bundle caught mid-swap is put back."""
    pattern = re.compile(re.escape(f".{out.name}.") + r"(new|old)-(\d+)-[0-9a-f]{8}")
    for path in sorted(out.parent.glob(f".{out.name}.*")):
        match = pattern.fullmatch(path.name)
        if not match or path.name in _writing or _alive(int(match[2])):
            continue
        if match[1] == "old" and not out.exists():
            path.rename(out)
        else:
            _remove(path)


def _replaceable(out: Path) -> bool:
    return (out / MANIFEST).is_file() or not any(out.iterdir())


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process lists what it is writing; the rest is from an earlier one with the same id
    if os.name != "posix":
        return True  # no harmless way to ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _write(path: Path, content: Path | bytes) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as target:
        if isinstance(content, bytes):
            target.write(content)
            digest.update(content)
            size = len(content)
        else:
            with open(content, "rb") as source:
                while chunk := source.read(2**20):
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _remove(folder: Path) -> None:
    import shutil  # with its compressors a noticeable part of the import, and only writers need it

    shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap(new: Path, out: Path) -> None:
    """Put `new`, a `folder_beside(out)`, in the place of `out`: whoever is killed meanwhile leaves one of the two, and
    `recover` puts it back."""
    old = out.parent / new.name.replace(".new-", ".old-")
    if out.exists():
        _writing.add(old.name)
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync_folder(out.parent)
    _remove(old)
    _writing.discard(old.name)
