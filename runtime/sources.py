"""Where photos come from: files, folders, the web, streams of paths; a bad one never stops the rest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .captioner import BATCH, Caption, Captioner
from .errors import EdgecapError

if TYPE_CHECKING:
    from .decode import CancelToken
    from .preprocess import Preprocess
    from .session import Pixels
    from .view import View

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
}
SUFFIXES |= {
    ".avif",
    ".jp2",
    ".heic",
    ".heif",
}  # named as unreadable, rather than passed over, where Pillow has no codec
MAX_URL_BYTES = 32 * 2**20
URL_TIMEOUT = 15.0  # seconds without a byte
URL_DEADLINE = 60.0  # seconds in all


@dataclass(frozen=True)
class Source:
    """A photo to come. alone: caption it at once, because the next one may be long in coming."""

    location: str
    alone: bool = False
    problem: str | None = None  # already known to be unreadable

    @property
    def name(self) -> str:
        """The location as text that can be printed: file names need not be valid Unicode."""
        return os.fsencode(self.location).decode("utf-8", "replace")

    def load(self, view: Preprocess | View) -> Pixels:
        """Pixels uint8 [H, W, 3]. Raises EdgecapError naming the photo."""
        if self.problem:
            raise EdgecapError(f"{self.name}: {self.problem}")
        photo = fetch(self.location) if is_url(self.location) else self.location
        return view.load(photo, name=self.name)


def is_url(location: str) -> bool:
    return "://" in location


def find_photos(locations: Iterable[str], stream: Iterable[bytes] = ()) -> Iterator[Source]:
    """Photos of files, folders (recursive, sorted, by suffix), URLs, and for "-" of the lines of `stream`.

    What cannot be found still comes as a source: loading it says why.
    """
    for location in locations:
        if location == "-":
            for line in stream:
                path = os.fsdecode(line.rstrip(b"\r\n"))
                if path:
                    yield Source(path, alone=True)
        elif not is_url(location) and os.path.isdir(location):
            yield from _in_folder(location)
        else:
            yield Source(location)


def _in_folder(folder: str) -> Iterator[Source]:
    found = False
    unreadable: list[OSError] = []
    for root, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                found = True
                yield Source(os.path.join(root, name))
    for error in unreadable:
        yield Source(os.fsdecode(error.filename), problem=f"the folder cannot be read ({error.strerror})")
    if not found and not unreadable:
        yield Source(folder, problem="there are no images in this folder")


def fetch(url: str) -> bytes:
    """The body at an http(s) URL. Raises EdgecapError for other schemes, failures, too many bytes."""
    scheme = url.split("://", 1)[0].lower()
    if scheme not in ("http", "https"):
        raise EdgecapError(f"{url}: only http and https addresses are read, not {scheme}")
    import http.client
    from urllib import error, request

    # Not build_opener: its redirects would follow ftp too, and it reads file: addresses.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    deadline = time.monotonic() + URL_DEADLINE
    parts, size = [], 0
    try:
        asked = request.Request(url, headers={"User-Agent": "edgecap", "Accept": "image/*"})
        with opener.open(asked, timeout=URL_TIMEOUT) as answer:
            while chunk := answer.read1(2**16):
                parts.append(chunk)
                size += len(chunk)
                if size > MAX_URL_BYTES:
                    raise EdgecapError(f"{url}: more than the limit of {MAX_URL_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise EdgecapError(f"{url}: not there after {URL_DEADLINE:.0f} s")
    except error.HTTPError as problem:
        raise EdgecapError(f"{url}: the server answered {problem.code} {problem.reason}") from None
    except TimeoutError:
        raise EdgecapError(f"{url}: no answer within {URL_TIMEOUT:.0f} s") from None
    except (OSError, http.client.HTTPException, ValueError) as problem:
        raise EdgecapError(f"{url}: cannot be fetched ({getattr(problem, 'reason', None) or problem})") from None
    return b"".join(parts)


def caption_sources(
    captioner: Captioner,
    sources: Iterable[Source],
    *,
    batch: int = BATCH,
    cancel: CancelToken | None = None,
    **options: Any,
) -> Iterator[tuple[Source, Caption | EdgecapError]]:
    """Each source, in order, with its caption or what is wrong with it. Options as in a `Captioner` call.

    Photos are captioned up to `batch` at a time, a source that is `alone` as soon as it comes. cancel: once it is set,
    the batch at hand ends with what it has, and no further source is asked for.
    """
    # A bad option is the caller's error, not each photo's.
    budget = {name: options.get(name) for name in ("image_size", "tiles")}
    captioner.settings(**{name: value for name, value in options.items() if name not in budget})
    view = captioner.view(**budget)
    options = {**options, "cancel": cancel}
    waiting: list[tuple[Source, Pixels | EdgecapError]] = []
    began = time.monotonic()
    for source in sources:
        if not waiting:
            began = time.monotonic()
        try:
            waiting.append((source, source.load(view)))
        except EdgecapError as error:
            waiting.append((source, error))
        if source.alone or len(waiting) == batch:
            yield from _finish(captioner, waiting, options, began)
            waiting = []
        if cancel is not None and cancel.is_set():
            break
    yield from _finish(captioner, waiting, options, began)


def _finish(
    captioner: Captioner, waiting: list[tuple[Source, Pixels | EdgecapError]], options: dict[str, Any], began: float
) -> Iterator[tuple[Source, Caption | EdgecapError]]:
    good = [pixels for _, pixels in waiting if not isinstance(pixels, EdgecapError)]
    captions = iter(captioner.caption_arrays(good, began=began, **options) if good else [])
    for source, result in waiting:
        yield source, result if isinstance(result, EdgecapError) else next(captions)
