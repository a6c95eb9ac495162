"""A record as tables for the terminal, readable at 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .latency import STAGES
from .wording import (
    LABELS,
    behind_lines,
    busy,
    clock_line,
    confinement,
    interval_text,
    limits_line,
    megabytes,
    milliseconds,
    missing,
    native_lines,
    near_line,
    photos_text,
    problem_lines,
    rate_text,
    ratio_text,
    slow_lines,
    weight_lines,
)


def show(record: Mapping[str, Any]) -> None:
    """Print a record's tables to stdout, 100 columns wide where there is no terminal to ask."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(render(record), highlight=False)


def render(record: Mapping[str, Any]) -> RenderableType:
    """Everything the terminal shows of a record."""
    rows = record["rows"]
    parts: list[RenderableType] = [Text(line, style="dim") for line in _head(record)]
    if any(row["latency"] for row in rows):
        parts += [Text(), latency_table(record)]
    if any(row["speedup"] for row in rows):
        for group in sorted({row.get("group", 0) for row in rows if row["speedup"]}):
            parts += [Text(), ratio_table([row for row in rows if row.get("group", 0) == group])]
    if any(row["status"] == "ok" for row in rows):
        parts += [Text(), artifact_table(record)]
    if any(row["quality"] for row in rows):
        parts += [Text(), quality_table(record)]
    parts += [Text(), *(Text(line, style="dim") for line in _notes(record))]
    for reason, names in missing(rows).items():
        parts.append(Text(f"{', '.join(names)}: {reason}", style="red"))
    for row in rows:
        if row["status"] in ("failed", "refused"):
            failed = row["status"] == "failed"
            parts.append(Text(f"{row['name']}{' failed' * failed}: {row['error']}", style="red" if failed else "dim"))
    parts += [Text(line, style="red") for line in problem_lines(record)]
    return Group(*parts)


def _head(record: Mapping[str, Any]) -> Iterator[str]:
    cpu, settings, data = record["device"]["cpu"], record["settings"], record["data"]
    yield f"{cpu['model']}, {cpu['cores']} cores ({', '.join(cpu['flags']) or 'no flags known'})"
    threads = settings["threads"]
    names = [name for name in ("edgecap", "onnxruntime", "onnxruntime-web", "python") if name in record["versions"]]
    versions = " · ".join(f"{name} {record['versions'][name]}" for name in names)
    emulated = record["device"].get("times") == "emulated"
    runs = "emulated: times would mean nothing" if emulated else f"{settings['rounds']} interleaved rounds"
    yield f"{threads} thread{'s' * (threads != 1)}{confinement(record['device'])} · {runs} · {versions}"
    yield f"{data['spec']}, {data['split']} split, {photos_text(record)}"
    if load := busy(record["device"]):
        yield f"other work was running (load {load}): trust the ratios, not the times"
    if line := clock_line(record["device"]):
        yield line


