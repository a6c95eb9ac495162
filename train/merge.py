"""`edgecap merge`: bakes a run's adapter into its base, an ordinary checkpoint, and proves that it says the same."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..benchmarks.datasets import Example, open_dataset
from ..runtime.bundle import folder_beside
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.progress import Progress, silent
from .checkpoint import METRICS, RECIPE, TOKENIZER, Checkpoint, load_checkpoint, read_metrics, read_recipe
from .data.batches import Batch, encode_captions
from .data.cache import load_pixels
from .lora import merged_tensors, take_off
from .models import CaptionModel
from .settings import Lora
from .state import WEIGHTS, write_bytes, write_json, write_tensors

TOLERANCE = 1e-4  # of the largest logit: sums of floats in another order, nothing more
SAME = 0.999  # share of words of which the likeliest must stay the likeliest
PHOTOS, BATCH = 64, 4


def merge_adapter(
    run: Path,
    out: Path | None = None,
    *,
    base: Path | None = None,
    data: str | None = None,
    photos: int = PHOTOS,
    progress: Progress = silent,
) -> tuple[Path, dict[str, Any]]:
    """Write the merged checkpoint (default RUN-merged) and return its place and what was measured.

    W + alpha / rank · B A in float32, for a 4-bit run into the weights that were quantized. What is written is loaded
    again and compared with base and adapter on validation photos, their captions teacher-forced; beyond `TOLERANCE` or
    `SAME` it is removed. base: where the run's base lies now. data: spec, default what the run was trained on.
    Raises UsageError for what cannot be merged as asked, EdgecapError where the proof fails.
    """
    named = run if run.name not in ("", "..") else run.resolve()
    out = out or named.with_name(f"{named.resolve().name}-merged")
    _check(run, out)
    loaded = load_checkpoint(run, base=base, full_precision=True, moved="say where it is with --base")
    examples = _photos(loaded, data, photos)
    with folder_beside(out) as folder:
        write_tensors(folder / WEIGHTS, merged_tensors(loaded.model), {"format": "pt"})
        write_bytes(folder / RECIPE, dataclasses.replace(loaded.recipe, lora=Lora()).to_toml().encode())
        write_bytes(folder / TOKENIZER, (run / TOKENIZER).read_bytes())
        metrics = _metrics(loaded)
        write_json(folder / METRICS, metrics)
        merged = load_checkpoint(folder)
        proof = compare(loaded, merged.model, examples, progress)
        if proof["max_difference"] > TOLERANCE * proof["largest_logit"] or proof["same_argmax"] < SAME:
            raise EdgecapError(
                f"nothing written: merged logits differ by {proof['max_difference']:.1e} of up to "
                f"{proof['largest_logit']:.1f}, {proof['same_argmax']:.2%} of the likeliest words are the same: use "
                f"{run} with its adapter"
            )
        metrics["merged"]["proof"] = proof
        if loaded.recipe.lora.bits:
            learnt = load_checkpoint(run, on=take_off(loaded.model))
            metrics["merged"]["from_4_bits"] = compare(learnt, merged.model, examples, progress)
        write_json(folder / METRICS, metrics)
        try:
            os.replace(folder, out)
        except OSError as error:
            raise EdgecapError(f"{out} cannot be written ({error.strerror or error}): choose another place") from error
    return out, metrics["merged"]


def merge_line(merged: dict[str, Any]) -> str:
    """What `merge_adapter` measured, for people."""
    proof = merged["proof"]
    line = (
        f"the merged model gives the adapter's logits within {proof['max_difference']:.1e} of up to "
        f"{proof['largest_logit']:.1f}, and {proof['same_argmax']:.2%} of the same likeliest words "
        f"({proof['photos']} photos, {proof['words']:,} words)"
    )
    if quantized := merged.get("from_4_bits"):
        line += (
            f"; its weights are not the 4-bit ones it learnt on: from those it differs by up to "
            f"{quantized['max_difference']:.1e}, with {quantized['same_argmax']:.2%} of the same likeliest words"
        )
    return line


def _check(run: Path, out: Path) -> None:
    if not (run / RECIPE).is_file():
        raise UsageError(f"{run} is not a checkpoint: {RECIPE} is missing (edgecap train makes one)")
    if "merged" in read_metrics(run):
        raise UsageError(f"{run} is merged already: use it as it is")
    if not read_recipe(run).lora.rank:
        raise UsageError(f"{run} has no adapter to merge: it was trained without [lora]")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: remove it, or give another -o")


def _photos(loaded: Checkpoint, data: str | None, photos: int) -> list[Example]:
    learnt = loaded.recipe.data
    dataset = open_dataset(data or learnt.spec, skip_bad=learnt.skip_bad)
    examples = list(dataset.splits.get("val", ()))[:photos]
    if not examples:
        raise UsageError(f"{dataset.spec} has no photos in split 'val' to compare on; give --data SPEC")
    return examples


def _metrics(loaded: Checkpoint) -> dict[str, Any]:
    """A finished checkpoint's metrics, with where it is from. What a 4-bit run scored is not this model's score."""
    metrics, lora = loaded.metrics, loaded.recipe.lora
    kept = {key: metrics[key] for key in ("train_photos", "val_photos", "pruned") if key in metrics}
    parameters = {
        name: sum(p.numel() for key, p in part.named_parameters() if ".lora_" not in key)
        for name, part in loaded.model.parts().items()
    }
    place = metrics["base"]["checkpoint"] or loaded.recipe.decoder.get("source", "")
    origin = {
        "base": {"name": Path(place).name, "sha256": metrics["base"]["sha256"]},
        "adapter": {"name": loaded.path.resolve().name, "sha256": loaded.sha256, **dataclasses.asdict(lora)},
    }
    best = None if lora.bits else metrics.get("best")
    return {"finished": True, "best": best, **kept, "parameters": parameters, "merged": origin}


@torch.inference_mode()
def compare(
    loaded: Checkpoint, other: CaptionModel, examples: list[Example], progress: Progress = lambda *phase: None
) -> dict[str, Any]:
    """Logits of two models for the same photos and captions, teacher-forced: the largest absolute difference, the
    largest logit, and the share of positions with the same argmax."""
    recipe, theirs = loaded.recipe, loaded.model.eval()
    most = min(recipe.data.captions_per_photo, max(len(example.captions) for example in examples))
    ids = encode_captions(
        examples, loaded.tokenizer.inner, max_length=recipe.tokenizer.max_length, captions=most,
        ids=recipe.tokenizer.ids,
    )  # fmt: skip
    other.eval()
    furthest = largest = 0.0
    words = same = 0
    for start in range(0, len(examples), BATCH):
        part = slice(start, start + BATCH)
        pixels = torch.from_numpy(np.array(load_pixels(examples[part], loaded.preprocess)))
        batch = Batch(torch.from_numpy(ids[part]), np.arange(len(pixels)), pixels)
        one, two = (model(batch.inputs, batch.keep, **batch.view).float() for model in (theirs, other))  # [K, V]
        furthest = max(furthest, float((one - two).abs().max()))
        largest = max(largest, float(one.abs().max()))
        words, same = words + len(one), same + int((one.argmax(-1) == two.argmax(-1)).sum())
        progress("comparing logits", min(start + BATCH, len(examples)), len(examples))
    return {
        "photos": len(examples), "words": words, "max_difference": furthest, "largest_logit": largest,
        "same_argmax": same / words,
    }  # fmt: skip
