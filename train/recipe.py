"""Recipes: one TOML file says everything that makes a captioner. Unknown keys are errors; `--set a.b=c` overrides."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..runtime.errors import UsageError
from .settings import Recipe

CHOICES = {
    "data.resize": ("squash", "crop"),
    "data.resample": ("bilinear", "bicubic"),
    "task": ("caption", "retrieval"),
    "watch": ("", "cider", "alignment"),
    "augment.sides": ("swap", "drop"),
    "tokenizer.kind": ("word", "bpe", "unigram", "pretrained"),
    "encoder.features": ("grid", "pooled"),
    "text.pool": ("cls", "mean"),
    "lora.bits": (0, 4),
    "stages.objective": ("xe", "scst", "distill", "guided", "infonce"),
    "stages.batchnorm": ("auto", "train", "frozen"),
    "stages.schedule": ("constant", "cosine", "step", "plateau"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
}
POSITIVE = (
    "image_size",
    "captions_per_photo",
    "vocab_size",
    "max_length",
    "batch_size",
    "accumulate",
    "validate_every",
    "samples",
    "epochs",
    "step_epochs",
    "beam",
    "temperature",
    "top_k",
    "teacher_beam",
    "teacher_keep",
)
SHARES = ("label_smoothing", "dropout", "ema", "teacher_share")  # in [0, 1)
NO_WORDS = ("scst", "infonce")  # objectives that do not learn a caption word by word


def recipe_names() -> list[str]:
    """The recipes that come with edgecap."""
    folder = resources.files(__package__) / "recipes"
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe by its name or a TOML file, with `a.b=c` overrides (`stages.0.epochs=3`).

    Raises UsageError: unknown recipe, broken TOML, unknown key, wrong type or value.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise UsageError(f"recipe {path}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe {path} cannot be read: {error}") from error
    elif name_or_path in recipe_names():
        text = (resources.files(__package__) / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        raise UsageError(f"unknown recipe {name_or_path!r}: give a .toml file or one of {', '.join(recipe_names())}")
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name_or_path}: {error}") from error
    return recipe_from_dict(tree, where=f"recipe {name_or_path}", overrides=overrides)


def recipe_from_dict(tree: dict[str, Any], *, where: str = "recipe", overrides: tuple[str, ...] = ()) -> Recipe:
    """Build and check a recipe from plain data."""
    for item in overrides:
        _override(tree, item)
    recipe = _build(Recipe, tree, where, "")
    if not recipe.stages:
        raise UsageError(f"{where}: no [[stages]]; at least one is needed")
    for i, stage in enumerate(recipe.stages):
        if (stage.objective == "infonce") != (recipe.task == "retrieval"):
            raise UsageError(f"{where}: stages.{i}.objective = {stage.objective} is not for task = {recipe.task}")
        if stage.objective == "guided" and not (stage.alignment or stage.contrast or stage.diversity):
            raise UsageError(f"{where}: stages.{i}: guided needs alignment, contrast or diversity of a weight above 0")
        if stage.teacher_captions and stage.objective in NO_WORDS:
            raise UsageError(f"{where}: stages.{i}.teacher_captions: objective = {stage.objective} learns no captions")
        if stage.teacher_captions > stage.teacher_beam:
            raise UsageError(
                f"{where}: stages.{i}.teacher_captions = {stage.teacher_captions} is more than teacher_beam"
            )
        if stage.teacher_keep > 1:
            raise UsageError(f"{where}: stages.{i}.teacher_keep = {stage.teacher_keep} is out of range: it is a share")
        if stage.curriculum and stage.objective in NO_WORDS:
            raise UsageError(f"{where}: stages.{i}.curriculum is of captions to learn: {stage.objective} learns none")
        if stage.curriculum > stage.epochs:
            raise UsageError(f"{where}: stages.{i}.curriculum = {stage.curriculum} is more than the stage's epochs")
        for key in ("unfreeze_blocks", "match"):
            if getattr(stage, key) and not stage.encoder_lr:
                raise UsageError(
                    f"{where}: stages.{i}.{key} is of an encoder that learns: give it an encoder_lr above 0"
                )
        if not stage.bleu <= 1 or (stage.bleu and stage.objective != "scst"):
            raise UsageError(f"{where}: stages.{i}.bleu = {stage.bleu} must be in [0, 1], with objective = scst")
    if not recipe.augment.crop <= 1 or not recipe.augment.color_jitter < 1 or not recipe.augment.crop:
        raise UsageError(f"{where}: [augment] crop is a share above 0 and at most 1, color_jitter one below 1")
    if recipe.augment.sides == "drop" and recipe.task == "retrieval":
        raise UsageError(f"{where}: augment.sides = drop is of captions: task = retrieval swaps left and right")
    if recipe.watch and recipe.task == "retrieval":
        raise UsageError(f"{where}: watch = {recipe.watch} is of captions: task = retrieval watches its recall")
    for part in ("bridge", "decoder"):
        if not isinstance(getattr(recipe, part).get("kind"), str):
            raise UsageError(f'{where}: [{part}] needs kind = "…"')
        for key, value in getattr(recipe, part).items():
            _check_range(value, where, f"{part}.{key}", positive=isinstance(value, int))  # whole numbers are sizes
    return recipe


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {item!r}: write KEY=VALUE, for example --set stages.0.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.split(".")
    node: Any = tree
    try:
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise UsageError(f"--set {key}: no such place in the recipe") from error


def _build(cls: Any, tree: Any, where: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise UsageError(f"{where}: {prefix or 'top level'} must be a table")
    hints = get_type_hints(cls)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise UsageError(f"{where}: unknown key {prefix}{unknown[0]}; known: {', '.join(hints)}")
    values = {key: _value(hints[key], value, where, f"{prefix}{key}") for key, value in tree.items()}
    return cls(**values)


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, f"{key}.")
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}: {key} must be a list of tables ([[{key}]])")
        return tuple(_build(get_args(hint)[0], item, where, f"{key}.") for item in value)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {key} must be a table")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise UsageError(f"{where}: {key} = {value!r} must be of type {hint.__name__}")
    if key in CHOICES and value not in CHOICES[key]:
        raise UsageError(f"{where}: {key} = {value!r}; choices: {', '.join(CHOICES[key])}")
    _check_range(value, where, key, positive=key.rpartition(".")[2] in POSITIVE)
    return value


def _check_range(value: Any, where: str, key: str, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    share = key.rpartition(".")[2] in SHARES
    if not 0 <= value < (1 if share else math.inf) or (value == 0 and positive and not share):
        limits = "in [0, 1)" if share else "1 or more" if positive else "0 or more"
        raise UsageError(f"{where}: {key} = {value} is out of range: it must be {limits}")