def latency_table(record: Mapping[str, Any]) -> Table:
    """Stages of every subject, with percentiles, tokens/s, and the ratio to the first one of its group."""
    rows = [row for row in record["rows"] if row["latency"]]
    firsts = {row.get("group", 0): row["name"] for row in reversed(rows) if row["status"] == "ok"}
    compare = any(row["speedup"] for row in rows)
    table = Table(title="Time, ms, and tokens/s in decoding", title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold", max_width=26)
    table.add_column("stage")
    for column in ("p50", "p90", "p99", "min"):
        table.add_column(column, justify="right")
    if compare:
        table.add_column("times faster than\nthe first [95%]", justify="right")
    for row in rows:
        name = Text(row["name"])  # as text: a name is no markup
        first = firsts.get(row.get("group", 0))
        for stage in ("load", *STAGES):
            figures = row["latency"].get(stage)
            if figures is None:
                continue
            cells: list[str | Text] = [
                name,
                LABELS[stage],
                *(milliseconds(figures[p]) for p in ("p50", "p90", "p99", "min")),
            ]
            if compare:
                cells.append(ratio_text((row["speedup"] or {}).get(first, {}).get(stage)))
            end = stage == "end_to_end"
            table.add_row(*cells, style="bold" if end else None, end_section=end)
            name = Text()
            if stage == "next_token" and (rate := row["latency"].get("tokens_per_s")):
                table.add_row(name, "tokens/s", rate_text(rate))
    return table


def ratio_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """JPEG → text, each row of a group against each other one (the first four; the record has all)."""
    rows = [row for row in rows if row["status"] == "ok" and row["speedup"]]
    table = Table(title="JPEG → text, times faster [95%]", title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold", max_width=26)
    shown: list[str] = [row["name"] for row in rows[:4]]
    for name in shown:
        table.add_column(Text(f"than {name}"), justify="right", overflow="fold")
    for row in rows:
        ratios = [row["speedup"].get(name, {}).get("end_to_end") for name in shown]
        table.add_row(Text(row["name"]), *map(ratio_text, ratios))
    return table


def artifact_table(record: Mapping[str, Any]) -> Table:
    """Size, memory and cold start, a row per subject; without the latter two where nobody measured them."""
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    measured = any(row["memory"] or row["cold_start"] for row in rows)
    title = "Size, memory, cold start" if measured else "Size"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold", max_width=26)
    more = ("peak MB", "over idle", "cold start s", "× imports", "MB over imports") if measured else ()
    for name in ("MB", "graphs MB", *more):
        table.add_column(name, justify="right")
    for row in rows:
        size, memory, cold = row["bytes"] or {}, row["memory"] or {}, row["cold_start"] or {}
        times = cold.get("times_reference")
        cells = [megabytes(size.get("total"), 2), megabytes(size.get("graphs"), 2)]
        if measured:
            cells += [
                megabytes(memory.get("peak_rss")),
                megabytes(memory.get("over_idle")),
                f"{cold['seconds']:.2f}" if cold else "–",
                f"{times:.2f}" if times else "–",
                megabytes(cold.get("rss_over_reference")),
            ]
        table.add_row(Text(row["name"]), *cells)
    return table


def quality_table(record: Mapping[str, Any]) -> Table:
    """Caption metrics, a row per subject; with more than one, CIDEr's difference to the first."""
    rows = [row for row in record["rows"] if row["status"] == "ok" and row["quality"]]
    compare = any("cider_over_first" in row["quality"] for row in rows)
    table = Table(title="Captions", title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold", max_width=26)
    table.add_column("CIDEr [95%]", justify="right", no_wrap=True)
    if compare:
        table.add_column("− first [95%]", justify="right", no_wrap=True)
        table.add_column("same", justify="right")
    else:
        table.add_column("beam", justify="right")
    for name in ("BLEU-4", "ROUGE-L", "distinct", "repeats", *([] if compare else ["length"])):
        table.add_column(name, justify="right")
    for row in rows:
        q = row["quality"]
        cells: list[str | Text] = [Text(row["name"]), interval_text(q["cider_interval"])]
        if compare:
            difference = q.get("cider_over_first")
            cells.append(interval_text(difference, "+") if difference else "")
            cells.append(f"{q['identical_to_first']:.0%}" if "identical_to_first" in q else "")
        else:
            cells.append(str(row["decoding"].get("beam", "–")))
        cells += [
            f"{q['bleu_4']:.3f}",
            f"{q['rouge_l']:.3f}",
            f"{q['distinct']:.2f}",
            f"{q['repeated_ngrams']:.2f}",
        ]
        cells += [] if compare else [f"{q['mean_length']:.1f}"]
        table.add_row(*cells)
    return table


def _notes(record: Mapping[str, Any]) -> Iterator[str]:
    reference, rows = record["reference"], [row for row in record["rows"] if row["status"] == "ok"]
    if reference["seconds"]:
        imports = ", ".join(name.partition(".")[0] for name in reference["imports"])
        peak = f" and {megabytes(reference['peak_rss'])} MB" if reference["peak_rss"] else ""
        yield f"imports: a process that only imports {imports}: {reference['seconds']:.2f} s{peak}"
    if found := limits_line(record):
        yield found
    for row in rows:
        if row.get("near"):
            yield f"{row['name']}: {near_line(row['near'])}"
    yield from native_lines(rows)
    for row in rows:
        ratios = row.get("times_encode") or {}
        if ratios:
            decode, whole = (ratio_text(ratios.get(stage)) for stage in ("decode", "picture_to_text"))
            yield f"{row['name']}: × its encoder's time: decode {decode}, picture → text {whole}"
    yield from behind_lines(record)
    yield from weight_lines(rows)
    yield from slow_lines(record)
    beams = {row["name"]: row["decoding"].get("beam") for row in rows}
    if len(set(beams.values())) > 1:
        yield "beam: " + ", ".join(f"{name} {beam}" for name, beam in beams.items())
    elif len(rows) > 1 and any(row["latency"] for row in rows):
        yield f"beam {next(iter(beams.values()))}; ratios are paired by round, 95% bootstrap intervals"
