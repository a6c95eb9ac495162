"""One run of the bench: fresh processes for memory and cold start, interleaved rounds, then the captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median as middle
from typing import Any

from ..runtime.errors import UsageError
from .device import Device, Local, Progress
from .latency import STAGES, speedup, stats
from .memory import REFERENCE_IMPORTS, caption_process, import_process, median, over
from .quality import Photo, identical_share, quality_record, score
from .runner import Running, WorkerFailed
from .subjects import Subject

PHASES = ("cold start", "latency", "captions")
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
    min_runs: int = 30  # timed photos per subject, over all rounds
    min_seconds: float = 2.0  # of timed captioning per subject, over all rounds
    warmup: int = 5  # photos before the first round
    cold_starts: int = 5
    memory_photos: int = 8
    limit_seconds: float = 0.4  # for each of the machine's limits, before and after all else; 0 leaves them out
    timeout: float = 300.0  # for one answer of a worker

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Row:
    """What was found out about one subject so far. After an error nothing more is asked of it."""

    subject: Subject
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)  # cold starts
    peak: dict[str, Any] | None = None  # the process that captioned several photos
    runs: list[list[dict[str, float]]] = field(default_factory=list)  # [rounds][photos of the round]
    captions: list[dict[str, Any]] = field(default_factory=list)  # in the photos' order

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Turn a worker's failure into this row's reason."""
        try:
            yield
        except WorkerFailed as failure:
            self.error = f"{what}: {failure}"


def run(
    subjects: Sequence[Subject],
    photos: Sequence[Photo],
    settings: Settings,
    progress: Progress,
    device: Device | None = None,
) -> dict[str, Any]:
    """Measure every subject on the same photos, on a device that is prepared for them (by default this machine). Where
    times mean nothing (Device.timed) only captions are made.
    Returns {"reference": …, "rows": […]} of a record (see record.py).

    A subject that fails becomes a row with the reason, and the others go on. Raises UsageError without
    subjects or photos.
    """
    if not subjects or not photos:
        raise UsageError("the bench needs at least one bundle or peer, and one photo")
    device = device or Local()
    rows = [Row(subject, error=subject.refused) for subject in subjects]
    reference = UNTIMED if not device.timed else _fresh_processes(device, rows, photos, settings, progress)
    with ExitStack() as stack:
        workers = _start(device, rows, settings, stack)
        if device.timed:
            _rounds(rows, workers, photos, settings, progress)
        _captions(rows, workers, photos, settings, progress)
    return {"reference": reference, "rows": _results(rows, photos, reference)}


def _alive(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.error is None]


