"""Devices as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .local import CpuFacts
from .profile import KINDS, Profile


def show(profiles: Iterable[Profile], facts: CpuFacts) -> None:
    """Print the profiles; a mark says which can be measured here. Local ones show this machine's facts."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    table = Table(box=None, pad_edge=False)
    for name in ("", "device", "ISA", "cores", "memory", "targets", "reached as"):
        table.add_column(name, justify="right" if name in ("cores", "memory") else "left")
    for profile in profiles:
        local = profile.kind == "local"
        cores = profile.cores or (facts.cores if local else None)
        memory = profile.memory_mb or (facts.memory_mb if local else None)
        table.add_row(
            "●" if profile.reachable else "",
            profile.name,
            facts.isa if local else profile.isa,
            str(cores or "?"),
            f"{memory / 1024:.0f} GiB" if memory else "?",
            ", ".join(profile.targets),
            KINDS[profile.kind].label,
            style=None if profile.reachable else "dim",
        )
    console.print(table, highlight=False)
    console.print("\n● can be measured now: edgecap bench --device NAME", highlight=False)
    console.print(f"This machine: {facts.model} ({', '.join(facts.flags) or 'no flags known'})", highlight=False)
