"""Which target can hold which captioner: one table for `edgecap targets`, the docs and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from ..runtime.backends import BACKENDS
from .artifact import BuildOptions
from .targets import TARGETS


@dataclass(frozen=True)
class Row:
    """A target. refused: kind of decoder → why this target cannot hold it. missing: packages that are not installed."""

    target: str
    backend: str
    precision: str
    help: str
    extra: str
    missing: tuple[str, ...]
    runs_on: str  # a sys.platform, "" for any
    runs_here: bool
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def support() -> list[Row]:
    """Every target with every kind of decoder, in the tables' order."""
    return [_row(name) for name in TARGETS]


def decoder_kinds() -> list[str]:
    from ..train.models.decoders import DECODERS

    return list(DECODERS)


def _row(name: str) -> Row:
    target = TARGETS[name]
    refused = {}
    for kind in decoder_kinds():
        reason = target.refusal({"encoder": "mobilenet_v2", "bridge": "linear", "decoder": kind}, BuildOptions())
        if reason:
            refused[kind] = reason
    packages = dict.fromkeys((*target.packages, BACKENDS[target.backend].package))
    missing = tuple(package for package in packages if find_spec(package) is None)
    return Row(
        name,
        target.backend,
        target.precision,
        target.help,
        target.extra,
        missing,
        target.needs_system,
        target.runs_here,
        refused,
    )


def show_targets(rows: Sequence[Row]) -> None:
    """Print the table for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 120
    kinds = decoder_kinds()
    table = Table(box=None, pad_edge=False)
    for title in ("", "target", *kinds, "is"):
        table.add_column(title, no_wrap=title == "target")
    for row in rows:
        ready = not row.missing
        marks = ["no" if kind in row.refused else "yes" for kind in kinds]
        table.add_row("●" if ready else "", row.target, *marks, row.help, style=None if ready else "dim")
    console.print(table, highlight=False)
    console.print("\n● can be exported here; the others need an extra of their own:", highlight=False)
    for extra, names in _by_extra(rows).items():
        console.print(f"  pip install 'edgecap[{extra}]'  {', '.join(names)}", highlight=False, markup=False)
    for reason, names in _reasons(rows).items():
        console.print(f"{', '.join(names)}: {reason}", highlight=False, markup=False)


def as_markdown(rows: Sequence[Row]) -> str:
    """The same for any machine, as docs/targets.md."""
    kinds = decoder_kinds()
    lines = [
        "# Targets",
        "",
        "What `edgecap export --target` makes, and which decoders it can hold (`edgecap targets --markdown`).",
        "",
        "| target | is | " + " | ".join(f"`{kind}`" for kind in kinds) + " | runs on | extra |",
        "| --- | --- |" + " :-: |" * len(kinds) + " --- | --- |",
    ]
    for row in rows:
        marks = " | ".join("no" if kind in row.refused else "yes" for kind in kinds)
        where = {"": "any system", "darwin": "macOS, iOS"}.get(row.runs_on, row.runs_on)
        lines.append(f"| `{row.target}` | {row.help} | {marks} | {where} | `{row.extra}` |")
    reasons = _reasons(rows)
    if reasons:
        lines += ["", "Where it says no:", ""]
        lines += [f"- {', '.join(f'`{name}`' for name in names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def _by_extra(rows: Sequence[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.extra, []).append(row.target)
    return found


def _reasons(rows: Sequence[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.refused.values():
            names = found.setdefault(reason, [])
            if row.target not in names:
                names.append(row.target)
    return found
