"""What a record says, in words: for the terminal, the HTML report, the table of a README alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..devices.confine import size_text
from ..runtime.errors import UsageError
from .operators import shares

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


def busy(device: Mapping[str, Any]) -> str | None:
    """The load that other work made before anything was measured; None where it does not count."""
    load, cores = device.get("load"), device["cpu"]["cores"]
    counts = load is not None and cores and device.get("times") != "emulated"
    return f"{load:.1f}" if counts and load > cores / 2 else None


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
    names = {row["name"], row["facts"].get("of")}
    return [p for p in group if p["kind"] != "bundle" and (not p.get("peer_of") or names.intersection(p["peer_of"]))]


def lead(row: Row, group: Iterable[Row]) -> Mapping[str, float] | None:
    """How many times as fast a bundle is, JPEG → text, as the peer of its own that it leads least; None without."""
    peer = closest(row, group)
    return None if peer is None else row["speedup"][peer["name"]]["end_to_end"]


def closest(row: Row, group: Iterable[Row]) -> Row | None:
    """The peer that a bundle leads least."""
    speedup = row["speedup"] or {}
    compared = [peer for peer in peers_of(row, group) if (speedup.get(peer["name"]) or {}).get("end_to_end")]
    return min(compared, key=lambda peer: speedup[peer["name"]]["end_to_end"]["ratio"], default=None)


def behind_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Where the time goes of bundles that a peer is as fast as, beside that peer's."""
    for group in grouped(record["rows"]):
        for row in group:
            peer = closest(row, group) if row["kind"] == "bundle" else None
            if peer and row["speedup"][peer["name"]]["end_to_end"]["ratio"] < 1 and row.get("operators"):
                ours = shares(row["operators"]["decoder"])
                line = f"{row['name']} is behind {peer['name']}; a step of its decoder is {ours}"
                theirs = (peer.get("operators") or {}).get("decoder")
                yield f"{line}; of the peer's {shares(theirs)}" if theirs else line


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
            as_is = f"{megabytes(weight['as_is'])} MB of it as it is, the rest " if weight.get("as_is") else ""
            yield f"{row['name']}: a page of {runtime} MB and {bundle} MB of bundle, {as_is}compressed by gzip"
