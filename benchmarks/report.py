"""A record as tables for the terminal, readable at 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..devices.confine import size_text
from ..runtime.errors import UsageError
from .latency import STAGES

LABELS = {
    "load": "load",
    "preprocess": "preprocess",
    "encode": "encode",
    "first_token": "first token",
    "ttft": "TTFT",
    "next_token": "per further token",
    "decode": "decode",
    "picture_to_text": "picture → text",
    "end_to_end": "JPEG → text",
}

Row = Mapping[str, Any]


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


def problem_lines(record: Mapping[str, Any]) -> list[str]:
    """What failed after the rounds."""
    return [f"after the rounds: {problem}" for problem in record.get("problems") or ()]


def missing(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The names of rows whose group was not finished, by the reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "missing":
            found.setdefault(row["error"], []).append(row["name"])
    return found


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
    load = record["device"]["load"]
    if load is not None and load > cpu["cores"] / 2 and not emulated:
        yield f"other work was running (load {load:.1f}): trust the ratios, not the times"
    if line := clock_line(record["device"]):
        yield line


def clock_line(device: Mapping[str, Any]) -> str | None:
    """What tells that the device's clock fell, in words; None where nothing does."""
    signs = (device.get("clock") or {}).get("fell") or []
    said = "; ".join(map(str, signs))
    return f"the machine slowed down: {said}: trust the ratios, not the times" if signs else None


def confinement(device: Mapping[str, Any]) -> str:
    """The cores that workers were pinned to and their memory limit, in words; empty without."""
    cores, limit = device.get("pinned") or [], device.get("memory_limit")
    pinned = f" on core{'s' * (len(cores) != 1)} {', '.join(map(str, cores))}" if cores else ""
    return pinned + (f", at most {size_text(limit['bytes'])} ({limit['enforced_by']})" if limit else "")


def against_line(found: Mapping[str, Any]) -> str:
    """How a row compares with the same bundle run natively, in words."""
    if found["error"]:
        return f"could not be compared with this machine's own run: {found['error']}"
    photos, cosine, passed = found["photos"], found["min_cosine"], found["ok"]
    return (
        f"against this machine's own run: same tokens for {found['same_tokens']} of {photos} photos, same captions for "
        f"{found['same_captions']}"
        + (f", logits' cosine ≥ {cosine:.5f}" if cosine is not None else "")
        + ("" if passed is None else ": pass" if passed else ": fail")
    )


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:#.3g}"


def megabytes(value: float | None, digits: int = 1) -> str:
    """10⁶ bytes; from a hundred on, whole ones."""
    return "–" if value is None else f"{value / 1e6:,.{digits if value < 99.95e6 else 0}f}"


def rate_text(value: float | None) -> str:
    """Tokens a second."""
    return "–" if value is None else f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


def times_text(value: float) -> str:
    return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.2g}" if value < 0.1 else f"{value:,.0f}"


def ratio_text(figures: Mapping[str, float] | None) -> str:
    if not figures:
        return ""
    return f"{times_text(figures['ratio'])} [{times_text(figures['low'])}, {times_text(figures['high'])}]"


def interval_text(figures: Mapping[str, float], sign: str = "") -> str:
    """0.473 [.452, .495]: without the zeros, so that two of these fit in a row."""
    low, high = (re.sub(r"^(-?)0\.", r"\1.", f"{figures[bound]:.3f}") for bound in ("low", "high"))
    return f"{figures['mean']:{sign}.3f} [{low}, {high}]"


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


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that ran, by the group that they were measured in, bundles before their peers, the fastest peer first."""
    groups: dict[int, list[Row]] = {}
    for row in ok(rows):
        groups.setdefault(row.get("group", 0), []).append(row)

    def order(row: Row) -> tuple[bool, float]:
        times = (row["latency"] or {}).get("end_to_end")
        return row["kind"] != "bundle", times["p50"] if times and row["kind"] != "bundle" else 0.0

    return [sorted(group, key=order) for group in groups.values()]


def ok(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok"]


def model(group: Sequence[Row]) -> str:
    """What a group's rows run."""
    return str(group[0]["facts"].get("model") or group[0]["name"])


def peers_of(row: Row, group: Iterable[Row]) -> list[Row]:
    """The peers of a group that a bundle is held against: those put beside it (the same search), and those that were
    given by hand. Of a bundle's one-graph form they are the bundle's.
    """
    names = {row["name"], row["name"].removesuffix(" fused")}
    return [p for p in group if p["kind"] != "bundle" and (not p.get("peer_of") or names.intersection(p["peer_of"]))]


