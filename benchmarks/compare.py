"""Two records against each other, for CI and for what changed since the last one: statistics, not a bare difference."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime.errors import UsageError
from .latency import STAGES
from .metrics import paired_bootstrap

FORMAT, VERSION = "edgecap-bench-compare", 1
JUDGED = ("end_to_end",)
TIMED = (*STAGES, "cold_start")  # what can be judged
SIGNIFICANT = 0.05  # of Mann and Whitney's test, one side
FEWEST = 5  # rounds of one record: with fewer no test can tell anything

Record = Mapping[str, Any]


def compare(a: Record, b: Record, *, limit: float = 0.0, stages: Sequence[str] = JUDGED, force: bool = False) -> dict:
    """What record `b` changed over `a`, row by row of the same name.

    A row has a "reason" to fail if in one of the `stages` the better end of its ratio's interval (time in b over time
    in a) is above 1 + limit and Mann and Whitney's test finds b slower too; also if `b` has not measured what `a` had,
    either has fewer than FEWEST rounds, or `b` decodes otherwise. "failed": that a bundle has one; peers are there to
    see what else changed. Raises UsageError where the records are not of one device, number of threads and data, unless
    `force`, or no row is in both.
    """
    unlike = differences(a, b)
    if unlike and not force:
        raise UsageError(f"the records cannot be compared: {'; '.join(unlike)}. Compare them all the same with --force")
    rows_b = {row["name"]: row for row in b["rows"]}
    before = [row for row in a["rows"] if row["status"] == "ok"]
    if not any(row["name"] in rows_b for row in before):
        raise UsageError(f"no row is in both records: {_names(before)} in the first, {_names(b['rows'])} in the second")
    same_photos = not any(line.startswith(("data:", "split:", "photos:")) for line in unlike)
    rows = [_row(row, rows_b.get(row["name"]), limit, stages, same_photos) for row in before]
    known = {row["name"] for row in before}
    return {
        "format": FORMAT,
        "version": VERSION,
        "limit": limit,
        "stages": list(stages),
        "created": [a["created"], b["created"]],
        "notes": [*unlike, *_notes(a, b), *_row_notes(before, rows_b, same_photos)],
        "rows": rows,
        "new": [row["name"] for row in b["rows"] if row["name"] not in known and row["status"] == "ok"],
        "failed": any(row["reason"] and row["kind"] == "bundle" for row in rows),
    }


def since_last(history: Sequence[Record], record: Record) -> dict | None:
    """What a record changed over the last one of the same device, threads and data that shares a row with it; None
    where the history has none.
    """
    names = {row["name"] for row in record["rows"]}
    for last in reversed(history):
        shared = any(row["status"] == "ok" and row["name"] in names for row in last["rows"])
        if shared and not differences(last, record):
            return compare(last, record)
    return None


def why_none(history: Sequence[Record], record: Record) -> str:
    """Why `since_last` finds no record to compare with."""
    if not history:
        return "the history held no record yet"
    if unlike := differences(history[-1], record):
        return f"the history's last record is of something else ({'; '.join(unlike)})"
    return f"the history's last record has none of these rows: {_names(history[-1]['rows'])}"


def differences(a: Record, b: Record) -> list[str]:
    """Why two records should not be compared, "what: … and …" each."""
    found = []
    for what, where in _SAME.items():
        one, two = (_condition(record, where) for record in (a, b))
        if one != two:
            found.append(f"{what}: {_said(one)} and {_said(two)}")
    return found


_MODEL = ("device", "cpu", "model")
_SAME = {
    "device": ("device", "name"),
    "CPU": _MODEL,
    "cores": ("device", "cpu", "cores"),
    "memory limit": ("device", "memory_limit", "bytes"),
    "threads": ("settings", "threads"),
    "browser's engine": ("device", "browser", "engine"),
    "browser's page isolated": ("device", "browser", "isolated"),  # without it a page has one thread
    "data": ("data", "fingerprint"),
    "split": ("data", "split"),
    "photos": ("data", "photos"),
}


def _condition(record: Record, where: Sequence[str]) -> Any:
    """What must be the same; of a browser, which stands where others have their CPU, without its version."""
    value = _at(record, where)
    if where == _MODEL and _at(record, ("device", "kind")) == "browser":
        return re.sub(r" [\d.]+", "", str(value))
    return value


def _at(record: Record, where: Sequence[str]) -> Any:
    value: Any = record
    for key in where:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _said(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _names(rows: Sequence[Record]) -> str:
    return ", ".join(row["name"] for row in rows) or "none"


def _notes(a: Record, b: Record) -> list[str]:
    """What makes the comparison weaker, without forbidding it."""
    notes = []
    for name, what in (("read_gb_s", "reading memory"), ("fp32_gflops", "fp32"), ("int8_gops", "int8")):
        one, two = ((record.get("limits") or {}).get(name) for record in (a, b))
        if one and two and not 0.9 < two / one < 1.1:
            notes.append(f"the machine's own limit of {what} changed by {two / one - 1:+.0%} between the records")
    for which, record in zip(("first", "second"), (a, b), strict=True):
        if signs := _at(record, ("device", "clock", "fell")):
            notes.append(f"in the {which} record the machine slowed down: {'; '.join(map(str, signs))}")
    browsers = [_at(record, _MODEL) for record in (a, b) if _at(record, ("device", "kind")) == "browser"]
    if len(set(browsers)) > 1:
        notes.append(" → ".join(browsers))
    for package in ("onnxruntime", "onnxruntime-web", "edgecap", "python"):
        one, two = (record["versions"].get(package) for record in (a, b))
        if one != two:
            notes.append(f"{package} {one} → {two}")
    return notes


def _row_notes(before: Sequence[Record], rows_b: Mapping[str, Record], same_photos: bool) -> Iterator[str]:
    """Where the same row was timed otherwise, or captioned other photos (slow rows, see suite.Settings)."""
    for a in before:
        b = rows_b.get(a["name"])
        if b is None or b["status"] != "ok":
            continue
        one, two = a.get("timed_by"), b.get("timed_by")
        if one and two and one != two:
            yield f"{a['name']} was timed otherwise: {one} → {two}"
        one, two = _at(a, ("quality", "photos")), _at(b, ("quality", "photos"))
        if same_photos and one and two and one != two:
            yield f"{a['name']}: CIDEr of {one} photos → of {two} photos"


def _row(a: Record, b: Record | None, limit: float, stages: Sequence[str], same_photos: bool) -> dict[str, Any]:
    """One row of both records; "reason" is why it fails, or None."""
    found: dict[str, Any] = {"name": a["name"], "kind": a["kind"], "reason": None, "same_bundle": None, "stages": {}}
    if b is None:
        return found | {"reason": "is not in the second record"}
    if b["status"] != "ok":
        return found | {"reason": f"failed in the second record: {b['error']}"}
    if a["decoding"] != b["decoding"]:
        changed = sorted(k for k in {*a["decoding"], *b["decoding"]} if a["decoding"].get(k) != b["decoding"].get(k))
        said = ", ".join(f"{key} {a['decoding'].get(key)} → {b['decoding'].get(key)}" for key in changed)
        return found | {"reason": f"decodes otherwise: {said}"}
    slower = []
    for stage in TIMED:
        one, two = _samples(a, stage), _samples(b, stage)
        if min(len(one), len(two)) < FEWEST:
            if stage in stages and one:
                rounds = f"{len(one)} rounds" if len(one) == len(two) else f"{len(one)} rounds → {len(two)}"
                slower.append(f"{stage} has {rounds}, {FEWEST} are needed")
            continue
        change = found["stages"][stage] = slowdown(one, two)
        change["slower"] = change["low"] > 1 + limit and change["p"] < SIGNIFICANT
        if change["slower"] and stage in stages:
            ratio, low, high = (f"{change[key] - 1:+.1%}" for key in ("ratio", "low", "high"))
            slower.append(f"{stage} {ratio} [{low}, {high}], more than {100 * limit:g}%")
    untimed = not a["latency"] and not b["latency"]  # as under emulation
    if not any(stage in found["stages"] for stage in stages) and not slower and not untimed:
        slower.append(f"no times of {', '.join(stages)} to compare in both records")
    return found | {
        "reason": "; ".join(slower) or None,
        "same_bundle": a["sha256"] == b["sha256"] if a["sha256"] and b["sha256"] else None,
        "bytes": _change(_at(a, ("bytes", "total")), _at(b, ("bytes", "total"))),
        "peak_rss": _change(_at(a, ("memory", "peak_rss")), _at(b, ("memory", "peak_rss"))),
        "cider": _cider(a, b, same_photos),
    }


def _samples(row: Record, stage: str) -> list[float]:
    """A row's independent times (s) of a stage: one a round, or one a process."""
    if stage == "cold_start":
        return [seconds for seconds in (row["cold_start"] or {}).get("runs", ()) if seconds]
    return [median for median in (row.get("rounds") or {}).get(stage, ()) if median]


