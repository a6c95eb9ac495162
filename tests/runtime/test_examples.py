"""The examples of docs/examples/python, run as they lie there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .graphs import SIZE, photo

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "python"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def save(path: Path, seed: int) -> Path:
    photo(seed, (SIZE, 2 * SIZE)).save(path)
    return path


def test_script(bundle_path, captioner, folder):
    photos = [save(folder / "a.png", 1), folder / "none.jpg", save(folder / "b.png", 2)]
    command = [sys.executable, EXAMPLES / "script.py", bundle_path, *photos]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [captioner(photos[0]).text, captioner(photos[2]).text]
    assert done.stderr == f"{photos[1]}: there is no such file\n"


def test_watch(bundle_path, captioner, folder):
    early = save(folder / "early.png", 1)
    (folder / "broken.jpg").write_bytes(b"not a photo")
    command = [sys.executable, EXAMPLES / "watch.py", bundle_path, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"watching {folder}\n"
            assert process.stdout.readline() == f"early.png\t{captioner(early)}\n"
            late = save(folder / "late.png", 2)
            assert process.stdout.readline() == f"late.png\t{captioner(late)}\n"
            time.sleep(1.2)  # two looks more: nothing is told twice
        finally:
            process.terminate()
            out, err = process.communicate(timeout=30)
    assert out == "" and err.count("broken.jpg") == 2 and "not an image" in err  # its name, and the error's own
    texts = {path.name: path.read_text() for path in folder.glob("*.txt")}
    assert texts == {"early.png.txt": f"{captioner(early)}\n", "late.png.txt": f"{captioner(late)}\n"}


def test_service(bundle_path, captioner, folder, monkeypatch):
    for module in ("fastapi", "httpx2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the service needs {module}: pip install 'edgecap[test]'")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("EDGECAP_BUNDLE", str(bundle_path))
    spec = importlib.util.spec_from_file_location("service", EXAMPLES / "service.py")
    service = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(service)
    data = save(folder / "a.png", 1).read_bytes()
    with TestClient(service.app) as client:
        assert client.post("/caption", content=data).json() == captioner(data).to_dict()
        answer = client.post("/caption?beam=3", content=data).json()
        assert answer == captioner(data, beam=3).to_dict() and len(answer["alternatives"]) == 2
        with client.stream("POST", "/stream", content=data) as said:
            assert "".join(said.iter_text()) == captioner(data).text
        for path, content, detail in (
            ("/caption", data[:50], "the image"),
            ("/stream", b"", "the image: the file is empty"),
            ("/caption?beam=99", data, "beam must be"),
        ):
            refused = client.post(path, content=content)
            assert refused.status_code == 422 and refused.json()["detail"].startswith(detail)
        assert client.post("/caption", content=bytes(service.MAX_BYTES + 1)).status_code == 413
