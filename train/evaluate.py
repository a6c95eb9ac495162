"""`edgecap eval`: a checkpoint's score on a split, in torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..benchmarks.datasets import Example, open_dataset
from ..runtime.decode import DecodeOptions
from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from .checkpoint import Checkpoint, load_checkpoint
from .data.cache import load_pixels
from .lora import refuse_adapter, require_adapter, switch_off
from .run import RUNS, latest_run
from .validate import caption_rows, most_frequent_caption, score_captions

NO_ADAPTER = "none"


def evaluate(
    checkpoint: Path | None,
    *,
    spec: str | None,
    split: str,
    limit: int | None,
    decoding: dict[str, Any],
    adapter: Path | None = None,
    critic: str | None = None,
    unfinished_ok: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score a checkpoint on a split in torch, with the metrics that `edgecap bench` gives for a bundle.

    adapter: a run whose adapter the checkpoint, its base, gets first (none: the base it was trained on); "none": an
    adapter run without its own. critic: see `run.train`. checkpoint: None is the newest finished run.
    """
    loaded, record = _load(checkpoint, adapter, unfinished_ok)
    if loaded.recipe.task == "retrieval" and (critic or any(value is not None for value in decoding.values())):
        raise UsageError(
            f"{loaded.path} is a retrieval model and says no captions: leave out --beam, --length-penalty and --critic"
        )
    data = open_dataset(spec or loaded.recipe.data.spec, skip_bad=loaded.recipe.data.skip_bad)
    if split not in data.splits or not len(data.splits[split]):
        raise UsageError(f"{data.spec} has no photos in split {split!r}; splits: {', '.join(data.splits)}")
    examples = list(data.splits[split])[:limit]
    record |= {"data": data.spec, "split": split, "photos": len(examples)}
    if loaded.recipe.task == "retrieval":
        from .towers import score_retrieval

        return {**record, "scores": score_retrieval(loaded, examples, progress)}
    judge = None
    if critic is not None:  # before the captions: a critic that cannot be loaded is told at once
        from .critic import Critic

        judge = Critic.load(critic)
    said = _captions(loaded, examples, decoding, progress)
    record |= said
    captions = [line["caption"] for line in said["captions"]]
    scores = score_captions(captions, examples).to_dict()
    blind = most_frequent_caption(data.splits["train"])
    scores["most_frequent"] = {"caption": blind, "cider": score_captions([blind] * len(examples), examples).cider}
    if judge is not None:
        from .critic import alignment_scores

        scores["alignment"] = alignment_scores(judge, captions, examples, data, progress)
    return {**record, "scores": scores}


def _load(checkpoint: Path | None, adapter: Path | None, unfinished_ok: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """What is scored, and how the record names it."""
    if adapter is not None and str(adapter) != NO_ADAPTER:
        require_adapter(adapter)
        if checkpoint is not None:
            refuse_adapter(checkpoint)
        moved = f"name where it is: edgecap eval BASE --adapter {adapter}"
        loaded = load_checkpoint(adapter, unfinished_ok=unfinished_ok, base=checkpoint, moved=moved)
        base = loaded.metrics["base"]
        place = checkpoint or base["checkpoint"] or loaded.recipe.decoder["source"]
        record = {"checkpoint": str(place), "sha256": base["sha256"]}
        return loaded, {**record, "adapter": str(adapter), "adapter_sha256": loaded.sha256}
    checkpoint = checkpoint or latest_run(finished=None if unfinished_ok else True)
    if checkpoint is None:
        raise UsageError(f"no finished run under {RUNS}: train one with edgecap train, or name a checkpoint")
    if adapter is not None:
        require_adapter(checkpoint)
    moved = f"name where it is: edgecap eval BASE --adapter {checkpoint}"
    loaded = load_checkpoint(checkpoint, unfinished_ok=unfinished_ok, moved=moved)
    record = {"checkpoint": str(checkpoint), "sha256": loaded.sha256}
    if adapter is not None:
        switch_off(loaded.model)
        record |= {"sha256": loaded.metrics["base"]["sha256"], "adapter": NO_ADAPTER}
    return loaded, record


def _captions(
    loaded: Checkpoint, examples: list[Example], decoding: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    defaults = dataclasses.asdict(loaded.recipe.decoding)
    options = DecodeOptions.from_dict({**defaults, **{k: v for k, v in decoding.items() if v is not None}})
    captions = caption_rows(
        loaded.model,
        loaded.tokenizer.inner,
        lambda part: load_pixels(examples[part], loaded.preprocess),
        len(examples),
        options,
        ids=loaded.recipe.tokenizer.ids,
        report=lambda done: progress("captions", done, len(examples)),
    )
    return {
        "decoding": dataclasses.asdict(options),
        "captions": [{"id": e.id, "caption": c} for e, c in zip(examples, captions, strict=True)],
    }


def score_lines(record: dict[str, Any]) -> list[str]:
    """A record of `evaluate` for people."""
    scores = record["scores"]
    adapter = record.get("adapter", "")
    with_adapter = f" with the adapter of {adapter}" if adapter else ""
    if adapter == NO_ADAPTER:
        with_adapter = " without its adapter"
    first = f"{record['checkpoint']}{with_adapter} on {record['data']}, {record['split']}, {record['photos']:,} photos:"
    if "image_to_text" in scores:
        from .towers import retrieval_lines

        return [first, *retrieval_lines(scores)]
    low, high = scores["cider_interval"]["low"], scores["cider_interval"]["high"]
    lines = [
        first,
        f"  CIDEr    {scores['cider']:.4f}  (95% {low:.4f} to {high:.4f})",
        f"  BLEU-4   {scores['bleu_4']:.4f}    ROUGE-L {scores['rouge_l']:.4f}",
        f"  distinct {scores['distinct']:.1%}   repeated n-grams {scores['repeated_ngrams']:.1%}",
        f"  without looking, “{scores['most_frequent']['caption']}” for every photo: CIDEr "
        f"{scores['most_frequent']['cider']:.4f}",
    ]
    if "alignment" in scores:
        from .critic import alignment_lines

        lines += alignment_lines(scores["alignment"])
    return lines
