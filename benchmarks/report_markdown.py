"""A record as one small table in Markdown, for a README: the figures that matter, and by how much the best peer is
beaten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .quality import WORTHLESS, worthless
from .wording import (
    Row,
    behind_lines,
    clock_line,
    grouped,
    lead,
    limits_line,
    megabytes,
    milliseconds,
    model,
    photos_text,
    problem_lines,
    rate_text,
    slow_lines,
    times_text,
)

HEADS = {  # column → what it holds of a row
    "MB": lambda row: megabytes((row["bytes"] or {}).get("total")),
    "peak MB": lambda row: megabytes((row["memory"] or {}).get("peak_rss"), 0),
    "TTFT ms": lambda row: milliseconds(_median(row, "ttft")),
    "tokens/s": lambda row: rate_text((row["latency"] or {}).get("tokens_per_s")),
    "JPEG → text ms": lambda row: milliseconds(_median(row, "end_to_end")),
    "CIDEr (95%)": lambda row: _cider(row),
}


def markdown(record: Mapping[str, Any]) -> str:
    """The table: bundles, then their peers, the fastest first, group after group; each bundle with its lead over
    the peer that it leads least; below it what this was measured on, and what did not run.
    """
    groups = grouped(record["rows"])
    compared = any(row["kind"] != "bundle" for group in groups for row in group)
    heads = {name: cell for name, cell in HEADS.items() if any(cell(row) != "–" for group in groups for row in group)}
    names = ["model", "run by", *heads, *(["× the best peer (95%)"] if compared else [])]
    lines = [_line(names), "| --- | --- |" + " ---: |" * (len(names) - 2)]
    for group in groups:
        for i, row in enumerate(group):
            cells = ["" if i else _text(model(group)), _runner(row, group), *(cell(row) for cell in heads.values())]
            lines.append(_line([*cells, *([_lead(row, group)] if compared else [])]))
    return "\n".join([*lines, "", *_notes(record, heads)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value: Any) -> str:
    """A name that stays one cell, whatever a folder is called."""
    return "".join(f"\\{c}" if c in "|`*_<[\\" else c for c in str(value) if c.isprintable())


def _median(row: Row, stage: str) -> float | None:
    return ((row["latency"] or {}).get(stage) or {}).get("p50")


def _runner(row: Row, group: Sequence[Row]) -> str:
    """A bundle by its target, and its name where another of its group has that, too; a peer by its kind."""
    if row["kind"] == "bundle":
        same = [other for other in group if other["kind"] == "bundle" and _target(other) == _target(row)]
        return f"**edgecap** {_target(row)}" + (f" ({_text(row['name'])})" if len(same) > 1 else "")
    return (
        f"`{row['kind'].translate({ord(c): None for c in '|`'})}` {_text(row['facts'].get('precision') or '')}".strip()
    )


def _target(row: Row) -> str:
    facts = row["facts"]
    return _text(facts.get("target") or row["name"]) + (", pruned" if facts.get("pruned_from") else "")


def _cider(row: Row) -> str:
    quality = row["quality"]
    if not quality or worthless(quality):
        return "–"
    low, high = (quality["cider_interval"][bound] for bound in ("low", "high"))
    return f"{quality['cider']:.3f} ({low:.3f} to {high:.3f})"


def _lead(row: Row, group: Sequence[Row]) -> str:
    """Of a bundle, how many times as fast it is as the best of its peers; of peers nothing."""
    if row["kind"] != "bundle":
        return ""
    if not (least := lead(row, group)):
        return "–"
    ratio, low, high = (times_text(least[key]) for key in ("ratio", "low", "high"))
    return f"**{ratio}** ({low} to {high})"


def _notes(record: Mapping[str, Any], heads: Mapping[str, Any]) -> Iterator[str]:
    cpu, settings, data = record["device"]["cpu"], record["settings"], record["data"]
    threads = settings["threads"]
    packages = [name for name in ("edgecap", "onnxruntime") if record["versions"].get(name)]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in packages)
    flags = f" ({', '.join(cpu['flags'])})" if cpu["flags"] else ""
    yield (
        f"{cpu['model']}{flags}, {threads} thread{'s' * (threads != 1)}, {photos_text(record)} of "
        f"{_text(data['spec'].partition(':')[0])} ({_text(data['split'])}), {settings['rounds']} interleaved rounds, "
        f"medians; {versions}; {record['created'][:10]}."
    )
    for line in slow_lines(record):
        yield f"{_text(line)}."
    if line := limits_line(record):
        yield f"{line[0].upper()}{line[1:]}."
    if line := clock_line(record["device"]):
        yield f"{line[0].upper()}{line[1:]}."
    for line in behind_lines(record):
        yield f"{_text(line)}."
    if "CIDEr (95%)" in heads and any(_cider(row) == "–" for row in record["rows"] if row["quality"]):
        yield f"CIDEr –: below {WORTHLESS}, as of weights that nobody trained; their times count all the same."
    left: dict[str, list[str]] = {}
    for row in record["rows"]:
        if row["status"] != "ok":
            peer = row["kind"] != "bundle" and row["name"].startswith(f"{row['kind']} ")
            left.setdefault(row["kind"] if peer else "", []).append(row["name"].removeprefix(f"{row['kind']} "))
    if left:
        kinds = (f"{kind} ({', '.join(names)})" if kind else ", ".join(names) for kind, names in left.items())
        yield f"Did not run, each for the reason in its row of the record: {_text('; '.join(kinds))}."
    for line in problem_lines(record):
        yield f"{_text(line[0].upper() + line[1:])}."
