"""Figures that need a process of their own: peak memory, and the time from process start to the first
caption.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from .runner import Running, WorkerFailed, answered

# What any captioner on this engine must import; the cost of everything else is edgecap's own.
REFERENCE_IMPORTS = ("numpy", "PIL.Image", "onnxruntime", "tokenizers")


def import_process(process: Running, *, timeout: float) -> dict[str, Any]:
    """A fresh interpreter that imports modules and ends (see Device.imports): {"seconds": start to imported,
    "peak_rss": bytes}. Raises WorkerFailed when one of them cannot be imported.
    """
    with process:
        answer = process.receive(timeout)
        return {"seconds": answer["since_start"], "peak_rss": answer["peak_rss"]}


def caption_process(
    process: Running, load: dict[str, Any], photos: Sequence[str], *, timeout: float, peak: bool = True
) -> dict[str, Any]:
    """A fresh process that captions `photos` one after the other.

    peak: whether its memory is wanted, where that takes more than the answers.
    Returns "seconds" from process start to the first caption, "first_rss" and "peak_rss": bytes at the first
    and after the last caption, "import_s" and "load_s"; "captions", and "caption_s" of the quickest after the first,
    where there are more. Raises WorkerFailed.
    """
    with process:
        process.send({"op": "load"} | load)  # both at once: the process never waits for us
        process.send({"op": "caption", "photos": [photos[0]]})
        facts = process.receive(timeout)["facts"]
        answer = process.receive(timeout)
        seconds, first = answer["since_start"], answer["peak_rss"]
        captions, times = answered(answer, "captions", 1), []
        for photo in photos[1:]:
            begin = perf_counter()
            answer = process.ask("caption", photos=[photo], timeout=timeout)
            times.append(perf_counter() - begin)
            captions += answered(answer, "captions", 1)
        return {
            "seconds": seconds,
            "first_rss": first,
            "peak_rss": process.peak_memory(answer, timeout) if peak else answer["peak_rss"],
            "import_s": facts["import_s"],
            "load_s": facts["load_s"],
            "captions": captions,
            "caption_s": min(times, default=seconds - facts["import_s"] - facts["load_s"]),
        }


def median(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    """Median of one figure over runs; None when the system does not tell it."""
    values = [run[key] for run in runs if run[key] is not None]
    return statistics.median(values) if values else None


def over(value: float | None, base: float | None) -> float | None:
    """`value` − `base`, or None when either is unknown."""
    return None if value is None or base is None else value - base


@dataclass
class Reference:
    """The process that imports what any captioner does, as far as it was measured."""

    imports: list[dict[str, Any]] = field(default_factory=list)
    idle: dict[str, Any] | None = None  # an interpreter that imports nothing
    error: str | None = None

    def measure(self, start: Callable[[Sequence[str], int], Running], threads: int, timeout: float) -> None:
        """Once more, in processes that `start` begins (see Device.imports); the first time does not count, because it
        may still read from disk.
        """
        if self.error is not None:
            return
        try:
            found = import_process(start(REFERENCE_IMPORTS, threads), timeout=timeout)
            if self.idle is None:
                self.idle = import_process(start((), threads), timeout=timeout)
            else:
                self.imports.append(found)
        except WorkerFailed as failure:
            self.error = str(failure)

    def figures(self) -> dict[str, Any]:
        return {
            "imports": list(REFERENCE_IMPORTS),
            "error": self.error,
            "seconds": median(self.imports, "seconds"),
            "peak_rss": median(self.imports, "peak_rss"),
            "idle_rss": self.idle["peak_rss"] if self.idle else None,
        }
