"""docs/examples for phones and C++: fused.onnx in one call, compiled and run as far as there are compilers.

They are found on the path, or named by CXX, KOTLINC and SWIFTC; ONNX Runtime's own headers in the usual folders, or in
EDGECAP_ORT_INCLUDE.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from edgecap.export.artifact import Source
from edgecap.export.assemble import assemble
from edgecap.export.fused import add_fused
from edgecap.export.golden import make_golden
from edgecap.export.targets import TARGETS
from edgecap.runtime import write_bundle
from edgecap.runtime.fused import FusedCaptioner

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "docs" / "examples"
STAND_IN = HERE / "stand_in"


@pytest.fixture(scope="module")
def bundle(sources: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = sources("gru")
    source.scratch = folder = tmp_path_factory.mktemp("fused")
    artifact = TARGETS["onnx-fp32"].build(source)
    add_fused(artifact, source.checkpoint)
    golden = make_golden(source.checkpoint)
    entry = ("onnx-fp32", TARGETS["onnx-fp32"])
    write_bundle(folder / "x.edgecap", *assemble(source.checkpoint, entry, "x", artifact, golden, []))
    return folder / "x.edgecap"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library of the Python wheel under the names that linkers and loaders look for."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1*"))
    if not found:
        pytest.skip("this onnxruntime wheel holds no libonnxruntime.so (it is in those for Linux)")
    folder = tmp_path_factory.mktemp("lib")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(found[-1])
    return folder


def compiler(variable: str, *names: str) -> str:
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip(f"no {' or '.join(names)} here, and {variable} names none")
    return found


def headers() -> Path | None:
    """Where ONNX Runtime's own headers are."""
    folders = [os.environ.get("EDGECAP_ORT_INCLUDE", ""), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    return next((Path(each) for each in folders if each and Path(each, "onnxruntime_cxx_api.h").is_file()), None)


@pytest.mark.parametrize("own", [True, False], ids=["stand-in", "headers"])
def test_cpp(bundle: Path, library: Path, tmp_path: Path, own: bool) -> None:
    cxx = compiler("CXX", "g++", "clang++")
    include = STAND_IN if own else headers()
    if include is None:
        pytest.skip("ONNX Runtime's headers are not here (libonnxruntime-dev, or EDGECAP_ORT_INCLUDE)")
    warn = ["-Wall", "-Wextra", "-Werror"] if own else []
    source = EXAMPLES / "cpp" / "caption.cpp"
    link = ["-L", library, "-lonnxruntime", f"-Wl,-rpath,{library}"]
    subprocess.run([cxx, "-std=c++17", *warn, source, "-I", include, *link, "-o", tmp_path / "caption"], check=True)
    fused = FusedCaptioner.load(bundle, threads=1)
    random = np.random.default_rng(0)
    for beam, size in ((1, (40, 56)), (3, (90, 32))):
        picture = np.asarray(Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize(size[::-1]))
        Image.fromarray(picture).save(tmp_path / "photo.ppm")
        if beam > 1:  # as GIMP writes them
            photo = (tmp_path / "photo.ppm").read_bytes()
            (tmp_path / "photo.ppm").write_bytes(photo.replace(b"P6\n", b"P6\n# drawn\n  # twice\n", 1))
        command = [tmp_path / "caption", bundle / "fused.onnx", tmp_path / "photo.ppm", str(beam)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        text, logprob, ids = done.stdout.splitlines()
        wanted = fused(picture, beam=beam)
        assert text == wanted.text and tuple(map(int, ids.split()[1:])) == wanted.token_ids
        assert float(logprob.split()[1]) == pytest.approx(wanted.logprob, rel=1e-4)
    for file, says in (("none.onnx", "none.onnx"), ("fused.onnx", "not a binary PPM")):
        done = subprocess.run([tmp_path / "caption", bundle / file, __file__], capture_output=True, text=True)
        assert done.returncode == 1 and says in done.stderr


def test_the_stand_in_is_the_real_table(tmp_path: Path) -> None:
    cxx, include = compiler("CXX", "g++", "clang++"), headers()
    if include is None:
        pytest.skip("ONNX Runtime's headers are not here (libonnxruntime-dev, or EDGECAP_ORT_INCLUDE)")
    places = re.findall(r"at\((\w+), (\d+)\)", (STAND_IN / "onnxruntime_cxx_api.h").read_text())
    assert len(places) > 20
    checks = [f"static_assert(offsetof(OrtApi, {name}) == {place} * sizeof(void*));" for name, place in places]
    program = tmp_path / "check.cpp"
    program.write_text("\n".join(["#include <onnxruntime_c_api.h>", "#include <cstddef>", *checks]))
    subprocess.run([cxx, "-std=c++17", "-fsyntax-only", "-I", include, program], check=True)


def test_kotlin_compiles(tmp_path: Path) -> None:
    """Against the signatures of ONNX Runtime's Java API in stand_in, which its package is not here to give."""
    kotlinc = compiler("KOTLINC", "kotlinc")
    stubs = sorted((STAND_IN / "ai").rglob("*.java"))
    command = [kotlinc, "-Werror", EXAMPLES / "kotlin" / "Captioner.kt", *stubs, "-d", tmp_path / "out"]
    subprocess.run(command, check=True, timeout=300)
    assert (tmp_path / "out" / "edgecap" / "Captioner.class").is_file()


def test_swift(bundle: Path, library: Path, tmp_path: Path) -> None:
    """With the stand-in for ONNX Runtime's Objective-C classes, over its C API."""
    swiftc, include = compiler("SWIFTC", "swiftc"), headers()
    if include is None:
        pytest.skip("ONNX Runtime's headers are not here (libonnxruntime-dev, or EDGECAP_ORT_INCLUDE)")
    shutil.copy(STAND_IN / "module.modulemap", tmp_path)
    for header in include.glob("*.h"):
        shutil.copy(header, tmp_path)
    module = ["-emit-module", "-emit-library", "-static", "-module-name", "OnnxRuntimeBindings", "-parse-as-library"]
    bindings = [STAND_IN / "OnnxRuntimeBindings.swift", "-o", "libOnnxRuntimeBindings.a"]
    subprocess.run([swiftc, *module, *bindings, "-I", tmp_path], check=True, cwd=tmp_path, timeout=300)
    sources = [EXAMPLES / "swift" / "Captioner.swift", STAND_IN / "main.swift"]
    link = ["-I", tmp_path, "-L", tmp_path, "-lOnnxRuntimeBindings", "-L", library, "-Xlinker", "-rpath", "-Xlinker"]
    subprocess.run([swiftc, *sources, *link, library, "-o", "caption"], check=True, cwd=tmp_path, timeout=300)
    picture = np.random.default_rng(1).integers(0, 256, (40, 56, 3), np.uint8)
    (tmp_path / "pixels.rgb").write_bytes(picture.tobytes())
    for beam in (1, 3):
        arguments = [bundle / "fused.onnx", tmp_path / "pixels.rgb", "56", "40", str(beam)]
        runner = os.environ.get("SWIFT_RUN", "").split()  # where the compiler lives in a root of its own
        done = subprocess.run([*runner, tmp_path / "caption", *arguments], capture_output=True, text=True, check=True)
        text, logprob, ids = done.stdout.splitlines()
        wanted = FusedCaptioner.load(bundle, threads=1)(picture, beam=beam)
        assert text == wanted.text and tuple(map(int, ids.split()[1:])) == wanted.token_ids
        assert float(logprob.split()[1]) == pytest.approx(wanted.logprob, rel=1e-4)
