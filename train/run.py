"""`edgecap train`: from a recipe, a data spec and a folder to a checkpoint, alone in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from ..benchmarks.datasets import Dataset, open_dataset
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.progress import Progress, silent
from ..runtime.tokenizer import Tokenizer
from .checkpoint import PROGRESS, RECIPE, TOKENIZER, read_metrics, read_recipe
from .opening import TASKS, Made, open_helpers, open_model, open_run, precision, this_process
from .report import TrainingLog
from .settings import Recipe
from .start import START, read_start

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
    teachers: Sequence[str | Path] = (),
    critic: str | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Any]]:
    """Train a captioner; returns the checkpoint directory and its metrics.

    init: a checkpoint whose model, weights and tokenizer the run starts from, whatever the recipe says of them.
    teachers: checkpoints that the stages with objective "distill" learn from, or any captioners (see
    `open_caption_teacher`) for those with teacher_captions. critic: a retrieval checkpoint or a CLIP that judges how
    captions fit their photos, for the stages with objective "guided" and in every validation.
    With `resume` the run in `out` (or the newest under runs/) goes on by its own recipe. Raises UsageError for bad
    data, recipes and folders. Where several processes train, the first decides, writes and tells.
    """
    main = this_process().is_main_process
    recipe, out = _from_main(lambda: _place(recipe, out, resume))
    with _only_run(out) if main else nullcontext():
        accelerator = Accelerator(mixed_precision=precision(recipe))
        with accelerator.main_process_first():  # which may download, and lets no other write meanwhile
            data = open_dataset(recipe.data.spec, skip_bad=recipe.data.skip_bad)
        if main:
            _tell_data(data, say)
        given = {"resume": resume, "init": init, "teachers": teachers, "critic": critic, "progress": progress}
        made = Made()
        begun, recipe = _from_main(lambda: open_run(recipe, data, out, made=made, **given))
        tokenizer, start = Tokenizer.load(out / TOKENIZER).inner, read_start(out)
        model = open_model(recipe, tokenizer, out, begun, made)
        helpers = open_helpers(recipe, start, tokenizer, progress, made)
        log = TrainingLog(out if main else None, say)
        trainer = TASKS[recipe.task].trainer(
            recipe, model, tokenizer, data, out, accelerator, progress, log, start=start, helpers=helpers
        )
        return out, trainer.run(begun)


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


def _tell_data(data: Dataset, say: Callable[[str], None]) -> None:
    sizes = ", ".join(f"{split} {len(examples):,}" for split, examples in data.splits.items())
    say(f"{data.spec}: {sizes} photos")
    if data.skipped:
        names = ", ".join(f"{name} ({why})" for name, why in data.skipped[:5])
        more = f" and {len(data.skipped) - 5} more" if len(data.skipped) > 5 else ""
        say(f"skipped {len(data.skipped)} photos: {names}{more}")
