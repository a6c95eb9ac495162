"""Captions as they are said: text in pieces, for loops and for asyncio, and calls that do not block an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from .errors import UsageError

if TYPE_CHECKING:
    from .captioner import Caption
    from .decode import CancelToken, Hypothesis, Steps
    from .tokenizer import Tokenizer

T = TypeVar("T")


class Stream(Iterator[str]):
    """Pieces of one caption's text, which joined are the caption's `text`; afterwards `caption` is that caption.

    Every piece is said before the next step is made, in the thread that asks for it. Who stops asking has ended the
    search. Threads that ask at once wait for each other. ended: what the search asks before each step.
    """

    def __init__(self, pieces: Generator[str, None, Caption], ended: Either) -> None:
        self.ended = ended
        self._pieces = pieces
        self._caption: Caption | None = None
        self._without: str | None = None  # why there will be no caption
        self._closed = False
        self._lock = threading.RLock()  # a signal's handler may close the stream whose step it interrupts

    def __next__(self) -> str:
        with self._lock:
            try:
                piece = next(self._pieces)
            except StopIteration as end:
                if not self._closed:
                    self._caption = self._caption or end.value
                raise StopIteration from None
            except BaseException as error:
                self._without = f"the stream ended in an error, without a caption: {error}"
                raise
            if self._closed:  # meanwhile
                self._pieces.close()
                raise StopIteration
            return piece

    @property
    def caption(self) -> Caption:
        """The whole caption. Raises UsageError before the last piece, and where none came: an error, `close`."""
        if self._caption is None:
            raise UsageError(self._without or "the caption is not there before the stream has ended")
        return self._caption

    def close(self) -> None:
        """End the search now, or after the step that is being made; nothing more comes."""
        self._closed = True
        self.ended.set()  # before the lock, which a beam search holds for all of its steps
        with self._lock:
            self._without = self._without or "the stream was closed before its end: it has no caption"
            with suppress(ValueError):  # this very thread is in a step, which then is the last one
                self._pieces.close()


class AsyncStream(AsyncIterator[str]):
    """A `Stream` for `async for`: each step is made in a thread, and a cancelled task, or `aclose`, ends the search."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def __anext__(self) -> str:
        try:
            piece = await asyncio.to_thread(next, self._stream, None)
        except asyncio.CancelledError:
            self._stream.ended.set()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """End the search now, or after the step being made; nothing more comes."""
        self._stream.ended.set()  # at once: the thread may be long in coming
        await asyncio.to_thread(self._stream.close)

    @property
    def caption(self) -> Caption:
        """See `Stream.caption`."""
        return self._stream.caption


class Either:
    """Set by its own `set`, or by the caller's event."""

    def __init__(self, other: CancelToken | None) -> None:
        self._own, self._other = threading.Event(), other

    def set(self) -> None:
        self._own.set()

    def is_set(self) -> bool:
        return self._own.is_set() or (self._other is not None and self._other.is_set())


async def in_thread(work: Callable[[CancelToken], T], cancel: CancelToken | None) -> T:
    """Do `work` in a thread of the loop's own; when the task is cancelled, it is told by what it is given."""
    ended = Either(cancel)
    try:
        return await asyncio.to_thread(work, ended)
    except asyncio.CancelledError:
        ended.set()
        raise


def spoken(tokenizer: Tokenizer, before: tuple[int, ...], steps: Steps) -> Generator[str, None, list[list[Hypothesis]]]:
    """The text of the one caption that a search finds, behind the ids `before`, as soon as no later token can change
    it; returns what the search does. All of it at the end where the search, or the tokenizer's decoder, may go back on
    what was said.
    """
    said, ids = "", list(before)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            found: list[list[Hypothesis]] = end.value
            break
        if step and tokenizer.appends:
            ids.append(step[0][1])
            text = tokenizer.settled(ids)
            if len(text) > len(said):
                yield text[len(said) :]
                said = text
    whole = tokenizer.decode(before + found[0][0].token_ids)
    if len(whole) > len(said):
        yield whole[len(said) :]
    return found
