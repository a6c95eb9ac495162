"""Files, folders, web addresses and streams: every photo comes, in order, or is named."""

from __future__ import annotations

import http.server
import io
import os
import threading
from collections.abc import Iterator

import pytest

from edgecap.runtime import Caption, EdgecapError, Preprocess
from edgecap.runtime import sources as module
from edgecap.runtime.sources import Source, caption_sources, fetch, find_photos

from .graphs import photo


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    photo(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def album(tmp_path):
    for i, name in enumerate(
        ["b.png", "a.JPG", "sub/deep/c.webp", "sub/d.png", ".hidden.png", "notes.txt", ".git/e.png"]
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("notes")
        else:
            photo(i).save(path)
    return tmp_path


def test_folder_is_recursive_and_sorted(album):
    found = [os.path.relpath(source.location, album) for source in find_photos([str(album)])]
    assert found == ["a.JPG", "b.png", "sub/d.png", "sub/deep/c.webp"]


def test_folder_without_images(tmp_path):
    (source,) = find_photos([str(tmp_path)])
    with pytest.raises(EdgecapError, match="no images in this folder"):
        source.load(Preprocess((8, 8)))


def test_a_stream_is_read_line_by_line(album):
    read = 0

    def lines() -> Iterator[bytes]:
        nonlocal read
        for name in (b"a.JPG\n", b"\n", b"b.png\r\n", b"odd\xff.png"):
            read += 1
            yield name

    sources = find_photos(["-"], lines())
    assert next(sources) == Source("a.JPG", alone=True) and read == 1
    assert [source.name for source in sources] == ["b.png", "odd\ufffd.png"]


def test_streamed_photos_are_captioned_as_they_come(album, captioner):
    given: list[str] = []

    def lines() -> Iterator[bytes]:
        for name in ("a.JPG", "b.png"):
            given.append(name)
            yield os.fsencode(album / name)

    results = caption_sources(captioner, find_photos(["-"], lines()))
    next(results)
    assert given == ["a.JPG"]


def test_one_bad_photo_does_not_stop_the_rest(album, captioner):
    (album / "aa.png").write_bytes(png()[:40])
    results = list(caption_sources(captioner, find_photos([str(album), "missing.jpg", "ftp://x/y.jpg"]), beam=2))
    assert [isinstance(result, Caption) for _, result in results] == [True, False, True, True, True, False, False]
    assert [os.path.basename(source.name) for source, _ in results][:3] == ["a.JPG", "aa.png", "b.png"]
    for source, result in results:
        if isinstance(result, Caption):
            alone = captioner(source.location, beam=2)
            assert result.token_ids == alone.token_ids and len(result.alternatives) == 1
        else:
            assert source.name in result.message


def test_a_bad_option_is_not_each_photos_error(album, captioner):
    with pytest.raises(EdgecapError, match="beam"):
        list(caption_sources(captioner, find_photos([str(album)]), beam=0))


def test_cancelling_ends_with_the_batch_at_hand(album, captioner):
    cancel, asked = threading.Event(), []

    def sources() -> Iterator[Source]:
        for number, source in enumerate(find_photos([str(album)])):
            if number == 3:
                cancel.set()
            asked.append(source)
            yield source

    results = list(caption_sources(captioner, sources(), batch=3, cancel=cancel, min_length=6))
    assert [source for source, _ in results] == asked and len(asked) == 4
    assert [result.cut for _, result in results] == [False, False, False, True]
    results = list(caption_sources(captioner, find_photos([str(album)]), batch=2, cancel=cancel))
    assert len(results) == 1 and results[0][1].cut


# --- the web ----------------------------------------------------------------------------------------


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/photo.png":
            self.answer(200, png(4))
        elif self.path == "/moved":
            self.answer(302, b"", Location="/photo.png")
        elif self.path == "/to-file":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif self.path == "/to-ftp":
            self.answer(302, b"", Location="ftp://127.0.0.1/x")
        elif self.path == "/round":
            self.answer(302, b"", Location="/round")
        elif self.path == "/big":
            self.answer(200, bytes(300_000))
        elif self.path == "/short":
            self.answer(200, b"abc", **{"Content-Length": "1000"})
        elif self.path == "/slow":
            self.server.wait.wait(5)
        elif self.path == "/page":
            self.answer(200, b"<html>no photo</html>")
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.wait = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.wait.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_web(site, captioner):
    results = list(caption_sources(captioner, find_photos([f"{site}/photo.png", f"{site}/moved"])))
    expected = captioner(png(4))
    assert [result.token_ids for _, result in results] == [expected.token_ids] * 2


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("/nothing", "404"),
        ("/to-file", "not allowed|unknown"),
        ("/to-ftp", "unknown url type"),
        ("/round", "302"),
        ("/short", "IncompleteRead|cannot be fetched|not an image"),
        ("/page", "not an image"),
    ],
)
def test_web_refusals(site, page, says):
    with pytest.raises(EdgecapError, match=says) as caught:
        Source(site + page).load(Preprocess((8, 8)))
    assert f"{site}{page}: " in caught.value.message


def test_web_limits(site, monkeypatch):
    monkeypatch.setattr(module, "MAX_URL_BYTES", 100_000)
    with pytest.raises(EdgecapError, match="more than the limit of 100,000 bytes"):
        fetch(f"{site}/big")
    monkeypatch.setattr(module, "URL_TIMEOUT", 0.2)
    with pytest.raises(EdgecapError, match="no answer within|timed out"):
        fetch(f"{site}/slow")
    monkeypatch.setattr(module, "URL_DEADLINE", -1.0)
    with pytest.raises(EdgecapError, match="not there after"):
        fetch(f"{site}/photo.png")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://x/y",
        "gopher://x",
        "://",
        "http://",
        "http://[bad",
        "http://127.0.0.1:1/x",
        "http://a b/",
    ],
)
def test_bad_addresses(url):
    with pytest.raises(EdgecapError) as caught:
        fetch(url)
    assert caught.value.message.startswith(url)
