"""One run of the bench, group by group: fresh processes for memory and cold start, interleaved rounds, then the
captions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median as middle
from time import perf_counter
from typing import Any

from ..runtime.errors import EdgecapError, UsageError
from ..runtime.progress import Progress
from .device import Device, Local
from .memory import REFERENCE_IMPORTS, Reference, caption_process
from .quality import Photo
from .results import alive, results
from .row import Row
from .runner import Running, answered
from .subjects import Subject, groups

INTERRUPTED = "interrupted"
UNTIMED = {
    "imports": list(REFERENCE_IMPORTS),
    "error": "times mean nothing on this device",
    "seconds": None,
    "peak_rss": None,
    "idle_rss": None,
}


@dataclass(frozen=True)
class Settings:
    """The protocol. Times in seconds; the record repeats all of it."""

    threads: int = 1
    rounds: int = 20  # interleaved: A B A B …
    min_runs: int = 30  # timed photos per subject, over all rounds; one a round in slow groups
    min_seconds: float = 2.0  # of timed captioning per subject, over all rounds
    warmup: int = 5  # photos before the first round
    cold_starts: int = 5  # fewer where they take longer than start_seconds together, but one (see _fresh_processes)
    start_seconds: float = 10.0
    slow_seconds: float = 0.5  # of a caption; a group whose median row takes longer has one tell all times of a photo
    slow_photos: int | None = None  # are captioned in such a group; None: all
    memory_photos: int = 8
    limit_seconds: float = 0.4  # for each of the machine's limits, before and after all else; 0 leaves them out
    timeout: float = 300.0  # for a worker's answer; more where it takes many slow captions (Row.patience)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    subjects: Sequence[Subject],
    photos: Sequence[Photo],
    settings: Settings,
    progress: Progress,
    device: Device | None = None,
) -> dict[str, Any]:
    """Measure every subject on the same photos, on a device that is prepared for them (by default this machine). Where
    times mean nothing (Device.timed) only captions are made. Groups (see subjects.groups) are measured one after the
    other, and only the workers of one are alive.
    Returns {"reference": …, "stopped": …, "rows": […]} of a record (see record.py).

    A subject that fails becomes a row with the reason, and the others go on; so does a group, and the rows of those
    that are finished are kept where the user stops it ("stopped": INTERRUPTED). Raises UsageError without subjects or
    photos, and whatever stopped it where no group was finished.
    """
    if not subjects or not photos:
        raise UsageError("the bench needs at least one bundle or peer, and one photo")
    device = device or Local()
    settings = replace(settings, timeout=settings.timeout * device.slower)
    rows = [Row(subject, error=subject.refused, group=n) for subject, n in zip(subjects, groups(subjects), strict=True)]
    reference, stopped, finished = Reference(), None, 0
    count = 1 + max(row.group for row in rows)
    for n in range(count):
        part = [row for row in rows if row.group == n]
        try:
            _measure(device, part, photos, settings, _named(progress, n, count), reference)
            finished += 1
        except (Exception, KeyboardInterrupt) as failure:  # whatever it is, other groups' rows are worth keeping
            stopped = INTERRUPTED if isinstance(failure, KeyboardInterrupt) else None
            if not finished and (stopped or n + 1 == count):
                raise
            if stopped:
                part = [row for row in rows if row.group >= n]
            _give_up(part, stopped or one_line(failure))
            if stopped:
                break
    figures = reference.figures() if device.timed else UNTIMED
    return {"reference": figures, "stopped": stopped, "rows": results(rows, photos, figures)}


def _give_up(rows: Sequence[Row], reason: str) -> None:
    """Forget what was measured of rows whose group is not finished; those that failed keep their own reasons."""
    for row in rows:
        if row.error is None:
            row.error, row.missing, row.peak = f"not measured: {reason}", True, None
            for found in (row.facts, row.starts, row.runs, row.captions):
                found.clear()


def one_line(failure: BaseException) -> str:
    """An exception in one line."""
    said = " ".join(str(failure).split())
    return said if isinstance(failure, EdgecapError) else f"{type(failure).__name__}: {said}"


@contextmanager
def noting(problems: list[str], what: str) -> Iterator[None]:
    """Note what fails after the rounds, and go on: what they measured is not lost with it."""
    try:
        yield
    except Exception as failure:  # whatever it is
        problems.append(f"{what}: {one_line(failure)}")


def _named(progress: Progress, n: int, of: int) -> Progress:
    """Progress whose phases name the group."""
    return progress if of == 1 else lambda phase, done, total: progress(f"{phase} {n + 1}/{of}", done, total)


def _measure(
    device: Device,
    rows: Sequence[Row],
    photos: Sequence[Photo],
    settings: Settings,
    progress: Progress,
    reference: Reference,
) -> None:
    """All of one group. Whether it is slow is decided once, by what its fresh processes took."""
    slow = False
    if device.timed:
        _fresh_processes(device, rows, photos, settings, progress, reference)
        slow = _slow(rows, settings)
        if settings.slow_photos and slow:
            photos = photos[: settings.slow_photos]
            for row in rows:
                del row.captions[len(photos) :]
    with ExitStack() as stack:
        workers = _start(device, rows, settings, stack)
        if device.timed:
            _rounds(rows, workers, photos, settings, progress, slow=slow)
        _captions(rows, workers, photos, settings, progress)


def _fresh_processes(
    device: Device,
    rows: Sequence[Row],
    photos: Sequence[Photo],
    settings: Settings,
    progress: Progress,
    reference: Reference,
) -> None:
    """Memory and cold start, the reference process taking its turn between the subjects.

    The first process of each is the one whose memory counts; its time does not, because it may still read
    from disk, unless it alone takes longer than start_seconds.
    """
    files = [photo.path for photo in photos[: settings.memory_photos]]
    total = (settings.cold_starts + 1) * (len(rows) + 1)
    done = 0
    for turn in range(settings.cold_starts + 1):
        reference.measure(device.imports, settings.threads, settings.timeout)
        progress("cold start", done := done + 1, total)
        for row in rows:
            if row.error is None and sum(start["seconds"] for start in row.starts) < settings.start_seconds:
                request = row.subject.load_request(settings.threads)
                with row.trying("cold start"):
                    few = files if turn == 0 else files[:1]
                    process = device.start(row.subject, settings.threads)
                    timeout = row.patience(settings.timeout, 1)
                    found = caption_process(process, request, few, timeout=timeout, peak=turn == 0)
                    row.slowest = max(row.slowest, found["seconds"])
                    if turn == 0:
                        row.peak = found
                        row.captions.extend(found.pop("captions"))
                    if turn or found["seconds"] > settings.start_seconds:
                        row.starts.append(found)
            progress("cold start", done := done + 1, total)


def _slow(rows: Sequence[Row], settings: Settings) -> bool:
    """Whether a caption takes long by the group's median: that of every row would let the quickest one decide how long
    all the others take to be timed.
    """
    times = [row.peak["caption_s"] for row in alive(rows) if row.peak]
    return bool(times) and middle(times) > settings.slow_seconds


def _start(device: Device, rows: Sequence[Row], settings: Settings, stack: ExitStack) -> dict[int, Running]:
    """One worker per row that is still alive, loaded; by the row's position."""
    workers = {}
    for i, row in enumerate(rows):
        if row.error is None:
            with row.trying("load"):
                worker = stack.enter_context(device.start(row.subject, settings.threads))
                request = row.subject.load_request(settings.threads)
                row.facts = worker.ask("load", timeout=settings.timeout, **request)["facts"]
                workers[i] = worker
    return workers


