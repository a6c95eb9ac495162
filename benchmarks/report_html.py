"""A record as one HTML file that needs nothing else: no network, no script, no font. report.html.jinja is its shape."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from typing import Any

from ..runtime.errors import need
from . import changes as told
from .operators import CAPTIONS, SHOWN, shares
from .plots import Point, pareto
from .quality import WORTHLESS, Photo, worthless
from .wording import (
    LABELS,
    Row,
    behind_lines,
    busy,
    clock_line,
    grouped,
    lead,
    limits_line,
    megabytes,
    milliseconds,
    model,
    native_lines,
    ok,
    peers_of,
    photos_text,
    problem_lines,
    rate_text,
    ratio_text,
    slow_lines,
    times_text,
    weight_lines,
)

STAGES = ("preprocess", "encode", "first_token", "further_tokens")
STAGE_LABELS = {"further_tokens": "further tokens"} | LABELS
NAMED = 10  # dots of the plot that bear their names; with more of them, and on a phone, they bear numbers
TOGETHER = 12  # photos shown at once; the others unfold
THUMBNAIL = 256  # px, the longer side


def require_jinja() -> None:
    """Raise MissingExtra, before anything is measured, where the report cannot be made."""
    need("jinja2", extra="bench", command="edgecap bench --report")


def thumbnail(photo: Photo) -> str:
    """A photo as a small data: URI. It must decode."""
    from ..runtime.preprocess import load_image

    picture = load_image(photo.path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def html(
    record: Mapping[str, Any],
    *,
    changes: Mapping[str, Any] | None = None,
    alone: str | None = None,
    photos: Mapping[str, str] | None = None,
) -> str:
    """The HTML of a record. changes: against the last one (compare.compare); alone: why there is none to compare
    with. photos: id → data: URI of those that shall be in it.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "ms": milliseconds,
        "mb": megabytes,
        "rate": rate_text,
        "ratio": ratio_text,
        "times": times_text,
        "shares": shares,
    }
    template = environment.from_string((folder / "report.html.jinja").read_text(encoding="utf-8"))
    rows = record["rows"]
    groups = grouped(rows)
    return template.render(
        record=record,
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        head=headline(record, groups),
        photos_said=photos_text(record),
        problems=problem_lines(record),
        protocol=protocol(record),
        notes=[*native_lines(rows), *weight_lines(rows), *slow_lines(record), *behind_lines(record)],
        groups=[[line(row, group) for row in group] for group in groups],
        models=[model(group) for group in groups],
        failed=[row for row in rows if row["status"] not in ("ok", "refused")],
        refused=[row for row in rows if row["status"] == "refused"],
        against=against_peers(groups),
        plots=plots(rows),
        stages=stage_bars(groups),
        stage_labels=STAGE_LABELS,
        limits=limits_line(record),
        clock=clock_line(record["device"]),
        near=[row for row in rows if row.get("near")],
        over=any((row["near"]["decoder"] or {"share": 0})["share"] > 1 for row in rows if row.get("near")),
        operators=[row for row in rows if row.get("operators")],
        shown=SHOWN,
        operators_of=CAPTIONS,
        changes=changes and changed(changes),
        alone=alone,
        captions=captions(groups, photos or {}),
        together=TOGETHER,
        worthless=WORTHLESS,
    )


def _there(rows: Iterable[Row]) -> list[Row]:
    """Timed rows of the device itself, without those that --native puts beside it."""
    return [row for row in _timed(rows) if row["facts"].get("on") != "native"]


def _timed(rows: Iterable[Row]) -> list[Row]:
    """Rows that ran where times mean something: not under emulation."""
    return [row for row in ok(rows) if (row["latency"] or {}).get("end_to_end")]


def _whole(row: Row) -> dict[str, float]:
    """Times from JPEG to text."""
    return row["latency"]["end_to_end"]


