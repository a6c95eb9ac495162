"""`edgecap train` and `edgecap eval`: from a recipe, a data spec and a folder to a checkpoint, and its score."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from ..benchmarks.datasets import Dataset, open_dataset
from ..runtime.decode import DecodeOptions
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.tokenizer import Tokenizer
from .batches import Progress
from .cache import load_pixels
from .checkpoint import (
    PROGRESS,
    RECIPE,
    TOKENIZER,
    load_checkpoint,
    model_for,
    preprocess_for,
    read_metrics,
    read_recipe,
)
from .loop import Trainer
from .models import CaptionModel
from .recipe import load_recipe
from .report import TrainingLog
from .settings import Recipe
from .shapes import shrink_to
from .start import START, Start, Teacher, check_teacher, load_again, read_start, with_parts, write_start
from .state import load_progress, write_bytes
from .tokenizer import caption_text, token_ids, train_tokenizer
from .validate import caption_rows, score_captions

RUNS = Path("runs")
LOCK = ".lock"
T = TypeVar("T")


def prepare_recipe(
    name: str,
    *,
    data: str | None,
    encoder: str | None,
    overrides: Sequence[str],
    skip_bad: bool,
    seed: int | None,
    say: Callable[[str], None] = lambda line: None,
) -> Recipe:
    """The recipe with what the command line says on top; `say` is told what of the recipe does not count then."""
    recipe = load_recipe(name, tuple(overrides))
    if data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, spec=data))
    if skip_bad:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, skip_bad=True))
    if encoder:
        recipe = dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, source=encoder))
    if recipe.encoder.source and recipe.encoder.config:
        source = recipe.encoder.source
        if any(item.startswith("encoder.config") for item in overrides):
            raise UsageError(f"encoder {source} has a configuration of its own: leave out --set encoder.config")
        say(f"encoder {source}: its own configuration is used, not the recipe's encoder.config")
        recipe = dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, config={}))
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)


def new_run(name: str, folder: Path = RUNS) -> Path:
    """The first free `runs/NAME`, `runs/NAME-2`, …"""
    taken = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    number = 1
    while (label := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return folder / label


def latest_run(folder: Path = RUNS, *, finished: bool | None = None) -> Path | None:
    """The newest checkpoint directory under `folder`, only (un)finished ones if asked."""
    runs = [path for path in folder.glob("*") if (path / RECIPE).is_file()] if folder.is_dir() else []
    runs = [run for run in runs if finished is None or bool(read_metrics(run).get("finished")) == finished]
    return max(runs, key=lambda run: ((run / RECIPE).stat().st_mtime_ns, run.name), default=None)


def train(
    recipe: Recipe | None,
    out: Path | None,
    *,
    resume: bool = False,
    init: Path | None = None,
    teacher: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Any]]:
    """Train a captioner; returns the checkpoint directory and its metrics.

    init: a checkpoint whose model, weights and tokenizer the run starts from, whatever the recipe says of them.
    teacher: a checkpoint that the stages with objective "distill" learn from.
    With `resume` the run in `out` (or the newest under runs/) goes on by its own recipe. Raises UsageError for bad
    data, recipes and folders. Where several processes train, the first decides, writes and tells.
    """
    main = PartialState().is_main_process
    recipe, out = _from_main(lambda: _place(recipe, out, resume))
    with _only_run(out) if main else nullcontext():
        accelerator = Accelerator(mixed_precision=_precision(recipe))
        data = open_dataset(recipe.data.spec, skip_bad=recipe.data.skip_bad)
        if main:
            _tell_data(data, say)
        begun, recipe = _from_main(lambda: _open_run(recipe, data, out, resume, init, teacher))
        start = read_start(out)
        tokenizer = Tokenizer.load(out / TOKENIZER).inner
        torch.manual_seed(recipe.seed)
        model = _model(recipe, token_ids(tokenizer), out, begun, start)
        taught = None
        if start.teacher:
            taught = Teacher(load_again(start.teacher, start.teacher_sha256, "teacher"), tokenizer)
            if taught.preprocess != preprocess_for(recipe):
                raise UsageError(f"{start.teacher} sees photos in another size or form: it cannot teach this captioner")
        log = TrainingLog(out if main else None, say)
        trainer = Trainer(recipe, model, tokenizer, data, out, accelerator, progress, log, start=start, teacher=taught)
        return out, trainer.run(begun)


def _model(recipe: Recipe, tokens: dict[str, int], out: Path, begun: bool, start: Start) -> CaptionModel:
    """The model as the run begins or goes on: a pruned one has the shapes of its weights."""
    if start.init and not begun:
        return load_again(start.init, start.sha256, "its start").model
    model = model_for(recipe, tokens, load_weights=not begun)
    if start.pruned:
        tensors, _ = load_progress(out / PROGRESS)
        shrink_to(model, {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    return model


def _place(recipe: Recipe | None, out: Path | None, resume: bool) -> tuple[Recipe, Path]:
    """The recipe and the folder of a run, once it is clear that it may go on or begin there."""
    if resume:
        out = out or latest_run()
        if out is None or not (out / RECIPE).is_file():
            raise UsageError(f"nothing to resume in {out or RUNS}: start a run with edgecap train")
        recipe = read_recipe(out)
        if read_metrics(out).get("finished"):
            raise UsageError(f"{out} has finished; train anew with edgecap train --out ANOTHER")
    elif recipe is None:
        raise ValueError("a recipe is needed to start a run")
    else:
        out = out or new_run(recipe.name)
        if out.exists() and not _is_free(out):
            if (out / RECIPE).exists():
                go_on = f"continue it with --resume --out {out}"
                raise UsageError(f"{out} holds a run already: {go_on}, or give another --out")
            raise UsageError(f"{out} is not an empty folder: give another --out")
    return recipe, out


def _is_free(out: Path) -> bool:
    """Whether a run may begin in a folder that is there: it holds at most what is left of one that never learnt."""
    if not out.is_dir() or ((out / RECIPE).exists() and not (out / TOKENIZER).exists()):
        return False  # the tokenizer is written first: a recipe alone is the user's own
    left = {RECIPE, TOKENIZER, LOCK, "log", str(PROGRESS.parent), START.name}
    files = [*out.iterdir(), *(out / PROGRESS.parent).glob("*")]
    return all(path.name in left or (path.name[:1] == "." and path.suffix == ".tmp") for path in files)


@contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """Holds the folder for this run; the lock ends with the process, however that ends."""
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another process trains in {out}: wait for it, or give another --out") from error
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror or error}): give another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (out / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            out.rmdir()  # of a run that could not begin, where nothing is left but the folder


def _open_run(
    recipe: Recipe, data: Dataset, out: Path, resume: bool, init: Path | None, teacher: Path | None
) -> tuple[bool, Recipe]:
    """Has the run in `out` begun to learn? If not, its tokenizer and resolved recipe are written (anew)."""
    if (out / PROGRESS).is_file():
        return True, recipe
    if resume and (out / START).is_file():
        return False, recipe
    check_teacher(recipe, teacher)
    first = None if init is None else load_checkpoint(init)
    master = None if teacher is None else load_checkpoint(teacher)
    write_start(out, first, master)
    if first is not None:
        recipe = with_parts(recipe, first)
        write_bytes(out / TOKENIZER, (first.path / TOKENIZER).read_bytes())
        write_bytes(out / RECIPE, recipe.to_toml().encode())
        return False, read_recipe(out)
    captions = (caption_text(c) for example in data.splits["train"] for c in example.captions)
    tokenizer = train_tokenizer(captions, recipe.tokenizer)
    # Built here already, so that a recipe that cannot be built leaves no run.
    probe = model_for(recipe, token_ids(tokenizer), load_weights=True)
    if recipe.encoder.source:
        settings = dataclasses.replace(recipe.encoder, config=probe.encoder.settings())
        recipe = dataclasses.replace(recipe, encoder=settings)
    write_bytes(out / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    write_bytes(out / RECIPE, recipe.to_toml().encode())  # last: a folder with a recipe can be resumed
    return False, read_recipe(out)


def _from_main(decide: Callable[[], T]) -> T:
    """What `decide` gives, or raises, on the first process: given, or raised, on every process."""
    state = PartialState()
    if state.num_processes == 1:
        return decide()
    told: list[Any] = [None, ""]
    if state.is_main_process:
        try:
            told[0] = decide()
        except EdgecapError as error:
            told[1] = error.message
            broadcast_object_list(told)
            raise
    broadcast_object_list(told)
    if told[1]:
        raise UsageError(told[1])
    return told[0]


def _precision(recipe: Recipe | None) -> str:
    setting = recipe.mixed_precision if recipe else "auto"
    if setting != "auto":
        return setting
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "yes",
    ):
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _tell_data(data: Dataset, say: Callable[[str], None]) -> None:
    sizes = ", ".join(f"{split} {len(examples):,}" for split, examples in data.splits.items())
    say(f"{data.spec}: {sizes} photos")
    if data.skipped:
        names = ", ".join(f"{name} ({why})" for name, why in data.skipped[:5])
        more = f" and {len(data.skipped) - 5} more" if len(data.skipped) > 5 else ""
        say(f"skipped {len(data.skipped)} photos: {names}{more}")


def evaluate(
    checkpoint: Path | None,
    *,
    spec: str | None,
    split: str,
    limit: int | None,
    decoding: dict[str, Any],
    unfinished_ok: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Score a checkpoint on a split in torch, with the metrics that `edgecap bench` gives for a bundle."""
    checkpoint = checkpoint or latest_run(finished=None if unfinished_ok else True)
    if checkpoint is None:
        raise UsageError(f"no finished run under {RUNS}: train one with edgecap train, or name a checkpoint")
    loaded = load_checkpoint(checkpoint, unfinished_ok=unfinished_ok)
    data = open_dataset(spec or loaded.recipe.data.spec, skip_bad=loaded.recipe.data.skip_bad)
    if split not in data.splits or not len(data.splits[split]):
        raise UsageError(f"{data.spec} has no photos in split {split!r}; splits: {', '.join(data.splits)}")
    examples = list(data.splits[split])[:limit]
    defaults = dataclasses.asdict(loaded.recipe.decoding)
    options = DecodeOptions.from_dict({**defaults, **{k: v for k, v in decoding.items() if v is not None}})
    captions = caption_rows(
        loaded.model,
        loaded.tokenizer.inner,
        lambda part: load_pixels(examples[part], loaded.preprocess),
        len(examples),
        options,
        features=False,
        report=lambda done: progress("captions", done, len(examples)),
    )
    scores = score_captions(captions, examples)
    return {
        "checkpoint": str(checkpoint),
        "sha256": loaded.sha256,
        "data": data.spec,
        "split": split,
        "photos": len(examples),
        "decoding": dataclasses.asdict(options),
        "scores": scores.to_dict(),
        "captions": [{"id": e.id, "caption": c} for e, c in zip(examples, captions, strict=True)],
    }
