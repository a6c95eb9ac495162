"""`edgecap prune`, and `--prune` and `--finetune`: the checkpoint that is exported instead, kept in the run, so that
it is made once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import UsageError
from ..train.checkpoint import METRICS, RECIPE, TOKENIZER, WEIGHTS, load_checkpoint, read_metrics
from ..train.tokenizer import caption_text
from .prune import parse_items, prune_checkpoint
from .prune_recover import recover

if TYPE_CHECKING:
    from ..benchmarks.datasets import Dataset
    from ..train.checkpoint import Checkpoint
    from .calibration import Calibration


@dataclass(frozen=True)
class Smaller:
    """items: what to prune (see prune.py). epochs: of fine-tuning afterwards, taught by the unpruned model; 0 = none.

    encoder_lr: learning rate of the encoder while fine-tuning, 0 = it stays as pruned. out: where the pruned checkpoint
    goes, None = a folder of its own in the run.
    """

    items: Sequence[str] = field(default_factory=tuple)
    epochs: int = 0
    encoder_lr: float = 0.0
    out: Path | None = None

    def check(self) -> None:
        """Raises UsageError for items that mean nothing, or options without the one they go with."""
        if self.items:
            parse_items(self.items)
        elif self.epochs:
            raise UsageError("--finetune goes with --prune; edgecap train --init CHECKPOINT trains on without pruning")
        if self.encoder_lr and not self.epochs:
            raise UsageError("--encoder-lr goes with --finetune EPOCHS: nothing else is trained here")


def folder_for(run: Path, smaller: Smaller) -> Path:
    """Where a pruned checkpoint lies, if not where the user says: inside the run (beside it, it would be the newest
    run), named after the items."""
    return smaller.out or run / "pruned" / re.sub(r"[^a-z0-9.]+", "-", ",".join(smaller.items).lower().replace("=", ""))


def make_smaller(
    loaded: Checkpoint,
    smaller: Smaller,
    dataset: Dataset,
    calibration: Calibration,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None] = lambda line: None,
    *,
    skip_bad: bool = False,
) -> Checkpoint:
    """Prune a checkpoint, and fine-tune it if asked. What an earlier export made from the same weights by
    the same photos is taken again. skip_bad: as the data set was opened.

    Raises UsageError where something else lies in the folder.
    """
    if smaller.epochs and not loaded.finished:
        raise UsageError(f"--finetune is taught by {loaded.path}, whose training has not finished; leave it out")
    folder = folder_for(loaded.path, smaller)
    if (folder / RECIPE).is_file():  # written last
        record = (read_metrics(folder).get("pruned") or [{}])[-1]
        photos, data = len(calibration.pixels), dataset.fingerprint
        if record.get("from") != loaded.sha256:
            raise UsageError(f"{folder} was not pruned from these weights: remove it, or move it elsewhere")
        if record.get("items") != list(smaller.items):
            others = ",".join(record.get("items", []))
            raise UsageError(f"{folder} holds what {others} left: remove it, or give another place")
        if (record.get("photos", photos), record.get("data_fingerprint", data)) != (photos, data):
            raise UsageError(
                f"{folder} was pruned by other photos: remove it, or use the --data and --calibration of then"
            )
    else:
        for left in () if smaller.out else (WEIGHTS, TOKENIZER, METRICS):  # by an export that was killed
            (folder / left).unlink(missing_ok=True)
        corpus = [caption_text(text) for example in dataset.splits["train"] for text in example.captions]
        prune_checkpoint(
            loaded,
            smaller.items,
            pixels=calibration.pixels,
            captions=calibration.captions,
            corpus=corpus,
            out=folder,
            fingerprint=dataset.fingerprint,
            progress=progress,
        )
    if not smaller.epochs:
        return load_checkpoint(folder)
    return recover(
        folder,
        epochs=smaller.epochs,
        teacher=loaded.path,
        out=folder.with_name(f"{folder.name}-finetuned{smaller.epochs}"),
        data=dataset.spec,
        skip_bad=skip_bad,
        encoder_lr=smaller.encoder_lr,
        progress=progress,
        say=say,
    )
