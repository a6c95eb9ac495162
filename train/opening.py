"""How a run opens: what it begins with is checked before anything is written, then its model and helpers are made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import tokenizers
import torch
from accelerate import PartialState

from ..benchmarks.datasets import Dataset
from ..runtime.errors import EdgecapError, UsageError
from ..runtime.progress import Progress, silent
from .checkpoint import (
    PROGRESS,
    RECIPE,
    TOKENIZER,
    base_model,
    load_again,
    load_checkpoint,
    model_for,
    read_recipe,
)
from .critic import Critic
from .loop import Trainer
from .lora import add_adapters, check_base, refuse_adapter
from .memory import free_memory, too_large
from .pretrained import open_captions
from .settings import Recipe
from .shapes import shrink_to
from .start import (
    START,
    Helpers,
    Start,
    check_helpers,
    read_start,
    with_parts,
    write_start,
)
from .state import load_progress, write_bytes
from .teachers.base import place
from .teachers.given import Given, check_sources, check_teachers, open_teacher
from .tokenizer import caption_text, token_ids
from .towers import TowersTrainer, open_texts


@dataclass(frozen=True)
class Task:
    """What a recipe's task decides when a run opens. open_tokenizer: as `open_captions`."""

    open_tokenizer: Callable[[Recipe, Iterable[str]], tuple[tokenizers.Tokenizer, Recipe]]
    trainer: type[Trainer]


TASKS = {"caption": Task(open_captions, Trainer), "retrieval": Task(open_texts, TowersTrainer)}


@dataclass
class Made:
    """What a process made to see that a run can begin, so that it is not made twice."""

    model: Any = None
    teachers: list[Given] | None = None
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
    progress: Progress = silent,
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
        check_sources(recipe, teachers)
    if init is not None:
        refuse_adapter(init)
    if recipe.lora.rank:
        check_base(recipe, init, trained=trains)
    first = None if init is None else load_checkpoint(init)
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
    made.teachers = [open_teacher(source, recipe, tokenizer) for source in teachers]
    if trains:
        _refuse_too_large(recipe, model)
        check_teachers(made.teachers, recipe, data.splits["train"], model)
        if judge is not None and any(stage.objective == "guided" for stage in recipe.stages):
            judge.check_knows(data.splits["train"], progress)
    # In this order: a folder with a recipe can be resumed, one with less is free.
    kept = [given.kept() for given in made.teachers]
    write_start(out, first, kept, None if judge is None else (place(critic), judge.sha256), base)
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
    progress: Progress = silent,
    made: Made | None = None,
) -> Helpers:
    """The teachers and the critic that the run began with."""
    teachers, critic = (made.teachers, made.critic) if made else (None, None)
    if teachers is None:
        teachers = [open_teacher(kept["path"], recipe, tokenizer, kept) for kept in start.teachers]
        for kept, given in zip(start.teachers, teachers, strict=True):
            if given.either.sha256 != kept["sha256"]:
                raise UsageError(f"{kept['path']} has changed since this run began with it as teacher: put it back")
    if start.critic and critic is None:
        critic = Critic.load(start.critic)
        if critic.sha256 != start.critic_sha256:
            raise UsageError(f"{start.critic} has changed since this run began with it as critic: put it back")
        critic.to(PartialState().device)
    words = tuple(given.words for given in teachers if given.words is not None)
    captioners = tuple(given.captions for given in teachers if given.captions is not None)
    return Helpers(words, critic, progress, captioners)


def this_process() -> PartialState:
    """Which of the processes this is; the first call of a process joins it to the others, on CPUs, too."""
    # The others wait for the first, which may look at photos for hours before a stage.
    return PartialState(cpu=_on_cpu(), timeout=timedelta(days=7))


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
