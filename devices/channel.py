"""What the bench and the page that runs it say to each other: commands go out, answers come back, and nothing waits
for a page that went away.
"""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import Any

POLL = 10.0  # seconds that a page's question for the next command stays open
GONE_AFTER = 45.0  # seconds without a word


class Lost(Exception):
    """The page does not answer (any more); the text is the reason, in one line."""


class Refused(Exception):
    """A page asks for what is not its own; the text is for its screen."""


class Channel:
    """Commands and answers of one page. The server calls its first half for the page, the bench its second half.

    A page names itself by an id of its own making, and the first to join is the one: another device is refused.
    """

    def __init__(self, *, gone_after: float = GONE_AFTER, poll: float = POLL) -> None:
        self._changed = threading.Condition()
        self._gone_after, self._poll = gone_after, poll
        self._page: str | None = None
        self._hello: Any = None
        self._visit = 0  # how many times the page was loaded
        self._commands: deque[dict[str, Any]] = deque()
        self._awaited: set[int] = set()
        self._answers: dict[int, Any] = {}
        self._count = 0
        self._heard, self._polls = monotonic(), 0
        self._left: str | None = None
        self._end: dict[str, Any] | None = None
        self._end_seen = False

    # --- the page's half ---

    def join(self, page: str, hello: Any) -> None:
        """A page is there and says what device it runs on; loaded anew, what it was asked before is lost."""
        with self._changed:
            if self._page not in (None, page):
                raise Refused("Another device is being measured. Close its page, and start the bench again.")
            if self._end is not None:
                raise Refused("The bench has ended.")
            self._page, self._hello, self._left = page, hello, None
            self._visit += 1
            self._commands.clear()
            self._awaited.clear()
            self._answers.clear()
            self._hear()

    def next(self, page: str, after: int = 0) -> dict[str, Any] | None:
        """The next command; None when there was none for a while. after: the id of the last one that arrived, until
        which a command is given again, as its reply may be lost on the way.
        """
        with self._changed:
            self._mine(page)
            self._polls += 1
            try:
                while self._commands and self._commands[0]["id"] <= after:
                    self._commands.popleft()
                if not self._commands and self._end is None:
                    self._changed.wait_for(lambda: self._commands or self._end is not None, self._poll)
                if self._commands:
                    return self._commands[0]
                if self._end is not None:
                    self._end_seen = True
                    self._changed.notify_all()
                return self._end
            finally:
                self._polls -= 1
                self._heard = monotonic()

    def answer(self, page: str, id: int, value: Any) -> None:
        """What came of a command."""
        with self._changed:
            self._mine(page)
            if id not in self._awaited:
                raise Refused("Nobody asked for that.")
            self._awaited.remove(id)
            self._answers[id] = value
            self._hear()

    def leave(self, page: str) -> None:
        """The page is being closed."""
        with self._changed:
            self._mine(page)
            self._left = "its page was closed"
            self._changed.notify_all()

    def _mine(self, page: str) -> None:
        if page != self._page:
            raise Refused("This page is not the one that is measured. Load it anew.")
        self._heard = monotonic()

    def _hear(self) -> None:
        self._heard = monotonic()
        self._changed.notify_all()

    # --- the bench's half ---

    def wait(self, timeout: float) -> Any:
        """What the first device says of itself. Raises Lost where none comes within `timeout` s."""
        with self._changed:
            self._changed.wait_for(lambda: self._page is not None, timeout)
            if self._page is None:
                raise Lost(f"no device opened the page within {timeout:g} s")
            return self._hello

    @property
    def visit(self) -> int:
        """How many times the page was loaded: what ran in an earlier one is gone."""
        return self._visit

    def send(self, command: dict[str, Any], visit: int) -> int:
        """Queue a command; returns the id that its answer will have. Raises Lost."""
        with self._changed:
            self._here(visit)
            self._count += 1
            self._commands.append(command | {"id": self._count})
            self._awaited.add(self._count)
            self._changed.notify_all()
            return self._count

    def take(self, id: int, visit: int, timeout: float) -> Any:
        """The answer to a command. Raises Lost where the page went away, TimeoutError where it is silent too long."""
        until = monotonic() + timeout
        with self._changed:
            while id not in self._answers:
                self._here(visit)
                left = until - monotonic()
                if left <= 0:
                    self._awaited.discard(id)
                    raise TimeoutError
                self._changed.wait(min(left, 1.0))
            return self._answers.pop(id)

    def end(self, message: dict[str, Any], *, wait: float = 2.0) -> None:
        """Tell the page that there is no more to do, and let it hear that for at most `wait` s."""
        with self._changed:
            if self._end is None:
                self._end = message | {"op": "end"}
            self._commands.clear()
            self._changed.notify_all()
            if self._page is not None and self._reason() is None:
                self._changed.wait_for(lambda: self._end_seen, wait)

    def _reason(self) -> str | None:
        """Why the page is not there; None when it is."""
        if self._left:
            return self._left
        if not self._polls and monotonic() - self._heard > self._gone_after:
            return f"it was not heard of for {self._gone_after:g} s: keep its screen on and the page in front"
        return None

    def _here(self, visit: int) -> None:
        if reason := self._reason():
            raise Lost(f"the device went away: {reason}")
        if visit != self._visit:
            raise Lost("the page was loaded anew while it was measured")
