"""What a run starts from when it does not start from nothing: a checkpoint's weights, a teacher, a critic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import EdgecapError, UsageError
from ..runtime.progress import Progress, silent
from .checkpoint import PROGRESS, Checkpoint
from .settings import Recipe
from .state import write_json

if TYPE_CHECKING:
    from .critic import Critic
    from .teachers.captioners import CaptionTeacher
    from .teachers.words import WordTeacher

START = PROGRESS.parent / "start.json"


@dataclass(frozen=True)
class Start:
    """Kept beside the run's state, so that resuming finds the same files. `pruned`: what was pruned before; teachers:
    `path`, `sha256` and what else was told of each (see teachers.given.Given.kept)."""

    init: str = ""
    sha256: str = ""
    pruned: list[dict[str, Any]] = field(default_factory=list)
    critic: str = ""
    critic_sha256: str = ""
    teachers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Helpers:
    """Models that take part in training without learning themselves."""

    teachers: tuple[WordTeacher, ...] = ()
    critic: Critic | None = None
    progress: Progress = silent  # of what is computed before they can help
    captioners: tuple[CaptionTeacher, ...] = ()  # teachers of captions

    @property
    def all_teachers(self) -> list[WordTeacher | CaptionTeacher]:
        """Each once: those of words, and those of captions alone."""
        names = {teacher.name for teacher in self.teachers}
        return [*self.teachers, *(teacher for teacher in self.captioners if teacher.name not in names)]


ALONE = Helpers()


def check_helpers(recipe: Recipe, teachers: Sequence[str | Path], critic: str | None) -> None:
    """UsageError where a stage needs a teacher or a critic and there is none, or the other way round."""
    listening = [i for i, stage in enumerate(recipe.stages) if stage.teacher_captions]
    if listening and not teachers:
        raise UsageError(f"stages.{listening[0]}.teacher_captions needs --teacher CHECKPOINT_OR_CAPTIONER")
    for name, given, objective in (("teacher", teachers or None, "distill"), ("critic", critic, "guided")):
        learning = [i for i, stage in enumerate(recipe.stages) if stage.objective == objective]
        watched = name == "critic" and recipe.watch == "alignment"
        if learning and given is None:
            raise UsageError(f"stages.{learning[0]}.objective = {objective} needs --{name} CHECKPOINT")
        if watched and given is None:
            raise UsageError("watch = alignment needs --critic CHECKPOINT")
        if given is not None and not learning and not listening and name == "teacher":
            raise UsageError(
                f"--{name}: no stage learns from it; add --set stages.0.objective={objective}, or "
                "stages.0.teacher_captions=3"
            )


def with_parts(recipe: Recipe, init: Checkpoint) -> Recipe:
    """The recipe with the model and tokenizer that the checkpoint has."""
    if recipe.task != init.recipe.task:
        raise UsageError(
            f"{init.path} was trained for {init.recipe.task}: a run for {recipe.task} cannot start from it"
        )
    parts = {part: getattr(init.recipe, part) for part in ("tokenizer", "encoder", "bridge", "decoder", "text")}
    if (recipe.data.image_size, recipe.data.resize) != (init.recipe.data.image_size, init.recipe.data.resize):
        size, resize = init.recipe.data.image_size, init.recipe.data.resize
        raise UsageError(f"{init.path} sees photos of {size} px ({resize}): say the same in the recipe's [data]")
    return dataclasses.replace(recipe, **parts)


def write_start(
    out: Path,
    init: Checkpoint | None,
    teachers: Sequence[dict[str, Any]],
    critic: tuple[str, str] | None = None,
    base: str = "",
) -> None:
    """teachers: as of Start; critic: path or hub id, and hash. base: hash of what adapters are put on where that is no
    checkpoint."""
    if init is None and not teachers and critic is None and not base:
        (out / START).unlink(missing_ok=True)
        return
    start = Start(
        str(init.path.resolve()) if init else "",
        init.sha256 if init else base,
        list(init.metrics.get("pruned", [])) if init else [],
        *(critic or ("", "")),
        list(teachers),
    )
    write_json(out / START, dataclasses.asdict(start))


def read_start(out: Path) -> Start:
    """What `write_start` wrote; an empty Start where the run began from nothing."""
    try:
        kept = json.loads((out / START).read_text(encoding="utf-8"))
        path, sha256 = kept.pop("teacher", ""), kept.pop("teacher_sha256", "")  # before there could be several
        return Start(**({"teachers": [{"path": path, "sha256": sha256}]} if path else {}) | kept)
    except FileNotFoundError:
        return Start()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EdgecapError(f"{out / START} cannot be read ({error}): begin the run anew") from error