def _change(a: float | None, b: float | None) -> dict[str, float] | None:
    return {"a": a, "b": b, "ratio": b / a} if a and b is not None else None


def _cider(a: Record, b: Record, same_photos: bool) -> dict[str, Any] | None:
    """Both scores; with every photo's own in both records also their difference with its paired interval."""
    if not (a["quality"] and b["quality"]):
        return None
    found: dict[str, Any] = {"a": a["quality"]["cider"], "b": b["quality"]["cider"], "difference": None}
    one, two = ((row.get("captions") or {}) for row in (a, b))
    if same_photos and one and one.keys() == two.keys() and all("cider" in c for d in (one, two) for c in d.values()):
        scores = [np.array([captions[photo]["cider"] for photo in one]) for captions in (one, two)]
        found["difference"] = paired_bootstrap(scores[1], scores[0]).to_dict()
    return found


# --- statistics ---


def slowdown(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 4000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Median time of b over that of a, which are independent runs: {"ratio", "low", "high", "p"}.

    The interval is a percentile bootstrap (Efron 1979) of the ratio, each run's rounds resampled apart; p is Mann and
    Whitney's, that b is not slower.
    """
    one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
    random = np.random.default_rng(seed)
    draws = [np.median(x[random.integers(0, x.size, (resamples, x.size))], axis=1) for x in (one, two)]
    low, high = np.quantile(draws[1] / draws[0], [(1 - level) / 2, (1 + level) / 2])
    ratio = float(np.median(two) / np.median(one))
    return {"ratio": ratio, "low": float(low), "high": float(high), "p": mann_whitney(one, two)}


def mann_whitney(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Probability of ranks as high as b's among both if b is not larger than a (Mann and Whitney 1947): the normal
    approximation, corrected for ties and continuity. 1 where all are equal.
    """
    one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
    wins = (two[:, None] > one).sum() + (two[:, None] == one).sum() / 2  # U of b
    _, ties = np.unique(np.concatenate([one, two]), return_counts=True)
    n, m = one.size, two.size
    total = n + m
    spread = n * m / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
    if spread <= 0:
        return 1.0
    return 0.5 * math.erfc((wins - n * m / 2 - 0.5) / math.sqrt(2 * spread))
