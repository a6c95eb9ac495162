"""Text to ids and back: a thin wrapper over the `tokenizers` library (tokenizer.json)."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import BundleError

MAX_BYTES = 64 * 2**20
_muting = threading.RLock()  # standard error is one for all threads: two that hold it back would leave it in a pipe
if hasattr(os, "register_at_fork"):  # nor may a child be born with it held back
    os.register_at_fork(before=_muting.acquire, after_in_parent=_muting.release, after_in_child=_muting.release)

# Words as captions are learnt: "don't" is "do n't", "dog's" is "dog 's"; "t-shirt" and "2.5" stay whole.
_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\bcan(?=not\b)|\w+(?:[-.,/]\w+)*|[#&]")

_APPENDING = {"ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "ByteFallback", "Fuse", "Strip", "Replace"}
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token that is one byte, of which several make a character


def plain_words(text: str) -> str:
    """Text in the form captions are learnt in: lower case, single spaces, no punctuation."""
    return " ".join(_WORD.findall(text.lower().replace("’", "'")))


class Tokenizer:
    """A tokenizer.json. BOS, EOS and the rest are never added here: they belong to session and decoder."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner  # tokenizers.Tokenizer, for training and export

    @classmethod
    def load(cls, source: str | Path | bytes) -> Tokenizer:
        """Read a tokenizer.json (a path, or its bytes). Raises BundleError if it is not one, or too large."""
        from tokenizers import Tokenizer as Inner

        name = "tokenizer.json" if isinstance(source, bytes) else str(source)
        try:
            data = source if isinstance(source, bytes) else _read(Path(source))
            if len(data) > MAX_BYTES:
                raise BundleError(f"{name} is larger than {MAX_BYTES:,} bytes")
            text = data.decode("utf-8")
        except OSError as error:
            raise BundleError(f"cannot read {name}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise BundleError(f"{name} is not a tokenizer of the tokenizers library: not UTF-8") from None
        with _panics(name), _muting, _muted():
            inner = Inner.from_str(text)
            # What the file says of these would cut a prompt or fill it up, to any length that it likes.
            inner.no_truncation()
            inner.no_padding()
            # A file whose parts do not fit each other is found out by use; better now than at a user's first photo.
            inner.encode("a photo", add_special_tokens=False)
            inner.decode(list(range(min(inner.get_vocab_size(), 256))), skip_special_tokens=True)
        return cls(inner)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS or EOS."""
        with _panics("tokenizer.json"):
            return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are skipped."""
        with _panics("tokenizer.json"):
            return self.inner.decode(list(ids), skip_special_tokens=True).strip()

    def settled(self, ids: Sequence[int]) -> str:
        """As much of the text of `ids` as stays the same whatever follows, where `appends`: no half characters."""
        end = len(ids)
        while end and _BYTE.fullmatch(self.inner.id_to_token(ids[end - 1]) or ""):
            end -= 1
        return self.decode(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}").rstrip()

    @cached_property
    def appends(self) -> bool:
        """Whether a further token only adds to the text: not so where its decoder drops or joins tokens (CTC)."""
        decoder = self.inner.decoder
        if decoder is None:
            return True
        parts = json.loads(decoder.__getstate__())
        names = {part["type"] for part in parts.get("decoders", [parts])}
        return names <= _APPENDING


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


@contextmanager
def _panics(name: str) -> Iterator[None]:
    """What `tokenizers` raises, told in one line: plain Exceptions, and its Rust's panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{name} is not a tokenizer of the tokenizers library: {str(error)[:300]}") from None


@contextmanager
def _muted() -> Iterator[None]:
    """Hold back what is written to standard error itself, and let it out unless a panic ended it: Rust prints its
    panics there before Python hears of them.
    """
    try:
        kept, (read, write) = os.dup(2), os.pipe()
    except OSError:  # no standard error
        yield
        return
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    os.dup2(write, 2)
    held = True
    try:
        yield
        held = False
    finally:
        os.dup2(kept, 2)
        with suppress(OSError):
            if not held:
                os.write(2, os.read(read, 65536))
        for each in (kept, read, write):
            os.close(each)
