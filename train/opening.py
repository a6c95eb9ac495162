"""How a run opens: what it begins with is checked before anything is written, then its model and helpers are made."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
import torch
from accelerate import PartialState

from ..benchmarks.datasets import Dataset
from ..runtime.errors import EdgecapError, UsageError
from .checkpoint import (
    PROGRESS,
    RECIPE,
    TOKENIZER,
    Checkpoint,
    base_model,
    load_checkpoint,
    model_for,
    read_recipe,
    require_captioner,
)
from .critic import Critic
from .data.batches import Progress
from .loop import Trainer
from .lora import add_adapters, check_base, refuse_adapter
from .memory import free_memory, too_large
from .pretrained import open_tokenizer, resolve
from .settings import Recipe
from .shapes import shrink_to
from .smolvlm import around_photo, check_length, with_frames
from .start import (
    START,
    Helpers,
    Start,
    check_helpers,
    load_again,
    read_start,
    with_parts,
    write_start,
)
from .state import load_progress, write_bytes
from .teachers.speakers import Speaker, open_speaker, speaker_of
from .teachers.words import Teacher
from .tokenizer import caption_text, token_ids
from .towers import TowersTrainer, open_texts

QUIET: Progress = lambda phase, done, total: None  # noqa: E731


def open_captions(recipe: Recipe, captions: Iterable[str]) -> tuple[tokenizers.Tokenizer, Recipe]:
    """The tokenizer of a captioner and its recipe with what its sources say: sizes, token ids and the prompt."""
    recipe = resolve(with_frames(recipe))
    tokenizer, recipe = open_tokenizer(recipe, captions, functools.partial(around_photo, recipe))
    check_length(recipe)
    return tokenizer, recipe


@dataclass(frozen=True)
class Task:
    """What a recipe's task decides when a run opens. open_tokenizer: as `open_captions`."""

    open_tokenizer: Callable[[Recipe, Iterable[str]], tuple[tokenizers.Tokenizer, Recipe]]
    trainer: type[Trainer]


TASKS = {"caption": Task(open_captions, Trainer), "retrieval": Task(open_texts, TowersTrainer)}


Opened: TypeAlias = tuple[Checkpoint | None, Speaker | None]  # a teacher of words, and of captions


@dataclass
class Made:
    """What a process made to see that a run can begin, so that it is not made twice."""

    model: Any = None
    teachers: tuple[Teacher, ...] | None = None
    speakers: tuple[Speaker, ...] = ()
    critic: Critic | None = None


def open_run(
    recipe: Recipe,
    data: Dataset,
    out: Path,
    *,
    resume: bool = False,
    init: Path | None = None,
    teachers: Sequence[str | Path] = (),
    critic: str | None = None,
    trains: bool = True,
    progress: Progress = QUIET,
    made: Made | None = None,
) -> tuple[bool, Recipe]:
    """Has the run in `out` begun to learn? If not, its tokenizer and resolved recipe are written (anew), once it is
    clear that all of its stages can run.

    trains: false to measure memory and speed, where no teacher is needed and neither base nor critic need know
    anything; made: gets the model and the helpers, for `open_model` and `open_helpers`.
    """
    if (out / PROGRESS).is_file():
        return True, recipe
    if resume and (out / START).is_file():
        return False, recipe
    if trains:
        check_helpers(recipe, teachers, critic)
    if init is not None:
        refuse_adapter(init)
    if recipe.lora.rank:
        check_base(recipe, init, trained=trains)
    first = None if init is None else load_checkpoint(init)
    opened = _open_teachers(recipe, teachers)
    judge = None if critic is None else Critic.load(critic).to(PartialState().device)
    base = ""
    if first is not None:
        recipe, tokenizer = with_parts(recipe, first), first.tokenizer.inner
        model, file = first.model, (first.path / TOKENIZER).read_bytes()
    else:
        captions = (caption_text(c) for example in data.splits["train"] for c in example.captions)
        tokenizer, recipe = TASKS[recipe.task].open_tokenizer(recipe, captions)
        file, tokens = tokenizer.to_str(pretty=True).encode(), token_ids(tokenizer, recipe.tokenizer.ids)
        if recipe.lora.rank:
            model, base = base_model(recipe, tokens, "", "", f"the adapter of {out}")
        else:
            torch.manual_seed(recipe.seed)
            model = model_for(recipe, tokens, load_weights=True)
        for name in ("encoder", "text"):
            settings, part = getattr(recipe, name), model.parts().get(name)
            if settings.source and part is not None:
                recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(settings, config=part.settings())})
    if recipe.lora.rank:
        add_adapters(model, recipe.lora, seed=recipe.seed)
    made = made or Made()
    made.model, made.critic = model, judge
    made.teachers, made.speakers = _as_helpers(opened, recipe, tokenizer)
    if trains:
        _refuse_too_large(recipe, model)
        for teacher in made.teachers:
            teacher.check(data.splits["train"], recipe.tokenizer.max_length)
        if judge is not None and any(stage.objective == "guided" for stage in recipe.stages):
            judge.check_knows(data.splits["train"], progress)
    # In this order: a folder with a recipe can be resumed, one with less is free.
    places = [(_place(source), either.sha256) for source, either in zip(teachers, map(_either, opened), strict=True)]
    write_start(out, first, places, None if judge is None else (_place(critic), judge.sha256), base)
    write_bytes(out / TOKENIZER, file)
    write_bytes(out / RECIPE, recipe.to_toml().encode())
    return False, read_recipe(out)


