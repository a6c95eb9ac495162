"""The examples of docs/examples/python and node, run as they lie there."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout.splitlines() == [captioner(photos[0]).text, captioner(photos[2]).text]
    assert done.stderr == f"{photos[1]}: there is no such file\n"


def test_script_without_photos_or_bundle(tmp_path):
    for name, count in (("script.py", 1), ("watch.py", 1)):
        done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.count("\n") == count and f"python {name} BUNDLE" in done.stderr
    command = [sys.executable, EXAMPLES / "script.py", tmp_path / "none", "x.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == f"{tmp_path / 'none'}: there is no such bundle\n"


def test_node_script(bundle_path, captioner, folder):
    node, web = shutil.which("node"), Path(__file__).resolve().parents[2] / "runtime" / "web"
    if not node or not (web / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("no node, or npm ci --ignore-scripts was not run in runtime/web: the Node script is not tested")
    (folder.parent / "node_modules").mkdir()
    (folder.parent / "node_modules" / "edgecap").symlink_to(web)
    shutil.copy(EXAMPLES.parent / "node" / "caption.mjs", folder.parent)
    photos = [save(folder / "a.png", 1), folder / "none.png", save(folder / "b.png", 2)]
    command = [node, folder.parent / "caption.mjs", bundle_path, *photos]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout.splitlines() == [captioner(photos[0]).text, captioner(photos[2]).text]
    assert done.stderr.startswith(f"{photos[1]}: ENOENT") and done.stderr.count("\n") == 1
    done = subprocess.run([*command[:2], folder / "none", photos[0]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == f"{folder / 'none'}: there is no such bundle\n"


def test_watch(bundle_path, captioner, folder):
    early = save(folder / "early.png", 1)
    (folder / "broken.jpg").write_bytes(b"not a photo")
    command = [sys.executable, EXAMPLES / "watch.py", bundle_path, folder]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where the shell ignores it, so would the child
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        try:
            assert process.stdout.readline() == f"watching {folder}\n"
            first = captioner(early)
            assert process.stdout.readline() == f"early.png\t{first}\n"
            late = save(folder / "late.png", 2)
            assert process.stdout.readline() == f"late.png\t{captioner(late)}\n"
            older = save(folder.parent / "older.png", 3)
            os.utime(older, (1e9, 1e9))
            expected = captioner(older)
            older.replace(late)
            assert process.stdout.readline() == f"late.png\t{expected}\n"
            if sys.platform == "linux":
                Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(early.read_bytes())
                assert process.stdout.readline() == f"\\udcff.png\t{first}\n"
            time.sleep(1.2)  # two looks more: nothing is told twice
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (
        process.returncode == 0 and out == "" and err.count("broken.jpg") == 2 and "not an image" in err
    )  # its name, and the error's own
    texts = {path.name: path.read_text() for path in folder.glob("[el]*.txt")}
    assert texts == {"early.png.txt": f"{first}\n", "late.png.txt": f"{expected}\n"}
    done = subprocess.run([*command[:-1], folder / "gone"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "gone" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def service():
    for module in ("fastapi", "httpx2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the service needs {module}: pip install 'edgecap[test]'")
    spec = importlib.util.spec_from_file_location("service", EXAMPLES / "service.py")
    service = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(service)
    return service


def test_service(service, bundle_path, captioner, folder, monkeypatch):
    from fastapi.testclient import TestClient

    monkeypatch.setenv("EDGECAP_BUNDLE", str(bundle_path))
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


@pytest.mark.parametrize("path", ["/caption", "/stream"])
def test_a_client_that_leaves_ends_its_search(service, path):
    """Before the answer begins; the place that it held is free again."""
    ended = []

    class Slow:
        async def acaption(self, photo, **options):
            assert options["deadline_ms"]
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(photo)
                raise

        async def pieces(self, photo):
            yield await self.acaption(photo, deadline_ms=1)

        def astream(self, photo, **options):
            assert options["deadline_ms"]
            return self.pieces(photo)

    async def main() -> None:
        service.app.state.captioner, service.app.state.places = Slow(), asyncio.Semaphore(1)
        messages = [{"type": "http.request", "body": b"photo"}, {"type": "http.disconnect"}]
        sent = []

        async def receive():
            await asyncio.sleep(0.02 if len(messages) == 1 else 0)
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        await asyncio.wait_for(service.app(scope, receive, send), 10)
        await asyncio.sleep(0.02)
        assert ended == [b"photo"] and sent[0]["status"] == 499 and not service.app.state.places.locked()

    asyncio.run(main())
