"""Recovery after pruning: a training run like any other, from the pruned weights, taught by the unpruned captioner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from ..runtime.progress import Progress, silent
from ..train.checkpoint import RECIPE, Checkpoint, load_checkpoint, read_metrics, read_recipe
from ..train.run import train
from ..train.settings import Recipe, Stage
from ..train.start import read_start


def recovery_stages(recipe: Recipe, epochs: int, *, taught: bool, encoder_lr: float = 0.0) -> tuple[Stage, ...]:
    """With a teacher, all epochs learn its words; without, half of them are self-critical where the recipe was so.

    A self-critical teacher passes on what it learnt: on Flickr8k, three epochs of its words gave back all that pruning
    had cost, and four self-critical ones behind them added nothing. With `encoder_lr` the encoder learns, too, to see
    as the teacher does, instead of staying still (which lets its features be cached).
    """
    words = next((stage for stage in recipe.stages if stage.objective != "scst"), Stage())
    critic = next((stage for stage in recipe.stages if stage.objective == "scst"), None)
    later = epochs // 2 if critic and not taught else 0
    plain: dict[str, Any] = {"patience": 0, "keep_every": 0, "unfreeze_blocks": 0}
    first = dataclasses.replace(
        words,
        **plain,
        name="recover",
        objective="distill" if taught else "xe",
        epochs=epochs - later,
        lr=words.lr / 2,
        encoder_lr=encoder_lr,
        match=1.0 if encoder_lr and taught else 0.0,
        batchnorm="frozen",
        warmup=min(words.warmup, 50),
        weight_decay=0.0,
        # The teacher's soft targets are all the smoothing there need be, and little is left to overfit.
        label_smoothing=0.0 if taught else words.label_smoothing,
        dropout=not taught,
        ema=min(words.ema, 0.99),
        curriculum=0,
        teacher_captions=0,  # recovering is taught by words, or not at all
    )
    if not later or critic is None:
        return (first,)
    return (first, dataclasses.replace(critic, **plain, name="recover-critic", epochs=later, encoder_lr=0.0, match=0.0))


def recover(
    pruned: Path,
    *,
    epochs: int,
    teacher: Path | None = None,
    out: Path | None = None,
    data: str | None = None,
    skip_bad: bool = False,
    encoder_lr: float = 0.0,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Fine-tune a pruned checkpoint into the run folder `out` (default: NAME-recovered beside it) and load the result.

    teacher: the unpruned checkpoint to distill from. data: default the recipe's; skip_bad: leave its bad
    examples out. The same call again goes on with a killed run and returns a finished one; `edgecap train --resume
    --out OUT` goes on, too.
    Raises UsageError where `out` holds another run.
    """
    start = load_checkpoint(pruned)
    out = out or pruned.with_name(f"{pruned.name}-recovered")
    stages = recovery_stages(start.recipe, epochs, taught=teacher is not None, encoder_lr=encoder_lr)
    recipe = dataclasses.replace(start.recipe, stages=stages)
    learnt = recipe.data
    learnt = dataclasses.replace(learnt, spec=data or learnt.spec, skip_bad=skip_bad or learnt.skip_bad)
    recipe = dataclasses.replace(recipe, data=learnt)
    resume = (out / RECIPE).is_file()
    if resume and (read_start(out).sha256 != start.sha256 or read_recipe(out) != recipe):
        raise UsageError(f"{out} holds another run: remove it, or choose another place for the recovered checkpoint")
    if not resume or not read_metrics(out).get("finished"):
        chosen = {} if resume else {"init": pruned, "teachers": [teacher] if teacher else []}
        train(None if resume else recipe, out, resume=resume, **chosen, progress=progress, say=say)
    return load_checkpoint(out)
