"""The table that `edgecap score` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = {
    "cider": "CIDEr",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "spice": "SPICE",
    "distinct": "distinct captions",
    "repeated_ngrams": "captions that repeat n-grams",
    "mean_length": "mean length (tokens)",
}


def show(figures: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `CaptionScores.to_dict` holds, METEOR and SPICE where they were computed."""
    table = Table(title=f"{figures['photos']} photos")
    table.add_column("metric")
    table.add_column("score", justify="right")
    interval = figures["cider_interval"]
    table.add_column(f"{interval['level']:.0%} interval", justify="right")
    for key, name in NAMES.items():
        if key not in figures:
            continue
        value = f"{figures[key]:.2f}" if key == "mean_length" else f"{figures[key]:.4f}"
        table.add_row(name, value, f"{interval['low']:.4f} – {interval['high']:.4f}" if key == "cider" else "")
    (console or Console()).print(table)
