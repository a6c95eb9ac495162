"""What a comparison found, as a table for the terminal and lines for CI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .wording import LABELS

SHOWN = ("encode", "next_token", "end_to_end", "cold_start")


def show(found: Mapping[str, Any]) -> None:
    """Print the comparison's table, its notes, and a line for every row that fails, to stdout."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(render(found), highlight=False)
    for line in failures(found):
        print(line)


def show_since(found: Mapping[str, Any]) -> None:
    """Print what changed since the last record of the history, after a run's own tables."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print()
    console.print(render(found, "Since the last record: change of time [95%]"), highlight=False)


def render(found: Mapping[str, Any], title: str = "Change of time [95%]") -> RenderableType:
    """The table and notes."""
    parts: list[RenderableType] = [table(found, title)]
    parts += [Text(line, style="dim") for line in notes(found)]
    return Group(*parts)


def table(found: Mapping[str, Any], title: str) -> Table:
    """A row per subject: change of times with their intervals, of CIDEr, bytes and memory."""
    shown = [stage for stage in SHOWN if any(stage in row["stages"] for row in found["rows"])]
    shown += [stage for stage in found["stages"] if stage not in shown]
    made = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    made.add_column("", overflow="fold", max_width=26)
    for stage in shown:
        made.add_column(LABELS.get(stage, stage.replace("_", " ")), justify="right")
    for column in ("CIDEr", "bytes", "peak RSS"):
        made.add_column(column, justify="right")
    for row in found["rows"]:
        cells = [Text(row["name"])]
        for stage in shown:
            change = row["stages"].get(stage)
            cells.append(Text(percent(change), style="red" if change and change["slower"] else ""))
        cells += [Text(text) for text in (cider(row.get("cider")), share(row.get("bytes")), share(row.get("peak_rss")))]
        made.add_row(*cells)
    return made


def notes(found: Mapping[str, Any]) -> Iterator[str]:
    """How to read it, and what weakens it."""
    if len(found["created"]) == 2:
        yield f"{found['created'][0]} → {found['created'][1]}; above 0 is slower"
    yield from found["notes"]
    peers = (row for row in found["rows"] if row["reason"] and row["kind"] != "bundle")
    yield from (f"{row['name']}, not judged: {row['reason']}" for row in peers)
    if found["new"]:
        yield f"new: {', '.join(found['new'])}"


def failures(found: Mapping[str, Any]) -> Iterator[str]:
    """One line for every bundle that fails."""
    for row in found["rows"]:
        if row["reason"] and row["kind"] == "bundle":
            yield f"{row['name']}: {row['reason']}"


def percent(change: Mapping[str, float] | None) -> str:
    """+1.2% and, on a line of its own, [-0.3, 2.4]"""
    if not change:
        return "–"
    ratio, low, high = (100 * (change[key] - 1) for key in ("ratio", "low", "high"))
    return f"{ratio:+.1f}%\n[{low:.1f}, {high:.1f}]"


def share(change: Mapping[str, float] | None) -> str:
    if not change:
        return "–"
    return "same" if change["a"] == change["b"] else f"{change['ratio'] - 1:+.1%}"


def cider(change: Mapping[str, Any] | None) -> str:
    """Difference, with its paired interval where that is known."""
    if not change:
        return "–"
    if change["a"] == change["b"]:
        return "same"
    if interval := change["difference"]:
        return f"{interval['mean']:+.3f}\n[{interval['low']:.3f}, {interval['high']:.3f}]"
    return f"{change['b'] - change['a']:+.3f}"
