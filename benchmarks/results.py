"""What was found out about each subject as the rows of a record: figures, ratios within its group, and captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median as middle
from typing import TYPE_CHECKING, Any

from .latency import STAGES, speedup, stats
from .memory import median, over
from .quality import Photo, identical_share, quality_record, score
from .row import Row

if TYPE_CHECKING:
    from .metrics import CaptionScores


def alive(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.error is None]


def results(rows: Sequence[Row], photos: Sequence[Photo], reference: dict[str, Any]) -> list[dict[str, Any]]:
    """The record's rows. They are compared with those of their group, captions with its first that ran through;
    nothing is said of quality where a photo has no references."""
    firsts = {row.group: row for row in reversed(alive(rows))}
    judged = alive(rows) if all(photo.references for photo in photos) else []
    scores = {id(row): score([c["text"] for c in row.captions], photos[: len(row.captions)]) for row in judged}
    captions = {id(row): _said(row, photos, scores.get(id(row))) for row in alive(rows)}
    found = []
    for row in rows:
        first = firsts.get(row.group)
        beside = [other for other in alive(rows) if other.group == row.group and other is not row]
        facts = dict(row.subject.facts) | {k: v for k, v in row.facts.items() if k not in ("import_s", "load_s")}
        quality = speedups = None
        if row.error is None:
            speedups = {other.subject.name: _speedups(other, row) for other in beside if other.runs}
        if id(row) in scores:
            quality = quality_record(scores[id(row)], scores[id(first)])
            if row is not first:
                quality["identical_to_first"] = identical_share(captions[id(row)], captions[id(first)])
        found.append(
            {
                "name": row.subject.name,
                "kind": row.subject.kind,
                "status": _status(row),
                "error": row.error,
                "group": row.group,
                "peer_of": list(row.subject.peer_of),
                "sha256": facts.pop("sha256", None),
                "bytes": facts.pop("bytes", None),
                "decoding": dict(row.subject.decoding),
                "facts": facts,
                "timed_by": row.timed_by if row.runs else None,
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
    return found


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
    step = result.get("next_token", {}).get("p50")  # 0 where a browser's clock is too coarse
    return result | {"tokens_per_caption": sum(tokens) / len(tokens), "tokens_per_s": 1 / step if step else None}


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


def _said(row: Row, photos: Sequence[Photo], scores: CaptionScores | None) -> dict[str, dict[str, Any]]:
    """Photo → caption, its log-probability and, where there are scores, its CIDEr."""
    said = {p.id: {"text": c["text"], "logprob": c["logprob"]} for p, c in zip(photos, row.captions, strict=False)}
    for one, cider in zip(said.values(), scores.per_photo_cider if scores else (), strict=False):
        one["cider"] = float(cider)
    return said


def _status(row: Row) -> str:
    if row.error is None:
        return "ok"
    return "refused" if row.subject.refused else "missing" if row.missing else "failed"


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
