"""A record as one HTML file that needs nothing else: no network, no script, no font. page.html.jinja is its shape."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError, need
from . import changes as told
from .plots import Point, pareto
from .quality import Photo
from .report import LABELS, limits_line, megabytes, milliseconds, native_lines, ratio_text, weight_lines

STAGES = ("preprocess", "encode", "first_token", "further_tokens")
STAGE_LABELS = {"further_tokens": "further tokens"} | LABELS
NAMED = 10  # dots of the plot that bear their names; with more of them, and on a phone, they bear numbers
TOGETHER = 24  # photos shown at once; the others unfold
THUMBNAIL = 256  # px, the longer side

Row = Mapping[str, Any]


def require_jinja() -> None:
    """Raise MissingExtra, before anything is measured, where the report cannot be made."""
    need("jinja2", extra="bench", command="edgecap bench --report")


def write_page(text: str, path: Path) -> None:
    """Raises UsageError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the report to {path}: {error.strerror}") from error


def thumbnail(photo: Photo) -> str:
    """A photo as a small data: URI. It must decode."""
    from ..runtime.preprocess import load_image

    picture = load_image(photo.path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def page(
    record: Mapping[str, Any],
    *,
    changes: Mapping[str, Any] | None = None,
    first_record: bool = False,
    photos: Mapping[str, str] | None = None,
) -> str:
    """The HTML of a record. changes: against the last one (compare.compare); first_record: there is none to compare
    with. photos: id → data: URI of those that shall be in it.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"ms": milliseconds, "mb": megabytes, "ratio": ratio_text}
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    rows = record["rows"]
    groups = grouped(rows)
    return template.render(
        record=record,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        head=headline(record),
        notes=[*native_lines(rows), *weight_lines(rows)],
        groups=[[line(row, group) for row in group] for group in groups],
        failed=[row for row in rows if row["status"] != "ok"],
        against=[table for group in groups if (table := against_peers(group))],
        plots=plots(rows),
        stages=stage_bars(groups),
        stage_labels=STAGE_LABELS,
        limits=limits_line(record),
        near=[row for row in rows if row.get("near")],
        over=any((row["near"]["decoder"] or {"share": 0})["share"] > 1 for row in rows if row.get("near")),
        changes=changes and changed(changes),
        first_record=first_record,
        captions=captions(rows, photos or {}),
        together=TOGETHER,
    )


def _ok(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok"]


def _there(rows: Iterable[Row]) -> list[Row]:
    """Timed rows of the device itself, without those that --native puts beside it."""
    return [row for row in _timed(rows) if row["facts"].get("on") != "native"]


def _timed(rows: Iterable[Row]) -> list[Row]:
    """Rows that ran where times mean something: not under emulation."""
    return [row for row in _ok(rows) if (row["latency"] or {}).get("end_to_end")]


def _whole(row: Row) -> dict[str, float]:
    """Times from JPEG to text."""
    return row["latency"]["end_to_end"]


def headline(record: Mapping[str, Any]) -> dict[str, Any]:
    """What stands at the top: which bundle is fastest and which captions best, and whether the machine was busy."""
    ours = [row for row in _there(record["rows"]) if row["kind"] == "bundle"]
    cpu, load = record["device"]["cpu"], record["device"].get("load")
    found: dict[str, Any] = {"fastest": None, "best": None, "busy": None}
    if ours:
        found["fastest"] = min(ours, key=lambda row: _whole(row)["p50"])
        found["best"] = max(ours, key=lambda row: row["quality"]["cider"])
    if load is not None and record["device"].get("times") != "emulated" and cpu["cores"] and load > cpu["cores"] / 2:
        found["busy"] = f"{load:.1f}"
    return found


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that ran, bundles before their peers: those that share peers are one group, and so are all if none does."""
    groups: list[list[Row]] = []
    for row in _ok(rows):
        names = {row["name"], *row.get("peer_of", ())}
        mine = [group for group in groups if any(names & {other["name"], *other.get("peer_of", ())} for other in group)]
        groups = [group for group in groups if group not in mine]
        groups.append([*(other for group in mine for other in group), row])
    if not any(row.get("peer_of") for row in rows):
        groups = [[row for group in groups for row in group]] if groups else []
    order = {row["name"]: i for i, row in enumerate(rows)}
    for group in groups:
        group.sort(key=lambda row: (row["kind"] != "bundle", order[row["name"]]))
    return sorted(groups, key=lambda group: order[group[0]["name"]])


def line(row: Row, group: Sequence[Row]) -> dict[str, Any]:
    """A row of the headline table; the first of its group is the one whose speed is 1."""
    first, facts, latency = group[0], row["facts"], row["latency"] or {}
    longest = max((_whole(other)["p50"] for other in _timed(group)), default=0.0)
    speed = None if row is first else ((row["speedup"] or {}).get(first["name"]) or {}).get("end_to_end")
    what = row["kind"] if row["kind"] != "bundle" else str(facts.get("target") or "bundle")
    return {
        "row": row,
        "peer": row["kind"] != "bundle",
        "what": f"{what} · beam {row['decoding'].get('beam', 1)}",
        "whole": latency.get("end_to_end"),
        "share": 100 * _whole(row)["p50"] / longest if "end_to_end" in latency else 0.0,
        "speed": speed,
        "is_first": row is first,
        "encode": (latency.get("encode") or {}).get("p50"),
        "token": (latency.get("next_token") or {}).get("p50"),
        "cold": (row["cold_start"] or {}).get("seconds"),
        "rss": (row["memory"] or {}).get("peak_rss"),
        "bytes": (row["bytes"] or {}).get("total"),
        "quality": row["quality"],
    }


def against_peers(group: Sequence[Row]) -> dict[str, Any] | None:
    """How many times faster each bundle of a group is than each of its peers, JPEG → text; None without peers."""
    ours, peers = ([row for row in group if (row["kind"] == "bundle") is mine] for mine in (True, False))
    if not ours or not peers:
        return None
    cells = {
        peer["name"]: [((row["speedup"] or {}).get(peer["name"]) or {}).get("end_to_end") for row in ours]
        for peer in peers
    }
    return {"ours": [row["name"] for row in ours], "peers": cells}


def plots(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The plot of latency and CIDEr, wide and for a phone; None without two rows."""
    points = [
        Point(
            name=row["name"],
            x=_whole(row)["p50"],
            y=row["quality"]["cider"],
            low=row["quality"]["cider_interval"]["low"],
            high=row["quality"]["cider_interval"]["high"],
            size=(row["bytes"] or {}).get("total"),
            peer=row["kind"] != "bundle",
        )
        for row in _there(rows)
    ]
    if len(points) < 2:
        return None
    names, numbers = [point.name for point in points], [str(i) for i in range(1, len(points) + 1)]
    numbered = len(points) > NAMED
    return {
        "wide": pareto(points, numbers if numbered else names, width=960, height=420, largest=24),
        "narrow": pareto(points, numbers, width=340, height=340, largest=14),
        "names": names,
        "numbered": numbered,
        "largest": max((point.size or 0 for point in points), default=0),
        "peers": any(point.peer for point in points),
    }


def stage_bars(groups: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Each row's medians (s) of the stages that make up JPEG → text, and their widths in per cent of its group's
    longest, or, "own", of itself where a group's are too far apart.
    """
    bars, own = [], False
    for group in map(_timed, groups):
        mine = [{"row": row, "whole": _whole(row)["p50"], "parts": _parts(row["latency"])} for row in group]
        lengths = [max(bar["whole"], sum(bar["parts"].values())) for bar in mine]
        apart = bool(mine) and max(lengths) > 15 * min(lengths)
        own = own or apart
        for bar, length in zip(mine, lengths, strict=True):
            full = length if apart else max(lengths)
            bar["widths"] = {stage: 100 * seconds / full for stage, seconds in bar["parts"].items()}
            bar["width"] = 100 * bar["whole"] / full
        bars += mine
    return {"bars": bars, "own": own, "groups": len(groups)}


def _parts(latency: Mapping[str, Any]) -> dict[str, float]:
    """Medians (s) of preprocess, encode, first token and further tokens, as far as they are timed."""
    parts = {stage: latency[stage]["p50"] for stage in STAGES[:3] if stage in latency}
    if "decode" in latency and "first_token" in parts:
        parts["further_tokens"] = max(0.0, latency["decode"]["p50"] - parts["first_token"])
    return parts


def changed(found: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison as the page shows it: a line a row, each with its times' changes in words."""
    shown = [stage for stage in told.SHOWN if any(stage in row["stages"] for row in found["rows"])]
    rows = []
    for row in found["rows"]:
        times = [_change(row["stages"].get(stage)) for stage in shown]
        others = [told.cider(row.get("cider")), told.share(row.get("bytes")), told.share(row.get("peak_rss"))]
        reason = None if any(times) else row["reason"]  # times have their own cells
        rows.append({"name": row["name"], "times": times, "others": others, "reason": reason})
    return {
        "stages": [LABELS.get(stage, stage.replace("_", " ")) for stage in shown],
        "rows": rows,
        "since": found["created"][0],
        "notes": [*found["notes"], *([f"new: {', '.join(found['new'])}"] if found["new"] else [])],
    }


def _change(change: Mapping[str, Any] | None) -> dict[str, str] | None:
    if not change:
        return None
    figure, _, bounds = told.percent(change).partition("\n")
    word = "slower" if change["low"] > 1 else "faster" if change["high"] < 1 else "unclear"
    return {"figure": figure, "bounds": bounds, "word": word}


def captions(rows: Sequence[Row], photos: Mapping[str, str]) -> list[dict[str, Any]]:
    """Photo by photo what the rows said: each caption once, with who said it and its log-probability."""
    told_by = [row for row in _ok(rows) if row.get("captions")]
    if not told_by:
        return []
    first = told_by[0]["captions"]
    found = []
    for photo in first:
        said: dict[str, dict[str, Any]] = {}
        for row in told_by:
            if caption := row["captions"].get(photo):
                one = said.setdefault(caption["text"], {"cider": caption.get("cider"), "by": []})
                one["by"].append((row["name"], caption["logprob"]))
        for text, one in said.items():
            one["pieces"] = list(pieces(text, first[photo]["text"]))
        found.append({"id": photo, "picture": photos.get(photo), "said": list(said.values())})
    return found


def pieces(text: str, first: str) -> Iterator[tuple[str, bool]]:
    """A caption cut into runs of words, each with whether another caption lacks it."""
    words, others = text.split(), first.split()
    for op, _, _, start, stop in SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        if start < stop:
            yield " ".join(words[start:stop]), op != "equal"
