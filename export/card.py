"""MODEL_CARD.md: what a bundle is, where it comes from, what it costs and what not to trust it with."""

from __future__ import annotations

from typing import Any


def model_card(manifest: dict[str, Any]) -> str:
    """The card of a bundle from its manifest (without times, so that the same export writes the same card)."""
    lineage, measured = manifest["lineage"], manifest["measured"]
    recipe = lineage["checkpoint"]["recipe"]
    cider = measured["cider"]
    height, width = manifest["preprocess"]["size"]
    drop, golden = cider["drop"], measured["golden"]
    cosine = f"cosine {golden['min_cosine']:.5f}"
    missed = (
        f"- the golden pair: **missed** ({cosine}), written all the same with --force; `edgecap verify` says so too"
    )
    lines = [
        f"# {manifest['name']}",
        "",
        f"A small image captioner: one {width}×{height} picture in, one short sentence out, on the device itself.",
        f"Made by edgecap {manifest['created_with']['edgecap']} for {manifest['backend']} ({manifest['target']}).",
        "",
        "| part | what |",
        "| --- | --- |",
        f"| encoder | {recipe['encoder']['kind']}{_source(recipe['encoder'].get('source', ''))} |",
        f"| bridge | {_part(recipe['bridge'])} |",
        f"| decoder | {_part(recipe['decoder'])} |",
        f"| vocabulary | {manifest['tokens']['vocab_size']:,} tokens, {recipe['tokenizer']['kind']} |",
        f"| trained on | {lineage['data']} |",
        f"| checkpoint | SHA-256 {lineage['checkpoint']['sha256']} |",
        f"| graphs | {measured['graph_bytes']:,} bytes |",
        "",
        *usage(manifest["name"]),
        "`edgecap verify` reproduces the golden pair in this folder on any device.",
        "",
        "## Measured on this bundle",
        "",
        f"On {measured['photos']:,} photos of the {measured['split']} split of {measured['data']}"
        + (", which training\nused to choose the checkpoint:" if measured["chose_checkpoint"] else ":"),
        "",
        *([f"**Simulated**: {measured['simulated']}.", ""] if "simulated" in measured else []),
        f"- CIDEr {cider['value']:.3f} (95% interval {cider['low']:.3f} to {cider['high']:.3f});"
        f" the {measured['reference']} reference scores {cider['reference']:.3f}",
        f"- CIDEr lost by this export: {drop['mean']:+.4f} (95% interval {drop['low']:+.4f} to {drop['high']:+.4f}),"
        f" limit {cider['limit']:g}: **{measured['gate']}**"
        + (", written all the same with --force" if measured.get("forced") and measured["gate"] != "pass" else ""),
        f"- captions identical to the reference's: {measured['identical_captions']:.1%}",
        f"- teacher-forced logits against torch: cosine {measured['parity']['mean_cosine']:.5f} on average,"
        f" {measured['parity']['min_cosine']:.5f} at worst",
        *([] if golden["reproduced"] else [missed]),
        f"- distinct captions: {measured['distinct']:.1%}; with repeated n-grams: {measured['repeated_ngrams']:.1%}",
        "",
        "## What was done to it",
        "",
        *[f"- {each['name']}{_settings(each['params'])}" for each in lineage["passes"]],
        "",
        "## Limits",
        "",
        "It has seen only pictures like those it was trained on and names what it knows, wrongly where a picture",
        "shows something else. It repeats the habits of its training captions, assumptions about people included. Do",
        "not use it to identify people, or where a wrong caption can harm someone. The licences of the training",
        "pictures, and of the encoder's weights if they were given, apply to what is made from them.",
        "",
    ]
    return "\n".join(lines)


def _source(source: str) -> str:
    return f", starting from {source}" if source else ", trained from scratch"


def _part(options: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in options.items() if key != "kind")
    return options["kind"] + (f" ({settings})" if settings else "")


def _settings(params: dict[str, Any]) -> str:
    plain = ", ".join(f"{key} {value}" for key, value in params.items() if not isinstance(value, dict | list))
    return f" ({plain})" if plain else ""


def usage(name: str) -> list[str]:
    """The lines of a card that say how a bundle is run."""
    return [
        "## Use",
        "",
        "```python",
        "from edgecap.runtime import Captioner",
        "",
        f'print(Captioner.load("{name}.edgecap")("photo.jpg"))',
        "```",
        "",
    ]
