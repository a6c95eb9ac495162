"""Which files a page in a browser needs: itself, the runtime's package, ONNX Runtime's own, and a bundle's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import EdgecapError, UsageError

if TYPE_CHECKING:
    from ..runtime.bundle import Bundle

PAGE = Path(__file__).resolve().parent / "page"
PACKAGE = Path(__file__).resolve().parent.parent / "runtime" / "web"
ENVIRONMENT = "EDGECAP_ORT_WEB"
# The script to import, and the names of the WebAssembly behind it, the first that there is: releases renamed them.
WASM = ("ort.wasm.min.mjs", ("ort-wasm-simd-threaded",))
WEBGPU = ("ort.webgpu.min.mjs", ("ort-wasm-simd-threaded.asyncify", "ort-wasm-simd-threaded.jsep"))


def page_files() -> Iterator[tuple[str, Path]]:
    """The bench's page: (path below the address, file)."""
    for file in sorted(PAGE.iterdir()):
        if file.suffix in (".html", ".css", ".js"):
            yield "" if file.name == "index.html" else file.name, file


def package_files() -> Iterator[tuple[str, Path]]:
    """The npm package `edgecap`, below edgecap/. Raises EdgecapError where this installation has none."""
    found = sorted(PACKAGE.glob("*.js"))
    if not any(file.name == "index.js" for file in found):
        raise EdgecapError(f"there is no JavaScript runtime in {PACKAGE}: install edgecap again")
    for file in found:
        yield f"edgecap/{file.name}", file


def ort_folder() -> Path:
    """The folder of onnxruntime-web's built files. Raises UsageError that says how to install them."""
    given = os.environ.get(ENVIRONMENT)
    tried = [Path(given)] if given else [PACKAGE / "node_modules" / "onnxruntime-web"]
    for folder in (place for base in tried for place in (base, base / "dist")):
        if (folder / WASM[0]).is_file():
            return folder.resolve()
    raise UsageError(
        f"onnxruntime-web is not in {tried[0]}: npm install --prefix DIR onnxruntime-web, "
        f"then {ENVIRONMENT}=DIR/node_modules/onnxruntime-web"
    )


def ort_files(*, webgpu: bool) -> Iterator[tuple[str, Path]]:
    """ONNX Runtime for one way to compute, below ort/; the first is the script to import. Raises UsageError."""
    folder = ort_folder()
    script, names = WEBGPU if webgpu else WASM
    name = next((name for name in names if (folder / f"{name}.wasm").is_file()), None)
    if name is None or not (folder / script).is_file():
        raise UsageError(f"{folder} lacks {script} or its .wasm: install onnxruntime-web again (1.23 or later)")
    for file in (script, f"{name}.mjs", f"{name}.wasm"):
        yield f"ort/{file}", folder / file


def bundle_files(bundle: Bundle) -> Iterator[tuple[str, bytes | Path]]:
    """A bundle as a page gets it: (name, file), bundle.json as its text.

    Pages run the two graphs, so that a fused one stays behind, and the bundle.json that they get says no more of it.
    """
    from ..runtime.bundle import MANIFEST  # and NumPy, which the list of devices does without

    manifest, text = bundle.manifest, bundle.path.joinpath(MANIFEST).read_bytes()
    if fused := manifest["graphs"].get("fused"):
        left = {fused["file"], fused.get("weights")}
        graphs = {name: graph for name, graph in manifest["graphs"].items() if name != "fused"}
        files = {name: entry for name, entry in manifest["files"].items() if name not in left}
        manifest = {**manifest, "graphs": graphs, "files": files}
        text = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    yield MANIFEST, text
    for name in manifest["files"]:
        yield name, bundle.file(name)


def lacking() -> str | None:
    """What serving a page lacks, in one line; None when nothing."""
    try:
        list(package_files())
        ort_folder()
    except EdgecapError as error:
        return error.message
    return None


def ort_version() -> str:
    """The version of onnxruntime-web; "unknown" where its package.json is not beside it."""
    folder = ort_folder()
    for place in (folder, folder.parent):
        try:
            return str(json.loads((place / "package.json").read_text(encoding="utf-8"))["version"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "unknown"
