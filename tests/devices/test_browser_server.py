"""The server behind a bench in a browser, without one: who is refused, what is believed, and that nothing hangs."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edgecap.devices import browser
from edgecap.devices.browser import MAX_POST, Server
from edgecap.devices.certificate import certificate
from edgecap.devices.channel import Channel, Lost, Refused
from edgecap.devices.headless import Headless
from edgecap.devices.lan import lan_addresses, qr_code
from edgecap.devices.webfiles import ort_files, page_files
from edgecap.runtime.errors import EdgecapError, UsageError

PAGE = "page=0123456789abcdef"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody may read this")
    made = Server(Channel(poll=0.2), certificate=None, port=0)
    made.add("", b"<!doctype html>")
    made.add("a.js", b"let a = 1;" * 100)
    made.add("photos/0.png", lambda: b"png", "photo")
    made.add("broken.png", lambda: 1 // 0, "photo")
    made.start()
    yield made
    made.close()


def ask(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict]:
    parts = urlsplit(server.url("127.0.0.1"))
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=10)
    try:
        target = path if path.startswith("/") else parts.path + path
        connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.read(), dict(reply.getheaders())
    finally:
        connection.close()


def test_files_come_with_the_headers_that_threads_need(server: Server) -> None:
    status, body, headers = ask(server, "GET", "")
    assert status == 200 and body == b"<!doctype html>" and headers["Content-Type"].startswith("text/html")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert headers["X-Content-Type-Options"] == "nosniff" and "unsafe-inline" not in headers["Content-Security-Policy"]
    status, body, headers = ask(server, "GET", "a.js", Accept_Encoding="gzip, br")
    assert headers["Content-Encoding"] == "gzip" and len(body) < 100
    assert server.weight("runtime") == (len(b"<!doctype html>") + len(body), len(b"<!doctype html>"))
    assert ask(server, "GET", "photos/0.png", Accept_Encoding="gzip")[1] == b"png"
    assert ask(server, "GET", "broken.png")[0] == 500


def test_a_large_file_comes_in_pieces_and_takes_its_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that goes on is not cut, however long it takes in all."""
    monkeypatch.setattr(browser._Handler, "timeout", 1.0)
    data = os.urandom(2**20) * 24
    (tmp_path / "large.bin").write_bytes(data)
    server.add("large.bin", tmp_path / "large.bin", "bundle")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        slow.connect(("127.0.0.1", server.server_address[1]))
        slow.sendall(f"GET /{server.token}/large.bin HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        got, began = b"", time.monotonic()
        while time.monotonic() < began + 2:
            got += slow.recv(2**16)
            time.sleep(0.02)
        begin = got.index(b"\r\n\r\n") + 4
        while len(got) < begin + len(data):
            more = slow.recv(2**20)
            assert more, "it was cut"
            got += more
        assert got[begin:] == data
    assert server.weight("bundle") == (len(data), len(data))


def test_what_is_too_large_for_gzip_is_counted_as_it_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "MAX_COMPRESSED", 1000)
    sizes = {}
    for name in ("0/small", "0/large", "1/large"):
        (tmp_path / name[2:]).write_bytes(b"x" * (1000 if name == "0/small" else 1001))
        server.add(name, tmp_path / name[2:], "bundle")
        sizes[name] = len(ask(server, "GET", name, Accept_Encoding="gzip")[1])
    assert sizes["0/small"] < 100 and sizes["0/large"] == sizes["1/large"] == 1001
    assert server.weight("bundle", "0/") == (sizes["0/small"] + 1001, 1001)
    assert server.weight("bundle", "1/") == (1001, 1001) and server.weight("photo") == (0, 0)


def test_who_opens_the_page_here_is_alone() -> None:
    server = Server(Channel(), certificate=None, port=0, host="127.0.0.1")
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()


def test_who_does_not_know_the_address_gets_nothing(server: Server) -> None:
    other = "A" * len(server.token)
    for path in ("/", "/a.js", f"/{other}/", f"/{other}/a.js", f"/{server.token}", f"/{server.token[:-1]}/a.js"):
        assert ask(server, "GET", path)[0] == 404, path
    for path in (f"/{other}/hello?{PAGE}", f"/hello?{PAGE}"):
        assert ask(server, "POST", path, b"{}")[0] == 404, path
    with pytest.raises(Lost):
        server.channel.wait(0)


@pytest.mark.parametrize("path", ["../secret.txt", "%2e%2e/secret.txt", "photos/../a.js", "a.js/", "/etc/passwd", "a"])
def test_paths_lead_nowhere_else(server: Server, path: str) -> None:
    assert ask(server, "GET", f"/{server.token}/{path}")[0] == 404


