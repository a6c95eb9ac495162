"""MODEL_CARD.md of a bundle that was made of somebody else's export."""

from __future__ import annotations

from typing import Any

from .card import usage


def card(manifest: dict[str, Any]) -> str:
    """The card from the manifest."""
    made, measured, frames = manifest["lineage"]["export"], manifest["measured"], manifest["frames"]
    lines = [
        f"# {manifest['name']}",
        "",
        f"A {made['model_type']} that says what is in a picture, on the device itself, for ONNX Runtime.",
        f"Made by edgecap {manifest['created_with']['edgecap']} of an ONNX export, {made['name']}, without changing",
        "its weights: its licence and its model card apply.",
        "",
        "| part | what |",
        "| --- | --- |",
        *(f"| {part} | {variant} |" for part, variant in made["variants"].items()),
        f"| frames | {frames['side']}×{frames['side']}, {'split into tiles' if frames['split'] else 'one a picture'} |",
        f"| asked | {made['chat']} |",
        f"| graphs | {measured['graph_bytes']:,} bytes |",
        "",
        *usage(manifest["name"]),
        "`edgecap verify` compares it with the golden pair in this folder, which the export's own graphs gave.",
        "",
        "## Measured on this bundle",
        "",
        "- logits against the export's own graphs on the golden picture: cosine"
        f" {measured['golden']['min_cosine']:.5f} at worst",
    ]
    if "cider" in measured:
        cider = measured["cider"]
        lines.append(
            f"- CIDEr {cider['value']:.3f} (95% interval {cider['low']:.3f} to {cider['high']:.3f}) on"
            f" {measured['photos']:,} photos of the {measured['split']} split of {measured['data']}"
        )
    else:
        lines.append(f"- quality: {measured['quality']}")
    return "\n".join([*lines, ""])