def lead(row: Row, group: Iterable[Row]) -> dict[str, float] | None:
    """How many times as fast a bundle is, JPEG → text, as the peer of its own that it leads least; None without."""
    speedup = row["speedup"] or {}
    peers = peers_of(row, group)
    ratios = [ratio for peer in peers if (ratio := (speedup.get(peer["name"]) or {}).get("end_to_end"))]
    return min(ratios, key=lambda ratio: ratio["ratio"], default=None)


def write_text(text: str, path: Path, what: str) -> None:
    """Write a record as it is to be read. Raises UsageError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the {what} to {path}: {error.strerror}") from error


def captioned(row: Row) -> int:
    """How many photos a row captioned; 0 where the record does not tell."""
    return (row["quality"] or {}).get("photos") or len(row.get("captions") or ())


def photos_text(record: Mapping[str, Any]) -> str:
    """The photos of a record, and that slow rows captioned fewer of them (--slow-limit)."""
    total = record["data"]["photos"]
    counts = {captioned(row) for row in ok(record["rows"])} - {0} or {total}
    if min(counts) < max(counts):
        return f"{min(counts):,} to {max(counts):,} photos"
    return f"{total:,} photos" if total in counts else f"{max(counts):,} of {total:,} photos"


def slow_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Which rows were timed, or captioned photos, fewer times than others, because they are slow."""
    rows, total = ok(record["rows"]), record["data"]["photos"]
    if once := [row for row in rows if row.get("timed_by") == "once"]:
        yield f"{_bundles(once)}: one caption a photo and one photo a round tell all times, as each takes long"
    for count in sorted({captioned(row) for row in rows} - {0}):
        if count < total:
            yield f"{_bundles([row for row in rows if captioned(row) == count])}: {count:,} of the {total:,} photos"


def _bundles(rows: Sequence[Row]) -> str:
    """Rows by the names of the bundles among them."""
    names = [row["name"] for row in rows if row["kind"] == "bundle"]
    return ", ".join(names or [row["name"] for row in rows]) + " and peers" * (0 < len(names) < len(rows))


LIMITS = {"read_gb_s": "reads {:.1f} GB/s", "fp32_gflops": "fp32 {:.0f} GFLOP/s", "int8_gops": "int8 {:.0f} GOP/s"}


def limits_line(record: Mapping[str, Any]) -> str | None:
    """The machine's own limits in one line; None where none was measured."""
    limits, threads = record.get("limits") or {}, record["settings"]["threads"]
    parts = [text.format(limits[name]) for name, text in LIMITS.items() if limits.get(name) is not None]
    device = record["device"]
    whose = "this machine" if device.get("kind", "local") == "local" else device["name"]
    return f"{whose}'s limits with {threads} thread{'s' * (threads != 1)}: {', '.join(parts)}" if parts else None


def near_line(near: Mapping[str, Any]) -> str:
    """How near a row is to the limits, in words."""
    parts = []
    if decoder := near["decoder"]:
        rate = f"{decoder['gb_s']:.1f} GB/s, {decoder['share']:.0%} of the limit"
        parts.append(f"a token reads {megabytes(decoder['bytes'])} MB of weights at {rate}")
    if encoder := near["encoder"]:
        work = encoder["fp32_gop"] + encoder["int8_gop"]
        parts.append(f"the encoder's {work:.3g} GOP run at {encoder['share']:.0%} of the limit")
    return "; ".join(parts)


def native_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """How the rows of a device that is not this machine compare with this machine."""
    for row in rows:
        if row.get("against_native"):
            yield f"{row['name']}: {against_line(row['against_native'])}"


def weight_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What browsers had to fetch."""
    for row in rows:
        if weight := row["facts"].get("page_weight"):
            runtime, bundle = (megabytes(weight[part]) for part in ("runtime", "bundle"))
            yield f"{row['name']}: a page of {runtime} MB and {bundle} MB of bundle, compressed by gzip"


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
    yield from weight_lines(rows)
    yield from slow_lines(record)
    beams = {row["name"]: row["decoding"].get("beam") for row in rows}
    if len(set(beams.values())) > 1:
        yield "beam: " + ", ".join(f"{name} {beam}" for name, beam in beams.items())
    elif len(rows) > 1 and any(row["latency"] for row in rows):
        yield f"beam {next(iter(beams.values()))}; ratios are paired by round, 95% bootstrap intervals"
