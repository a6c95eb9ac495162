"""Devices, and what is in the cache, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .cache import DAY, Entry
from .cache import KINDS as CACHED
from .local import CpuFacts, cache_folder
from .profile import KINDS, Profile


def show(profiles: Iterable[Profile], facts: CpuFacts) -> None:
    """Print the profiles; a mark says which can be measured here. Below, how each kind is reached and what that lacks.
    Local ones show this machine's facts.
    """
    kinds: dict[str, str | None] = {}  # what it lacks, by its name
    console = Console()
    if not console.is_terminal:
        console.width = 100
    table = Table(box=None, pad_edge=False)
    for name in ("", "device", "ISA", "cores", "memory", "targets", "reached as"):
        table.add_column(name, justify="right" if name in ("cores", "memory") else "left")
    for profile in profiles:
        missing = profile.missing
        kinds.setdefault(profile.kind, missing)
        local = profile.kind == "local"
        cores = profile.cores or (facts.cores if local else None)
        memory = profile.memory_mb or (facts.memory_mb if local else None)
        table.add_row(
            "" if missing else "●",
            profile.name,
            facts.isa if local else profile.isa,
            str(cores or "?"),
            f"{memory / 1024:.0f} GiB" if memory else "?",
            ", ".join(profile.targets),
            KINDS[profile.kind].label,
            style="dim" if missing else None,
        )
    console.print(table, highlight=False)
    console.print("\n● can be measured as things are. How:", highlight=False)
    for kind, missing in kinds.items():
        console.print(f"  {KINDS[kind].label}: {KINDS[kind].how}", highlight=False)
        if missing:
            console.print(Padding(Text(missing, style="dim"), (0, 0, 0, 4)), highlight=False)
    console.print(f"This machine: {facts.model} ({', '.join(facts.flags) or 'no flags known'})", highlight=False)


def show_cache(entries: Sequence[Entry], now: float, deleted: bool) -> None:
    """Print what is in the cache, or was until now, by what it is for. now: seconds since 1970."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    for kind, what in CACHED.items():
        mine = [entry for entry in entries if entry.kind == kind]
        if not mine:
            continue
        table = Table(box=None, pad_edge=False)
        table.add_column("", overflow="fold")
        for name in ("MB", "unused"):
            table.add_column(name, justify="right")
        for entry in mine:
            days = max(0.0, now - entry.used) / DAY
            table.add_row(Text(entry.name), f"{entry.bytes / 1e6:,.1f}", f"{days:.0f} days")
        console.print(Text(what, style="bold"))
        console.print(table, highlight=False)
        console.print()
    size = sum(entry.bytes for entry in entries) / 1e6
    done = "deleted from" if deleted else "in"
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    console.print(Text(f"{count}, {size:,.1f} MB {done} {cache_folder()}"), soft_wrap=True)
