"""What `edgecap inspect` says of a bundle, as data and as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .bundle import Bundle


def describe(bundle: Bundle) -> dict[str, Any]:
    """Path, total bytes, identifying hash and manifest of a bundle."""
    return {
        "path": str(bundle.path),
        "bytes": bundle.bytes,
        "sha256": bundle.sha256,
        "manifest": bundle.manifest,
    }


def print_description(bundle: Bundle, console: Console) -> None:
    """Print the summary to a rich console: what it is, its files, what each pass cost, what was measured."""
    from rich.table import Table
    from rich.text import Text

    manifest = bundle.manifest
    preprocess, tokens, golden = manifest["preprocess"], manifest["tokens"], manifest["golden"]
    decoder = manifest.get("session", {})
    cache = "KV cache, in place" if "cache" in decoder else "KV cache"
    state = cache if "kv" in decoder else "recurrent state" if "state" in decoder else "none"
    height, width = preprocess["size"]
    head = Table.grid(padding=(0, 2))
    for name, value in {
        "bundle": f"{bundle.path} ({bundle.sha256[:12]})",
        "name": manifest["name"],
        "target": f"{manifest['target']}, {manifest['precision']}, backend {manifest['backend']}",
        "size": f"{size(bundle.bytes)} ({bundle.bytes:,} bytes)",
        "needs": _pairs(manifest["requires"]) or "nothing",
        "made with": _pairs(manifest.get("created_with", {})),
        "photos": f"{height}×{width}, {preprocess['mode']}, {preprocess['resample']}",
        "tokens": _pairs(tokens),
        "decoding": _pairs(manifest["decoding"]),
        "decoder": state,
        "golden": f"{len(golden['token_ids'])} tokens, {_pairs(golden['tolerance'])}",
    }.items():
        head.add_row(Text(name, style="bold"), Text(value))
    console.print(head)

    files = Table("file", "bytes", "SHA-256", title="files", title_justify="left")
    files.columns[1].justify = "right"
    for name, entry in sorted(manifest["files"].items()):
        files.add_row(Text(name), f"{entry['bytes']:,}", entry["sha256"][:12])
    console.print(files)

    lineage = manifest.get("lineage", {})
    checkpoint = lineage.get("checkpoint", {})
    if checkpoint or "data" in lineage:
        origin = str(checkpoint.get("sha256", "?"))[:12]
        text = f"from checkpoint {origin}, trained on {_value(lineage.get('data', '?'))}"
        metrics = _pairs(checkpoint.get("metrics", {}))
        console.print(Text(text + (f" ({metrics})" if metrics else "")))
    if export := lineage.get("export"):
        console.print(
            Text(f"from the ONNX export {_value(export.get('name', '?'))} ({_pairs(export.get('variants'))})")
        )
    passes = Table("pass", "parameters", "cost", title="passes", title_justify="left")
    for each in lineage.get("passes", []):
        passes.add_row(Text(each["name"]), Text(_pairs(each.get("params", {}))), Text(_pairs(each.get("cost", {}))))
    if passes.row_count:
        console.print(passes)
    if measured := manifest.get("measured"):
        table = Table("measured on this bundle", "value")
        for name, value in measured.items():
            table.add_row(Text(name), Text(_pairs(value) if isinstance(value, Mapping) else _value(value)))
        console.print(table)


def size(count: int) -> str:
    """1234567 → "1.2 MB"."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return _value(values)
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return f"({_pairs(value)})"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    return str(value)
