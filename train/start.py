"""What a run starts from when it does not start from nothing: a checkpoint's weights, a teacher, a critic."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..runtime.errors import EdgecapError, UsageError
from .batches import Batch, Progress
from .checkpoint import PROGRESS, Checkpoint, load_checkpoint, preprocess_for
from .models import CaptionModel
from .settings import Recipe
from .state import write_json

if TYPE_CHECKING:
    from .critic import Critic

START = PROGRESS.parent / "start.json"


@dataclass(frozen=True)
class Start:
    """Kept beside the run's state, so that resuming finds the same files. `pruned`: what was pruned before."""

    init: str = ""
    sha256: str = ""
    teacher: str = ""
    teacher_sha256: str = ""
    pruned: list[dict[str, Any]] = field(default_factory=list)
    critic: str = ""
    critic_sha256: str = ""


@dataclass(frozen=True)
class Helpers:
    """Models that take part in training without learning themselves."""

    teacher: Teacher | None = None
    critic: Critic | None = None
    progress: Progress = lambda phase, done, total: None  # of what is computed before they can help


ALONE = Helpers()


def check_helpers(recipe: Recipe, teacher: Path | None, critic: str | None) -> None:
    """UsageError where a stage needs a teacher or a critic and there is none, or the other way round."""
    for name, given, objective in (("teacher", teacher, "distill"), ("critic", critic, "guided")):
        learning = [i for i, stage in enumerate(recipe.stages) if stage.objective == objective]
        watched = name == "critic" and recipe.watch == "alignment"
        if learning and given is None:
            raise UsageError(f"stages.{learning[0]}.objective = {objective} needs --{name} CHECKPOINT")
        if watched and given is None:
            raise UsageError("watch = alignment needs --critic CHECKPOINT")
        if given is not None and not learning and name == "teacher":
            raise UsageError(f"--{name}: no stage learns from it; add --set stages.0.objective={objective}")


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
    teacher: Checkpoint | None,
    critic: tuple[str, str] | None = None,
    base: str = "",
) -> None:
    """critic: its path or hub id, and its hash. base: hash of what adapters are put on where that is no checkpoint."""
    if init is None and teacher is None and critic is None and not base:
        (out / START).unlink(missing_ok=True)
        return
    start = Start(
        str(init.path.resolve()) if init else "",
        init.sha256 if init else base,
        str(teacher.path.resolve()) if teacher else "",
        teacher.sha256 if teacher else "",
        list(init.metrics.get("pruned", [])) if init else [],
        *(critic or ("", "")),
    )
    write_json(out / START, dataclasses.asdict(start))


def read_start(out: Path) -> Start:
    """What `write_start` wrote; an empty Start where the run began from nothing."""
    try:
        return Start(**json.loads((out / START).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Start()
    except (OSError, ValueError, TypeError) as error:
        raise EdgecapError(f"{out / START} cannot be read ({error}): begin the run anew") from error


def load_again(path: str, sha256: str, role: str) -> Checkpoint:
    """The checkpoint that a run began with; UsageError where it is gone or another one now."""
    loaded = load_checkpoint(path)
    if loaded.sha256 != sha256:
        raise UsageError(f"{path} has changed since this run began with it as {role}: put it back, or begin anew")
    return loaded


def teacher_for(recipe: Recipe, loaded: Checkpoint, tokenizer: Tokenizer) -> Teacher:
    """The checkpoint as teacher of a recipe's captioner; UsageError where it sees or says something else."""
    if loaded.preprocess != preprocess_for(recipe):
        raise UsageError(f"{loaded.path} sees photos in another size or form: it cannot teach this captioner")
    return Teacher(loaded, tokenizer)


class Teacher:
    """An unpruned captioner whose logits and memory a smaller one learns from."""

    def __init__(self, loaded: Checkpoint, tokenizer: Tokenizer) -> None:
        self.model: CaptionModel = loaded.model.eval().requires_grad_(False)
        self.kind, self.preprocess = loaded.recipe.encoder.kind, loaded.preprocess
        theirs = loaded.tokenizer.inner.get_vocab(with_added_tokens=True)
        unknown = loaded.tokens["unk"]
        ours = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
        missing = sorted(word for word, _ in ours if word not in theirs)
        if missing:
            raise UsageError(f"the teacher {loaded.path} does not know {missing[0]!r}, a word of the captioner's own")
        self.ids = torch.tensor([theirs.get(word, unknown) for word, _ in ours])  # [V] our id → the teacher's

    @torch.no_grad()
    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Its memory [N, L, D] and its logits [K, V] for our words, at the batch's targets."""
        if self.ids.device != batch.ids.device:
            self.ids = self.ids.to(batch.ids.device)
            self.model.to(batch.ids.device)
        memory = self.model.memory(features=batch.teacher)
        return memory, self.model.decoder(memory, self.ids[batch.inputs], batch.keep)[:, self.ids]