def test_what_is_posted_is_bounded(server: Server) -> None:
    assert ask(server, "POST", f"hello?{PAGE}", None, Content_Length=str(MAX_POST + 1))[0] == 413
    assert ask(server, "POST", f"hello?{PAGE}", None, Content_Length="-5")[0] == 411
    assert ask(server, "POST", f"hello?{PAGE}", None, Transfer_Encoding="chunked")[0] == 411
    assert ask(server, "POST", "elsewhere", b"{}")[0] == 404
    assert ask(server, "POST", "hello?page=short", b"{}")[0] == 409
    assert ask(server, "DELETE", "a.js")[0] == 501


def test_a_command_goes_out_and_its_answer_comes_back(server: Server) -> None:
    channel = server.channel
    assert ask(server, "GET", f"next?{PAGE}")[0] == 409, "nobody has joined"
    assert ask(server, "POST", f"hello?{PAGE}", b'{"cores": 8}')[0] == 204
    assert channel.wait(0) == {"cores": 8}
    assert ask(server, "GET", f"next?{PAGE}")[0] == 204, "nothing to do yet"
    id = channel.send({"op": "load"}, channel.visit)
    status, body, _ = ask(server, "GET", f"next?{PAGE}")
    assert status == 200 and json.loads(body) == {"op": "load", "id": id}
    assert ask(server, "GET", f"next?{PAGE}&after=x")[1] == body, "it comes again until it is known to have arrived"
    second = channel.send({"op": "close"}, channel.visit)
    assert json.loads(ask(server, "GET", f"next?{PAGE}&after={id}")[1])["id"] == second
    assert ask(server, "GET", f"next?{PAGE}&after={second}")[0] == 204
    assert ask(server, "POST", f"answer?{PAGE}&id=77", b"{}")[0] == 409
    assert ask(server, "POST", f"answer?{PAGE}&id=-1", b"{}")[0] == 409
    assert ask(server, "POST", f"answer?{PAGE}&id={id}", b'{"ok": true, "x": NaN}')[0] == 204
    assert channel.take(id, channel.visit, 5) == {"ok": True, "x": None}
    assert ask(server, "POST", f"answer?{PAGE}&id={id}", b"{}")[0] == 409, "answered already"
    another = "page=fedcba9876543210"
    status, body, _ = ask(server, "POST", f"hello?{another}", b"{}")
    assert status == 409 and b"Another device" in body
    for body in (b"{", b"\xff\xfe", b"[" * 10**5, b"1" * 10**4):  # nothing is raised in the server
        id = channel.send({"op": "load"}, channel.visit)
        assert ask(server, "POST", f"answer?{PAGE}&id={id}", body)[0] == 204
        assert channel.take(id, channel.visit, 5) is None


def test_a_page_that_leaves_or_falls_silent_is_lost() -> None:
    channel = Channel(gone_after=0.05, poll=0.01)
    with pytest.raises(Lost, match="no device opened the page within 0 s"):
        channel.wait(0)
    channel.join("a", {})
    first = channel.visit
    id = channel.send({"op": "load"}, first)
    with pytest.raises(TimeoutError):
        channel.take(id, first, 0)
    channel.join("a", {})
    with pytest.raises(Lost, match="loaded anew"):
        channel.take(id, first, 5)
    id = channel.send({"op": "load"}, channel.visit)
    with pytest.raises(Lost, match="not heard of for 0.05 s"):
        channel.take(id, channel.visit, 5)
    channel.join("a", {})
    channel.leave("a")
    with pytest.raises(Lost, match="its page was closed"):
        channel.send({"op": "load"}, channel.visit)
    with pytest.raises(Refused):
        channel.join("b", {})
    channel.join("a", {})
    channel.end({"text": "Done."}, wait=0)
    assert channel.next("a") == {"op": "end", "text": "Done."}
    with pytest.raises(Refused, match="has ended"):
        channel.join("a", {})