def _rounds(
    rows: Sequence[Row],
    workers: dict[int, Running],
    photos: Sequence[Photo],
    settings: Settings,
    progress: Progress,
    *,
    slow: bool = False,
) -> None:
    """Time photos in interleaved rounds; every round goes on where the last one stopped in the list of photos. The rows
    of a round see the same photos, as many as the slowest of them has time for: the others see those several times.
    slow: captions take long, and one photo a round has to do (see worker.time_once).
    """
    warmup = 1 if slow else settings.warmup
    how = {"once": True} if slow else {}

    def take(start: int, count: int, few: int) -> list[str]:
        return [photos[(start + k % few) % len(photos)].path for k in range(count)]

    def time(row: Row, worker: Running, files: list[str]) -> list[dict[str, float]]:
        captions = 1 + 3 * len(files)  # at most: each in parts, whole, and from its picture
        answer = worker.ask("time", photos=files, timeout=row.patience(settings.timeout, captions), **how)
        return answered(answer, "runs", len(files))

    counts: dict[int, int] = {}
    for i, worker in workers.items():
        row = rows[i]
        row.timed_by = "once" if slow else "parts"
        with row.trying("warm-up"):
            warm = time(row, worker, take(0, warmup, warmup))
            seconds = max(1e-6, middle(run["end_to_end"] for run in warm))
            wanted = max(settings.min_runs, settings.min_seconds / seconds)
            counts[i] = 1 if slow else math.ceil(wanted / settings.rounds)

    total = settings.rounds * len(rows)
    offset = done = 0
    for _ in range(settings.rounds):
        few = min((counts[i] for i in workers if rows[i].error is None), default=0)
        for i, row in enumerate(rows):
            if row.error is None:
                with row.trying("latency"):
                    row.runs.append(time(row, workers[i], take(offset, counts[i], few)))
            progress("latency", done := done + 1, total)
        offset += few


def _captions(
    rows: Sequence[Row],
    workers: dict[int, Running],
    photos: Sequence[Photo],
    settings: Settings,
    progress: Progress,
    chunk: int = 16,
) -> None:
    """Caption the photos that have no caption yet, one at a time as a device does, in requests of `chunk` photos after
    the first one, which tells how long they may take.
    """
    total, done = len(rows) * len(photos), 0
    for i, row in enumerate(rows):
        done += len(row.captions)
        while row.error is None and (part := photos[len(row.captions) :][: chunk if row.captions else 1]):
            with row.trying("captions"):
                files, begin = [photo.path for photo in part], perf_counter()
                answer = workers[i].ask("caption", photos=files, timeout=row.patience(settings.timeout, len(files)))
                row.captions.extend(answered(answer, "captions", len(files)))
                row.slowest = max(row.slowest, (perf_counter() - begin) / len(files))
            progress("captions", done := done + len(part), total)
