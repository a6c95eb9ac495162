"""What importing and using the runtime pulls in: a phone waits for every module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .graphs import photo

HEAVY = {"torch", "transformers", "click", "rich", "urllib.request", "http.client", "onnx", "scipy", "PIL.ImageOps"}


def loaded(code: str, *arguments: str) -> set[str]:
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_room_imports_no_engine():
    modules = loaded("import edgecap.runtime")
    assert not modules & (HEAVY | {"numpy", "PIL", "onnxruntime", "tokenizers"})


def test_importing_all_of_it():
    names = "captioner, bundle, decode, preprocess, tokenizer, sources, verify, describe, backends"
    modules = loaded(f"from edgecap.runtime import {names}, frames, positions, prompt")
    assert "numpy" in modules and not modules & HEAVY


def test_captioning_a_photo(bundle_path, tmp_path):
    photo(0).save(tmp_path / "x.png")
    code = "import sys; from edgecap.runtime import Captioner; Captioner.load(sys.argv[1])(sys.argv[2])"
    modules = loaded(code, str(bundle_path), str(tmp_path / "x.png"))
    assert "onnxruntime" in modules and not modules & HEAVY


@pytest.mark.parametrize("room", ["runtime", "export", "benchmarks.worker"])
def test_every_room_switches_telemetry_off(room):
    code = f"import os, edgecap.{room}; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for env, said in ((kept, "1"), (kept | {"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said


def test_the_engine_reports_to_nobody(bundle_path, tmp_path):
    """ONNX Runtime 1.29+ keeps a device id and a queue of events at home, unless told not to before its import."""
    photo(0).save(tmp_path / "x.png")
    places = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "LOCALAPPDATA")}
    for place in places.values():
        Path(place).mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    code = "import sys; from edgecap import Captioner; Captioner.load(sys.argv[1])(sys.argv[2])"
    arguments = [str(bundle_path), str(tmp_path / "x.png")]
    subprocess.run([sys.executable, "-B", "-c", code, *arguments], check=True, env=kept | places)
    assert [path for place in places.values() for path in Path(place).rglob("*")] == []


@pytest.mark.parametrize("name", ["Captioner", "Bundle", "DecodeOptions", "Session", "load_image"])
def test_public_names(name):
    import edgecap.runtime as runtime

    assert name in runtime.__all__ and getattr(runtime, name).__name__ == name


def test_every_public_name_is_there():
    import edgecap.runtime as runtime

    for name in runtime.__all__:
        getattr(runtime, name)
    with pytest.raises(AttributeError):
        getattr(runtime, "nothing")  # noqa: B009
