"""What is known of one subject while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .runner import WorkerFailed
from .subjects import Subject

PATIENCE = 10  # times as long as captions took so far is what others may take


@dataclass
class Row:
    """What was found out about one subject so far. After an error nothing more is asked of it."""

    subject: Subject
    error: str | None = None
    missing: bool = False  # its group was not finished, and the error says why
    group: int = 0  # those of one are measured side by side
    facts: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)  # cold starts
    peak: dict[str, Any] | None = None  # the process that captioned several photos
    slowest: float = 0.0  # s of a caption so far, loading included
    runs: list[list[dict[str, float]]] = field(default_factory=list)  # [rounds][photos of the round]
    captions: list[dict[str, Any]] = field(default_factory=list)  # in the photos' order
    timed_by: str | None = None  # "parts": every photo in parts, whole, and as a picture; "once": one caption a photo,
    # one photo a round, told all

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Turn a worker's failure into this row's reason."""
        try:
            yield
        except WorkerFailed as failure:
            self.error = f"{what}: {failure}"

    def patience(self, timeout: float, captions: int) -> float:
        """Seconds to wait for an answer that takes so many captions."""
        return max(timeout, PATIENCE * self.slowest * captions)
