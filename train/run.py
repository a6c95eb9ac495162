"""`edgecap train` and `edgecap eval`: from a recipe, a data spec and a folder to a checkpoint, and its score."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from ..benchmarks.datasets import Dataset, open_dataset
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.tokenizer import Tokenizer
from .batches import Progress
from .checkpoint import (
    PROGRESS,
    RECIPE,
    TOKENIZER,
    base_model,
    load_checkpoint,
    model_for,
    preprocess_for,
    read_metrics,
    read_recipe,
    require_captioner,
)
from .loop import Trainer
from .lora import check_base, refuse_adapter
from .pretrained import open_tokenizer, resolve
from .report import TrainingLog
from .settings import Recipe
from .shapes import shrink_to
from .start import START, Helpers, Start, Teacher, check_helpers, load_again, read_start, with_parts, write_start
from .state import load_progress, write_bytes
from .tokenizer import caption_text, token_ids

RUNS = Path("runs")
LOCK = ".lock"
T = TypeVar("T")


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
    critic: str | None = None,
    progress: Progress = lambda phase, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Any]]:
    """Train a captioner; returns the checkpoint directory and its metrics.

    init: a checkpoint whose model, weights and tokenizer the run starts from, whatever the recipe says of them.
    teacher: a checkpoint that the stages with objective "distill" learn from. critic: a retrieval checkpoint or a CLIP
    that judges how captions fit their photos, for the stages with objective "guided" and in every validation.
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
        begun, recipe = _from_main(lambda: _open_run(recipe, data, out, resume, init, teacher, critic))
        start = read_start(out)
        tokenizer = Tokenizer.load(out / TOKENIZER).inner
        torch.manual_seed(recipe.seed)
        model = _model(recipe, token_ids(tokenizer, recipe.tokenizer.ids), out, begun, start)
        helpers = _helpers(recipe, start, tokenizer)
        log = TrainingLog(out if main else None, say)
        trainer = _trainer(recipe.task)(
            recipe, model, tokenizer, data, out, accelerator, progress, log, start=start, helpers=helpers
        )
        return out, trainer.run(begun)


def _trainer(task: str) -> type[Trainer]:
    if task == "retrieval":
        from .towers import TowersTrainer

        return TowersTrainer
    return Trainer


def _helpers(recipe: Recipe, start: Start, tokenizer: Any) -> Helpers:
    """The teacher and the critic that the run began with."""
    teacher = critic = None
    if start.teacher:
        teacher = Teacher(load_again(start.teacher, start.teacher_sha256, "teacher"), tokenizer)
        if teacher.preprocess != preprocess_for(recipe):
            raise UsageError(f"{start.teacher} sees photos in another size or form: it cannot teach this captioner")
    if start.critic:
        from .critic import Critic

        critic = Critic.load(start.critic)
        if critic.sha256 != start.critic_sha256:
            raise UsageError(f"{start.critic} has changed since this run began with it as critic: put it back")
    return Helpers(teacher, critic)


def _model(recipe: Recipe, tokens: dict[str, int], out: Path, begun: bool, start: Start) -> Any:
    """The model as the run begins or goes on: a pruned one has the shapes of its weights, an adapter its base."""
    if recipe.lora.rank:
        from .lora import add_adapters

        model, _ = base_model(recipe, tokens, start.init, start.sha256, f"the adapter of {out}")
        add_adapters(model, recipe.lora, seed=recipe.seed)
        return model
    if start.init and not begun:
        model = load_again(start.init, start.sha256, "its start").model
    else:
        model = model_for(recipe, tokens, load_weights=not begun)
    if start.pruned and begun:
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
    recipe: Recipe,
    data: Dataset,
    out: Path,
    resume: bool,
    init: Path | None,
    teacher: Path | None,
    critic: str | None,
    *,
    distills: bool = True,
) -> tuple[bool, Recipe]:
    """Has the run in `out` begun to learn? If not, its tokenizer and resolved recipe are written (anew).

    distills: whether stages that need a teacher are meant to run.
    """
    if (out / PROGRESS).is_file():
        return True, recipe
    if resume and (out / START).is_file():
        return False, recipe
    if distills:
        check_helpers(recipe, teacher, critic)
    if init is not None:
        refuse_adapter(init)
    if recipe.lora.rank:
        check_base(recipe, init, trained=distills)
    first = None if init is None else load_checkpoint(init)
    master = None if teacher is None else require_captioner(load_checkpoint(teacher))
    write_start(out, first, master, _identify(critic))
    if first is not None:
        recipe = with_parts(recipe, first)
        write_bytes(out / TOKENIZER, (first.path / TOKENIZER).read_bytes())
        write_bytes(out / RECIPE, recipe.to_toml().encode())
        return False, read_recipe(out)
    captions = (caption_text(c) for example in data.splits["train"] for c in example.captions)
    if recipe.task == "retrieval":
        from .towers import open_texts

        tokenizer, recipe = open_texts(recipe, captions)
    else:
        tokenizer, recipe = open_tokenizer(resolve(recipe), captions)
    # Built here already, so that a recipe that cannot be built leaves no run.
    tokens = token_ids(tokenizer, recipe.tokenizer.ids)
    if recipe.lora.rank:
        probe, base = base_model(recipe, tokens, "", "", f"the adapter of {out}")
        write_start(out, None, master, _identify(critic), base)
    else:
        probe = model_for(recipe, tokens, load_weights=True)
    if recipe.encoder.source:
        settings = dataclasses.replace(recipe.encoder, config=probe.encoder.settings())
        recipe = dataclasses.replace(recipe, encoder=settings)
    if recipe.task == "retrieval" and recipe.text.source:
        recipe = dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, config=probe.text.settings()))
    write_bytes(out / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    write_bytes(out / RECIPE, recipe.to_toml().encode())  # last: a folder with a recipe can be resumed
    return False, read_recipe(out)


def _identify(critic: str | None) -> tuple[str, str] | None:
    """Where a critic lies and its hash."""
    if critic is None:
        return None
    from .critic import Critic

    place = str(Path(critic).resolve()) if Path(critic).exists() else critic  # or a hub id
    return place, Critic.load(critic).sha256


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