def headline(record: Mapping[str, Any], groups: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """What stands at the top: which bundle is fastest and which captions best, or of several groups what the first
    bundle of each leads its best peer by; and whether the machine was busy. beam: of all rows, None where they differ.
    """
    ours = [row for row in _there(record["rows"]) if row["kind"] == "bundle"]
    beams = {row["decoding"].get("beam", 1) for row in ok(record["rows"])}
    found: dict[str, Any] = {"fastest": None, "best": None, "busy": busy(record["device"]), "leads": []}
    found["beam"] = beams.pop() if len(beams) == 1 else None
    if len(groups) > 1:
        both = ((group[0], lead(group[0], group)) for group in groups)
        found["leads"] = [(row["name"], ratio) for row, ratio in both if ratio]
    if ours:
        found["fastest"] = min(ours, key=lambda row: _whole(row)["p50"])
        judged = [row for row in ours if row["quality"]]
        found["best"] = max(judged, key=lambda row: row["quality"]["cider"], default=None)
    return found


def short(row: Row, group: Sequence[Row]) -> str:
    """A row's name inside of its group: of a peer its kind and precision, where no other one has those."""
    if row["kind"] == "bundle":
        return str(row["name"])
    said = [f"{other['kind']} {other['facts'].get('precision') or ''}".strip() for other in group]
    mine = said[next(i for i, other in enumerate(group) if other is row)]
    return mine if said.count(mine) == 1 else str(row["name"])


def line(row: Row, group: Sequence[Row]) -> dict[str, Any]:
    """A row of the headline table; the first of its group is the one whose speed is 1."""
    first, facts, latency = group[0], row["facts"], row["latency"] or {}
    longest = max((_whole(other)["p50"] for other in _timed(group)), default=0.0)
    speed = None if row is first else ((row["speedup"] or {}).get(first["name"]) or {}).get("end_to_end")
    return {
        "row": row,
        "name": short(row, group),
        "peer": row["kind"] != "bundle",
        "target": facts.get("target"),
        "beam": row["decoding"].get("beam", 1),
        "whole": latency.get("end_to_end"),
        "share": 100 * _whole(row)["p50"] / longest if "end_to_end" in latency else 0.0,
        "speed": speed,
        "is_first": row is first,
        "ttft": (latency.get("ttft") or {}).get("p50"),
        "rate": latency.get("tokens_per_s"),
        "cold": (row["cold_start"] or {}).get("seconds"),
        "rss": (row["memory"] or {}).get("peak_rss"),
        "bytes": (row["bytes"] or {}).get("total"),
        "quality": row["quality"],
    }


def against_peers(groups: Sequence[Sequence[Row]]) -> dict[str, Any] | None:
    """How many times as fast each bundle is as each of its own peers, JPEG → text, "least" being the best of them; a
    line for each kind and precision of peers, over all groups. None without peers.
    """
    ours: list[str] = []
    columns: list[dict[str, Mapping[str, Any]]] = []
    for group in groups:
        peered = any(row["kind"] != "bundle" for row in group)
        for row in (row for row in group if peered and row["kind"] == "bundle"):
            speedup, mine, least = row["speedup"] or {}, peers_of(row, group), lead(row, group)
            ratios = {short(peer, mine): (speedup.get(peer["name"]) or {}).get("end_to_end") for peer in mine}
            ours.append(row["name"])
            columns.append({name: {**ratio, "least": ratio is least} for name, ratio in ratios.items() if ratio})
    lines = dict.fromkeys(name for column in columns for name in column)
    cells = {name: [column.get(name) for column in columns] for name in lines}
    return {"ours": ours, "peers": cells} if cells else None


def protocol(record: Mapping[str, Any]) -> str:
    """How the rows of a record were timed, with the counts that it has."""
    settings, rows = record["settings"], ok(record["rows"])
    timed = [row for row in rows if row["latency"]]
    once = sum(row.get("timed_by") == "once" for row in timed)
    rounds = f"{settings['rounds']} interleaved rounds (A B A B …)"
    usual = f"{settings['warmup']} photos of warm-up, at least {settings['min_runs']} photos and "
    usual += f"{settings['min_seconds']:g} s each"
    slow = "one caption a photo and one photo a round, after one of warm-up"
    if once and once == len(timed):
        said = f"{rounds}, {slow}"
    else:
        said = f"{rounds} after {usual}" + (f"; where every caption of a group takes long, {slow}" if once else "")
    starts = {len(row["cold_start"]["runs"]) for row in rows if row["cold_start"]} or {settings["cold_starts"]}
    few = f"{min(starts)} to {max(starts)}" if len(starts) > 1 else str(max(starts))
    return (
        f"Every subject in a process of its own; {said}. Ratios are paired by round, with bootstrap intervals. Cold "
        f"start: process start to first caption, {'once' if starts == {1} else f'the median of {few}'}."
    )


AREAS: dict[str, Callable[[Row], int | None]] = {
    "the size on disk": lambda row: (row["bytes"] or {}).get("total"),
    "the peak of memory": lambda row: (row["memory"] or {}).get("peak_rss"),
}


def plots(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The plot of latency and CIDEr, wide and for a phone; None without two rows. Areas are bytes on disk, or memory
    where some row is no file of its own (torch's, which read a checkpoint).
    """
    shown = [row for row in _there(rows) if row["quality"] and not worthless(row["quality"])]
    what, size = next(
        ((name, of) for name, of in AREAS.items() if all(map(of, shown))),
        next(iter(AREAS.items())),
    )
    points = [
        Point(
            name=row["name"],
            x=_whole(row)["p50"],
            y=row["quality"]["cider"],
            low=row["quality"]["cider_interval"]["low"],
            high=row["quality"]["cider_interval"]["high"],
            size=size(row),
            peer=row["kind"] != "bundle",
        )
        for row in shown
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
        "left_out": any(row["quality"] and worthless(row["quality"]) for row in _there(rows)),
        "largest": max((point.size or 0 for point in points), default=0),
        "area": what,
        "peers": any(point.peer for point in points),
    }


def stage_bars(groups: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Each row's medians (s) of the stages that make up JPEG → text, and their widths in per cent of its group's
    longest, or, "own", of itself where a group's are too far apart.
    """
    bars, own = [], False
    for group in map(_timed, groups):
        mine: list[dict[str, Any]] = [
            {"row": row, "name": short(row, group), "whole": _whole(row)["p50"], "parts": _parts(row["latency"])}
            for row in group
        ]
        if mine:
            mine[0]["heading"] = model(group)
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


def captions(groups: Sequence[Sequence[Row]], photos: Mapping[str, str]) -> list[dict[str, Any]]:
    """Photo by photo and group by group what the rows said: each caption once, with the bundles that said it and their
    log-probabilities, the peers that did, and its words that the group's first row did not say.
    """
    told_by = [told for group in groups if (told := [row for row in group if row.get("captions")])]
    found = []
    for photo in dict.fromkeys(photo for group in told_by for row in group for photo in row["captions"]):
        parts = []
        for group in told_by:
            said: dict[str, dict[str, Any]] = {}
            for row in group:
                if caption := row["captions"].get(photo):
                    new = {"cider": caption.get("cider"), "bundles": [], "peers": []}
                    one = said.setdefault(caption["text"], new)
                    if row["kind"] == "bundle":
                        one["bundles"].append((row["name"], caption["logprob"]))
                    else:
                        one["peers"].append(short(row, group))
            for text, one in said.items():
                one["pieces"] = list(pieces(text, next(iter(said))))
            if said:  # slow groups may have captioned fewer photos
                parts.append({"model": model(group) if len(told_by) > 1 else None, "said": list(said.values())})
        found.append({"id": photo, "picture": photos.get(photo), "groups": parts})
    return found


def pieces(text: str, first: str) -> Iterator[tuple[str, bool]]:
    """A caption cut into runs of words, each with whether another caption lacks it."""
    words, others = text.split(), first.split()
    for op, _, _, start, stop in SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        if start < stop:
            yield " ".join(words[start:stop]), op != "equal"