def test_https_by_a_certificate_of_our_own(tmp_path: Path) -> None:
    x509 = pytest.importorskip("cryptography.x509")
    (tmp_path / "kept").mkdir()
    for earlier in ("certificate.pem", "key.pem"):
        (tmp_path / "kept" / earlier).write_text("of an earlier version")
    made = certificate(tmp_path / "kept", ["127.0.0.1", "localhost", "192.0.2.7"])
    assert list((tmp_path / "kept").iterdir()) == [made.file]
    assert certificate(tmp_path / "kept", ["192.0.2.7"]) == made, "accepted once, it need not be again"
    if sys.platform != "win32":
        assert stat.S_IMODE(made.file.stat().st_mode) == 0o600
    names = x509.load_pem_x509_certificate(made.file.read_bytes()).extensions
    names = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    server = Server(Channel(), certificate=made, port=0)
    server.add("", b"secret")
    server.start()
    try:
        port = server.server_address[1]
        silent = socket.create_connection(("127.0.0.1", port))  # never says a word: nobody else waits for it
        plain = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.request("GET", f"/{server.token}/")
            plain.getresponse()
        trusted = ssl.create_default_context(cafile=str(made.file))  # checks the address, too
        secure = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=trusted)
        secure.request("GET", f"/{server.token}/")
        assert secure.getresponse().read() == b"secret"
        secure.close()
        silent.close()
    finally:
        server.close()
    renewed = certificate(tmp_path / "kept", ["198.51.100.1"])
    assert renewed.spki != made.spki and made.file.exists(), "who serves the earlier one goes on"
    assert certificate(tmp_path / "kept", ["192.0.2.7", "localhost"]) == renewed, "back in the first network"
    assert certificate(tmp_path / "kept", ["203.0.113.1"]).spki != renewed.spki
    assert not list((tmp_path / "kept").glob("*.partial"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgecapError, match="set EDGECAP_CACHE"):
        certificate(tmp_path / "file" / "below", ["127.0.0.1"])


def test_who_does_not_know_the_address_is_let_go_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "STRANGER", 0.3)
    server = Server(Channel(), certificate=None, port=0)
    server.add("", b"there")
    server.start()
    try:
        with socket.create_connection(server.server_address, timeout=10) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection(server.server_address, timeout=10) as talking:  # before, it was kept
            began = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() < began + 10:
                    talking.sendall(b"G")
                    time.sleep(0.05)
        stranger = http.client.HTTPConnection(*server.server_address, timeout=10)
        stranger.request("GET", "/guessed/")
        answer = stranger.getresponse()
        assert answer.status == 404 and answer.getheader("Connection") == "close"
        known = http.client.HTTPConnection(*server.server_address, timeout=10)
        for _ in range(2):
            known.request("GET", f"/{server.token}/")
            assert known.getresponse().read() == b"there"
            time.sleep(0.6)
        known.close()
    finally:
        server.close()


@pytest.mark.parametrize("bound", ["MAX_CONNECTIONS", "MAX_OF_ONE"])
def test_connections_beyond_a_number_are_closed(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, bound, 2)
    server = Server(Channel(), certificate=None, port=0)
    server.add("", b"there")
    server.start()
    try:
        held = [socket.create_connection(server.server_address) for _ in range(2)]
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                ask(server, "GET", "")
            except (OSError, http.client.HTTPException):
                break
        else:
            pytest.fail("a third one was served")
        for each in held:
            each.close()
        while time.monotonic() < deadline:
            try:
                assert ask(server, "GET", "")[1] == b"there"
                break
            except (OSError, http.client.HTTPException):
                continue
    finally:
        server.close()


def test_a_port_that_is_taken_is_another_port() -> None:
    first = Server(Channel(), certificate=None, port=0)
    second = Server(Channel(), certificate=None, port=first.server_address[1])
    assert second.server_address[1] != first.server_address[1]
    first.close()
    second.close()
    assert threading.active_count() < 50


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs a Unix shell")
def test_a_browser_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid; exec sleep 60\n")
    program.chmod(0o755)
    start = f"from edgecap.devices.headless import Headless; h = Headless({str(program)!r}, 'about:blank')"
    code = (
        f"{start}; import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.02)\nos._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=30)
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    with pytest.raises(UsageError, match="no program"):
        Headless("nosuchbrowser", "about:blank")
    (tmp_path / "failing").write_text("#!/bin/sh\necho cannot start; exit 3\n")
    (tmp_path / "failing").chmod(0o755)
    failing = Headless(str(tmp_path / "failing"), "about:blank")
    while failing.ended is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert failing.ended == 3 and failing.said == "cannot start"
    failing.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_addresses_and_the_code_to_point_a_camera_at() -> None:
    assert all(not address.startswith("127.") for address in lan_addresses())
    pytest.importorskip("segno")
    lines = (qr_code("https://192.168.100.100:65535/" + "x" * 22 + "/") or "").splitlines()
    assert 10 < len(lines) <= 22 and max(map(len, lines)) <= 45, "fits a terminal of 80 × 24"


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    files = dict(page_files())
    assert set(files) == {"", "page.js", "style.css", "worker.js"}
    for file in files.values():
        assert "http://" not in (text := file.read_text(encoding="utf-8")) and "https://" not in text, file


def test_what_to_do_without_onnxruntime_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_ORT_WEB", str(tmp_path))
    with pytest.raises(UsageError, match="npm install --prefix DIR onnxruntime-web, then EDGECAP_ORT_WEB="):
        list(ort_files(webgpu=False))
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        (tmp_path / "dist").mkdir(exist_ok=True)
        (tmp_path / "dist" / name).touch()
    assert [path for path, _ in ort_files(webgpu=False)][0] == "ort/ort.wasm.min.mjs"
    with pytest.raises(UsageError, match="lacks ort.webgpu.min.mjs"):
        list(ort_files(webgpu=True))