def _fresh_processes(
    device: Device, rows: Sequence[Row], photos: Sequence[Photo], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Memory and cold start, the reference process taking its turn between the subjects.

    The first process of each is the one whose memory counts; its time does not, because it may still read
    from disk.
    """
    files = [photo.path for photo in photos[: settings.memory_photos]]
    imports: list[dict[str, Any]] = []
    idle: dict[str, Any] = {"peak_rss": None}
    reason = None
    total = (settings.cold_starts + 1) * (len(rows) + 1)
    done = 0
    for turn in range(settings.cold_starts + 1):
        if reason is None:
            try:
                process = device.imports(REFERENCE_IMPORTS, settings.threads)
                found = import_process(process, timeout=settings.timeout)
                if turn == 0:
                    idle = import_process(device.imports((), settings.threads), timeout=settings.timeout)
                else:
                    imports.append(found)
            except WorkerFailed as failure:
                reason = str(failure)
        progress("cold start", done := done + 1, total)
        for row in rows:
            if row.error is None:
                request = row.subject.load_request(settings.threads)
                with row.trying("cold start"):
                    few = files if turn == 0 else files[:1]
                    process = device.start(row.subject, settings.threads)
                    found = caption_process(process, request, few, timeout=settings.timeout, peak=turn == 0)
                    if turn == 0:
                        row.peak = found
                    else:
                        row.starts.append(found)
            progress("cold start", done := done + 1, total)
    return {
        "imports": list(REFERENCE_IMPORTS),
        "error": reason,
        "seconds": median(imports, "seconds"),
        "peak_rss": median(imports, "peak_rss"),
        "idle_rss": idle["peak_rss"],
    }


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
) -> None:
    """Time photos in interleaved rounds; every round goes on where the last one stopped in the list of photos. The rows
    of a round see the same photos, as many as the slowest of them has time for: the others see those several times.
    """

    def take(start: int, count: int, few: int) -> list[str]:
        return [photos[(start + k % few) % len(photos)].path for k in range(count)]

    counts: dict[int, int] = {}
    for i, worker in workers.items():
        row = rows[i]
        with row.trying("warm-up"):
            warm = worker.ask("time", photos=take(0, settings.warmup, settings.warmup), timeout=settings.timeout)[
                "runs"
            ]
            seconds = max(1e-6, middle(run["end_to_end"] for run in warm))
            wanted = max(settings.min_runs, settings.min_seconds / seconds)
            counts[i] = math.ceil(wanted / settings.rounds)

    total = settings.rounds * len(rows)
    offset = done = 0
    for _ in range(settings.rounds):
        few = min((counts[i] for i in workers if rows[i].error is None), default=0)
        for i, row in enumerate(rows):
            if row.error is None:
                with row.trying("latency"):
                    files = take(offset, counts[i], few)
                    row.runs.append(workers[i].ask("time", photos=files, timeout=settings.timeout)["runs"])
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
    """Caption every photo, one at a time as a device does, in requests of `chunk` photos."""
    total, done = len(rows) * len(photos), 0
    for i, row in enumerate(rows):
        for start in range(0, len(photos), chunk):
            part = photos[start : start + chunk]
            if row.error is None:
                with row.trying("captions"):
                    files = [photo.path for photo in part]
                    answer = workers[i].ask("caption", photos=files, timeout=settings.timeout)
                    row.captions.extend(answer["captions"])
            progress("captions", done := done + len(part), total)


def _stage_rounds(row: Row, stage: str) -> list[list[float]]:
    """The stage's samples by round; rounds without one (one-token captions have no next_token) are empty."""
    return [[run[stage] for run in runs if stage in run] for runs in row.runs]


def _latency(row: Row) -> dict[str, Any] | None:
    if not row.runs:
        return None
    result: dict[str, Any] = {}
    loads = [start["load_s"] for start in row.starts]
    if loads:
        result["load"] = stats(loads).to_dict()
    for stage in STAGES:
        samples = [t for runs in _stage_rounds(row, stage) for t in runs]
        if samples:
            result[stage] = stats(samples).to_dict()
    tokens = [run["tokens"] for runs in row.runs for run in runs]
    return result | {"tokens_per_caption": sum(tokens) / len(tokens)}


def _round_medians(row: Row) -> dict[str, list[float | None]] | None:
    """Per stage the median (s) of every round, None for one without: what two records are compared by."""
    found = {stage: [middle(runs) if runs else None for runs in _stage_rounds(row, stage)] for stage in STAGES}
    return {stage: medians for stage, medians in found.items() if any(medians)} or None


def _speedups(other: Row, row: Row) -> dict[str, Any]:
    """Per stage, how many times faster `row` is than `other`; by the medians of the rounds both have."""
    result = {}
    for stage in STAGES:
        both = zip(_stage_rounds(other, stage), _stage_rounds(row, stage), strict=False)
        pairs = _above_zero((middle(a), middle(b)) for a, b in both if a and b)
        if len(pairs) >= 2:
            a, b = zip(*pairs, strict=True)
            result[stage] = speedup(a, b).to_dict()
    return result


def _above_zero(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that have a ratio: a browser's clock may be too coarse for a short stage."""
    return [(a, b) for a, b in pairs if a > 0 and b > 0]


def _times_encode(row: Row) -> dict[str, Any]:
    """How many times the encoder's own time decoding and the whole way from picture to text take."""
    encode = _stage_rounds(row, "encode")
    result = {}
    for stage in ("decode", "picture_to_text"):
        both = zip(_stage_rounds(row, stage), encode, strict=True)
        pairs = _above_zero((middle(a), middle(b)) for a, b in both if a and b)
        if len(pairs) >= 2:
            a, b = zip(*pairs, strict=True)
            result[stage] = speedup(a, b).to_dict()
    return result


def _said(row: Row, photos: Sequence[Photo], ciders: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Photo → caption, its log-probability and CIDEr."""
    each = zip(photos, row.captions, ciders, strict=True)
    return {p.id: {"text": c["text"], "logprob": c["logprob"], "cider": float(score)} for p, c, score in each}


def _results(rows: Sequence[Row], photos: Sequence[Photo], reference: dict[str, Any]) -> list[dict[str, Any]]:
    """The record's rows. Captions are compared with those of the first subject that ran through."""
    first = next(iter(_alive(rows)), None)
    scores = {id(row): score([c["text"] for c in row.captions], photos) for row in _alive(rows)}
    captions = {id(row): _said(row, photos, scores[id(row)].per_photo_cider) for row in _alive(rows)}
    results = []
    for row in rows:
        against = first if row is not first else None
        facts = dict(row.subject.facts) | {k: v for k, v in row.facts.items() if k not in ("import_s", "load_s")}
        quality = speedups = None
        if row.error is None:
            quality = quality_record(scores[id(row)], scores[id(first)])
            speedups = {o.subject.name: _speedups(o, row) for o in _alive(rows) if o is not row and o.runs}
            if against:
                quality["identical_to_first"] = identical_share(captions[id(row)], captions[id(against)])
        results.append(
            {
                "name": row.subject.name,
                "kind": row.subject.kind,
                "status": "refused" if row.subject.refused else "ok" if row.error is None else "failed",
                "error": row.error,
                "peer_of": list(row.subject.peer_of),
                "sha256": facts.pop("sha256", None),
                "bytes": facts.pop("bytes", None),
                "decoding": dict(row.subject.decoding),
                "facts": facts,
                "latency": _latency(row),
                "rounds": _round_medians(row),
                "speedup": speedups,  # times faster than each other subject, by its name and the stage
                "times_encode": _times_encode(row),
                "memory": _memory(row, reference),
                "cold_start": _cold_start(row, reference),
                "quality": quality,
                "captions": captions.get(id(row)),
            }
        )
    return results


def _memory(row: Row, reference: dict[str, Any]) -> dict[str, Any] | None:
    if row.peak is None:
        return None
    peak = row.peak["peak_rss"]
    return {"peak_rss": peak, "over_idle": over(peak, reference["idle_rss"])}


def _cold_start(row: Row, reference: dict[str, Any]) -> dict[str, Any] | None:
    if not row.starts:
        return None
    seconds, rss = median(row.starts, "seconds"), median(row.starts, "first_rss")
    assert seconds is not None
    return {
        "seconds": seconds,
        "runs": [start["seconds"] for start in row.starts],
        "import_s": median(row.starts, "import_s"),
        "load_s": median(row.starts, "load_s"),
        "peak_rss": rss,
        "times_reference": seconds / reference["seconds"] if reference["seconds"] else None,
        "rss_over_reference": over(rss, reference["peak_rss"]),
    }