def open_model(
    recipe: Recipe, tokenizer: tokenizers.Tokenizer, out: Path, begun: bool, made: Made | None = None
) -> Any:
    """The model as the run begins or goes on: a pruned one has the shapes of its weights, an adapter its base."""
    if made and made.model is not None:
        return made.model
    torch.manual_seed(recipe.seed)
    start, tokens = read_start(out), token_ids(tokenizer, recipe.tokenizer.ids)
    if recipe.lora.rank:
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


def open_helpers(
    recipe: Recipe,
    start: Start,
    tokenizer: tokenizers.Tokenizer,
    progress: Progress = QUIET,
    made: Made | None = None,
) -> Helpers:
    """The teachers and the critic that the run began with."""
    teachers, speakers, critic = (made.teachers, made.speakers, made.critic) if made else (None, (), None)
    if teachers is None:
        opened = _open_teachers(recipe, [kept["path"] for kept in start.teachers])
        for kept, either in zip(start.teachers, map(_either, opened), strict=True):
            if either.sha256 != kept["sha256"]:
                raise UsageError(f"{kept['path']} has changed since this run began with it as teacher: put it back")
        teachers, speakers = _as_helpers(opened, recipe, tokenizer)
    if start.critic and critic is None:
        critic = Critic.load(start.critic)
        if critic.sha256 != start.critic_sha256:
            raise UsageError(f"{start.critic} has changed since this run began with it as critic: put it back")
        critic.to(PartialState().device)
    return Helpers(teachers, critic, progress, speakers)


def _open_teachers(recipe: Recipe, sources: Sequence[str | Path]) -> list[Opened]:
    """Each source as what the recipe's stages need: one checkpoint is both, often. UsageError where none can teach."""
    words = any(stage.objective == "distill" for stage in recipe.stages)
    listens = any(stage.teacher_captions for stage in recipe.stages)
    ours = [(Path(source) / RECIPE).is_file() for source in sources]
    if words and sources and not (any(ours) if listens else all(ours)):
        raise UsageError(
            f"the teacher {sources[ours.index(False)]} is not a checkpoint: objective = distill needs one; "
            "another captioner teaches by its captions alone (teacher_captions)"
        )
    opened: list[Opened] = []
    for source, own in zip(sources, ours, strict=True):
        loaded = require_captioner(load_checkpoint(source)) if words and own else None
        speaker = (open_speaker(source) if loaded is None else speaker_of(loaded)) if listens else None
        opened.append((loaded, speaker))
    return opened


def _either(opened: Opened) -> Checkpoint | Speaker:
    return opened[0] or opened[1]


def _as_helpers(
    opened: Sequence[Opened], recipe: Recipe, tokenizer: tokenizers.Tokenizer
) -> tuple[tuple[Teacher, ...], tuple[Speaker, ...]]:
    teachers = tuple(Teacher(loaded, tokenizer, recipe.tokenizer.ids) for loaded, _ in opened if loaded is not None)
    return teachers, tuple(speaker for _, speaker in opened if speaker is not None)


def this_process() -> PartialState:
    """Which of the processes this is; the first call of a process joins it to the others, on CPUs, too."""
    return PartialState(cpu=_on_cpu())


def _on_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def precision(recipe: Recipe) -> str:
    """accelerate's mixed_precision for a recipe on this machine."""
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if not torch.cuda.is_available() or _on_cpu():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _refuse_too_large(recipe: Recipe, model: Any) -> None:
    """EdgecapError where a GPU cannot hold a stage, whatever its batch; a CPU's memory may be swapped."""
    device = PartialState().device
    if device.type != "cuda":
        return
    free = free_memory(device)
    for stage in recipe.stages:
        if refusal := too_large(model, stage, free):
            raise EdgecapError(refusal)


def _place(source: str | Path) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else str(source)  # or a hub id
