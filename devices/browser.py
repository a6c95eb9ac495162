"""The server behind a bench in a browser: one origin for the page, the runtime, the bundles and the photos, and for
nobody who was not given its address.
"""

from __future__ import annotations

import gzip
import json
import mimetypes
import os
import secrets
import socket
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

from .certificate import Certificate
from .channel import Channel, Refused

PORT = 8443  # where it is free: browsers remember that a certificate was accepted by address and port
MAX_POST = 2**20  # bytes
MAX_COMPRESSED = 64 * 2**20  # bytes; larger files are sent as they are
MAX_CONNECTIONS = 64
MAX_OF_ONE = 24  # connections of one address, so that no stranger takes them all; browsers open about six
STRANGER = 10.0  # seconds that a connection has to show that it knows the address, however much it says meanwhile
SILENCE = 60.0  # seconds after which a connection that says nothing is closed
PIECE = 64 * 2**10  # bytes that are sent at once, within that time: a large file over plain HTTP may take longer

# That the page is its own process (without the first two there are no threads), and what may run in it.
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HEADERS = ISOLATED | {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:; "
    "worker-src 'self' blob:; connect-src 'self' blob:; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
TYPES |= {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".json": "application/json"}

Source = bytes | Path | Callable[[], bytes]


@dataclass
class Served:
    """One file that is served, and nothing else is. part: "runtime", "bundle" or "photo", for the page's weight."""

    source: Source
    type: str
    part: str
    _packed: bytes | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def body(self) -> bytes:
        if isinstance(self.source, bytes):
            return self.source
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source()

    def packed(self) -> bytes | None:
        """Its bytes by gzip; None for what is not worth it, or too large."""
        if self.part == "photo" or (isinstance(self.source, Path) and self.source.stat().st_size > MAX_COMPRESSED):
            return None
        with self._lock:
            if self._packed is None:
                self._packed = gzip.compress(self.body(), 6, mtime=0)
            return self._packed


class Server(ThreadingHTTPServer):
    """Serves what was added to it, under an address that only this run knows, and the page's half of a channel.

    GET next, POST hello, answer, bye: see devices/page/page.js. Everything else is 404. Use as a context manager.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(
        self, channel: Channel, *, certificate: Certificate | None, port: int = PORT, host: str = "0.0.0.0"
    ) -> None:
        """certificate: for HTTPS; None is plain HTTP. port: one that is free where this one is not. host: the address
        of this machine that others reach it by, 127.0.0.1 for nobody else; by default all of them.
        """
        self.channel = channel
        self.token = secrets.token_urlsafe(16)
        self._files: dict[str, Served] = {}
        self.sent: dict[str, int] = {}  # path → bytes of the file as it went over the wire
        self.as_is: set[str] = set()  # paths of those that went without gzip
        self._open: Counter[str] = Counter()  # connections by the address that they come from
        self._strangers: dict[socket.socket, float] = {}  # connections → when they are closed
        self._counting = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        if certificate:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate.file)
        try:
            super().__init__((host, port), _Handler)
        except OSError:
            super().__init__((host, 0), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def scheme(self) -> str:
        return "https" if self._tls else "http"

    def url(self, address: str) -> str:
        """Where the page is for a device that sees this machine at `address`."""
        return f"{self.scheme}://{address}:{self.server_address[1]}/{self.token}/"

    def add(self, path: str, source: Source, part: str = "runtime") -> None:
        """Serve a file, bytes, or what a function returns each time it is asked, at `path` below the address."""
        suffix = Path(path).suffix
        type = TYPES.get(suffix) or mimetypes.types_map.get(suffix) or "application/octet-stream"
        self._files[path] = Served(source, TYPES[".html"] if not path else type, part)

    def find(self, path: str) -> Served | None:
        return self._files.get(path)

    def weight(self, part: str, below: str = "") -> tuple[int, int]:
        """Bytes of a part's files below a path that were fetched, each once, as they went over the wire; and how many
        of these went without gzip.
        """
        fetched = [path for path in list(self.sent) if path.startswith(below) and self._files[path].part == part]
        return sum(self.sent[p] for p in fetched), sum(self.sent[p] for p in fetched if p in self.as_is)

    # --- connections: the handshake is made in the connection's own thread, so that nobody can hold up the others ---

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._counting:
            full = self._open.total() >= MAX_CONNECTIONS or self._open[client_address[0]] >= MAX_OF_ONE
            self._open[client_address[0]] += not full
        if full:
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._open[client_address[0]] -= 1
                self._open += Counter()  # forgets addresses that have none

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls is None:
            self._serve(request, client_address)
            return
        with self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as secured:
            self._serve(secured, client_address)

    def _serve(self, connection: socket.socket, client_address: Any) -> None:
        connection.settimeout(SILENCE)
        with self._counting:
            self._strangers[connection] = monotonic() + STRANGER
        try:
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            super().finish_request(connection, client_address)
        finally:
            self.knows(connection)

    def knows(self, connection: socket.socket) -> None:
        """A connection has shown that it knows the address, or is over."""
        with self._counting:
            self._strangers.pop(connection, None)

    def service_actions(self) -> None:
        """Close connections of strangers whose time is over; called every 0.1 s."""
        now = monotonic()
        with self._counting:  # so that none of them is closed, and its number another one's, meanwhile
            for connection in [each for each, end in self._strangers.items() if end < now]:
                del self._strangers[connection]
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)  # its thread sees that, and closes it

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks off, or speaks no TLS, is no news; anything else is a defect to be seen."""
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgecap", ""
    timeout = SILENCE

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name, query = self._target()
        if name == "next":
            after = max(0, _whole(query, "after"))
            self._to_channel(lambda page: self.server.channel.next(page, after), query)
        elif name is None or (found := self.server.find(name)) is None:
            self._reply(404, b"There is nothing here.")
        else:
            self._send_file(name, found)

    def do_POST(self) -> None:
        name, query = self._target()
        if name not in ("hello", "answer", "bye"):
            self.close_connection = True  # its body is not read
            self._reply(404, b"There is nothing here.")
            return
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > MAX_POST:
            self.close_connection = True
            self._reply(413 if size.isdecimal() else 411, f"Say how long it is, {MAX_POST:,} bytes at most.".encode())
            return
        body = self.rfile.read(int(size))
        channel = self.server.channel
        if name == "bye":
            self._to_channel(channel.leave, query)
        elif name == "hello":
            self._to_channel(lambda page: channel.join(page, _parsed(body)), query)
        else:
            self._to_channel(lambda page: channel.answer(page, _whole(query, "id"), _parsed(body)), query)

    def _target(self) -> tuple[str | None, dict[str, str]]:
        """What is asked for below the address, and the query; None for who does not know the address."""
        parts = urlsplit(self.path)
        token, slash, name = parts.path.removeprefix("/").partition("/")
        if not slash or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self.close_connection = True
            return None, {}
        self.server.knows(self.connection)
        return name, {key: values[0] for key, values in parse_qs(parts.query).items()}

    def _to_channel(self, call: Callable[[str], dict[str, Any] | None], query: dict[str, str]) -> None:
        page = query.get("page", "")
        try:
            if not 8 <= len(page) <= 64:
                raise Refused("A page says which one it is.")
            said = call(page)
        except Refused as refused:
            self._reply(409, str(refused).encode())
            return
        if said is None:
            self._reply(204, b"")
        else:
            self._reply(200, json.dumps(said).encode(), TYPES[".json"])

    def _send_file(self, name: str, found: Served) -> None:
        try:
            packed = found.packed() if "gzip" in self.headers.get("Accept-Encoding", "") else None
            body: BinaryIO
            if packed is None and isinstance(found.source, Path):
                body = found.source.open("rb")
            else:
                body = BytesIO(found.body() if packed is None else packed)
        except Exception as error:  # a photo or a file of a bundle that cannot be read any more
            self._reply(500, " ".join(f"{error}".split()).encode())
            return
        more = {"Cache-Control": "private, max-age=3600"} | ({"Content-Encoding": "gzip"} if packed else {})
        with body:
            self.server.sent[name] = size = body.seek(0, os.SEEK_END)
            if packed is None:
                self.server.as_is.add(name)
            body.seek(0)
            self._head(200, size, found.type, more)
            while piece := body.read(PIECE):
                self.wfile.write(piece)
                size -= len(piece)
        self.close_connection = self.close_connection or size != 0  # it changed meanwhile

    def _reply(self, status: int, body: bytes, type: str = "text/plain; charset=utf-8") -> None:
        self._head(status, len(body), type, {})
        self.wfile.write(body)

    def _head(self, status: int, size: int, type: str, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (HEADERS | {"Cache-Control": "no-store"} | more).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Type", type)
            self.send_header("Content-Length", str(size))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def _whole(query: dict[str, str], name: str) -> int:
    """A number of the query; -1 for what is none."""
    text = query.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1


def _parsed(body: bytes) -> Any:
    """JSON of a page, or None for what is none: whoever asked for it says so."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=lambda text: None)
    except (ValueError, RecursionError):
        return None
