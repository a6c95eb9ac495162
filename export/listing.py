"""What `edgecap export` prints when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..runtime.describe import size

if TYPE_CHECKING:
    from .from_onnx import Wrapped
    from .pipeline import Exported


def show(result: Exported, console: Console | None = None) -> None:
    """A small table of what was measured, then the notes and the bundle's place."""
    console = console or Console(highlight=False)
    measured = result.gate.measured
    cider, drop = measured["cider"], measured["cider"]["drop"]
    table = Table(title=f"{result.target}: {measured['photos']:,} photos of {measured['data']} {measured['split']}")
    table.add_column("measured")
    table.add_column("value")
    table.add_row("encoder + decoder", size(measured["graph_bytes"]))
    table.add_row("CIDEr", f"{cider['value']:.4f}  ({measured['reference']} {cider['reference']:.4f})")
    table.add_row(
        "drop", f"{drop['mean']:+.4f}  (95% {drop['low']:+.4f} to {drop['high']:+.4f}, limit {cider['limit']:g})"
    )
    table.add_row("identical captions", f"{measured['identical_captions']:.1%}")
    table.add_row("logit cosine to torch", f"{measured['parity']['mean_cosine']:.5f}")
    if "speed" in measured:
        ratios = measured["speed"]
        speeds = f"encoder {ratios['encoder']:.2f}×, caption {ratios['caption']:.2f}×  (1 thread)"
        table.add_row("speed against fp32", speeds)
    table.add_row("gate", result.gate.verdict)
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False)
    if result.path is not None:
        if not result.gate.passed:
            console.print(f"written with --force although: {result.gate.reason}", markup=False)
        console.print(str(result.path), markup=False)


def show_wrapped(result: Wrapped, console: Console | None = None) -> None:
    """The same of a bundle that was made of an export: which of its files were taken first."""
    console = console or Console(highlight=False)
    measured = result.measured
    for part, file in result.files.items():
        console.print(f"{part}: {file}", markup=False)
    golden = measured["golden"]
    same = "the same tokens" if golden["same_tokens"] else "other tokens"
    console.print(f"against the export's own graphs: {same}, logit cosine {golden['min_cosine']:.6f}", markup=False)
    if "cider" in measured:
        cider, photos = measured["cider"], f"{measured['photos']:,} photos of {measured['data']} {measured['split']}"
        console.print(f"CIDEr {cider['value']:.4f} (95% {cider['low']:.4f} to {cider['high']:.4f}) on {photos}")
    else:
        console.print(f"quality {measured['quality']}", markup=False)
    for note in result.notes:
        console.print(note, markup=False)
    console.print(str(result.path), markup=False)
