"""Recipes: one TOML file says everything that makes a captioner. Unknown keys are errors; `--set a.b=c` overrides."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..runtime.errors import UsageError

DEFAULT_RECIPE = "mobilenetv2-gru-small"


@dataclass(frozen=True)
class Data:
    """What is learnt from: the data spec, the picture size in pixels and how photos are brought to it."""

    spec: str = "scenes"
    image_size: int = 224
    resize: str = "squash"  # or "crop"
    resample: str = "bilinear"
    captions_per_photo: int = 5  # learnt in one step, drawn anew each time where a photo has more
    flip: bool = False  # also learn from mirrored photos, with "left" and "right" swapped in their captions
    val_photos: int = 0  # validation photos used while training; 0 = all
    skip_bad: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """kind: word, bpe (byte level) or unigram. min_count is for words, vocab_size an upper limit for all."""

    kind: str = "word"
    vocab_size: int = 8000
    min_count: int = 5
    max_length: int = 20  # tokens of a caption in training, end excluded


@dataclass(frozen=True)
class EncoderSettings:
    """kind: a name of the encoder table; source: hub id or directory with weights, empty = from scratch by `config`."""

    kind: str = "mobilenet_v2"
    source: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """Decoding defaults that the bundle carries to the device (see runtime.decode)."""

    beam: int = 1
    max_length: int = 20
    min_length: int = 0
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class Stage:
    """One stretch of training. Stages follow each other, each starting from the best weights so far."""

    name: str = "words"
    objective: str = "xe"  # cross-entropy; scst (self-critical, reward CIDEr-D); distill (learns from --teacher, too)
    epochs: int = 10
    batch_size: int = 64  # photos for each optimizer step, over all processes
    accumulate: int = 1  # split the batch into this many pieces
    lr: float = 1e-3
    encoder_lr: float = 0.0  # 0 = frozen encoder: its features are computed once and cached
    batchnorm: str = "auto"  # train, frozen, or auto: trained only where the encoder starts from scratch
    schedule: str = "cosine"  # constant, cosine, step, plateau
    warmup: int = 0  # optimizer steps from 0 to lr
    step_epochs: int = 3  # step: multiply by gamma every so many epochs
    gamma: float = 0.5  # step and plateau
    plateau_patience: int = 1
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm; 0 = off
    label_smoothing: float = 0.1
    dropout: bool = True
    ema: float = 0.0  # decay of the weight average that is validated and kept; 0 = off
    patience: int = 0  # early stopping: validations without a better CIDEr; 0 = off
    validate_every: int = 1
    samples: int = 5  # scst: captions sampled per photo
    teacher_share: float = 0.7  # distill: of the loss that is the teacher's; the captions have the rest
    temperature: float = 2.0  # distill: softens both distributions
    match: float = 0.0  # distill: weight of seeing the photo as the teacher does, for encoders that learn


@dataclass(frozen=True)
class Recipe:
    name: str = DEFAULT_RECIPE
    seed: int = 0
    mixed_precision: str = "auto"  # bf16 or fp16 where the device has it; or no, bf16, fp16
    data: Data = field(default_factory=Data)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    bridge: dict[str, Any] = field(default_factory=lambda: {"kind": "linear"})
    decoder: dict[str, Any] = field(default_factory=lambda: {"kind": "gru"})
    decoding: Decoding = field(default_factory=Decoding)
    stages: tuple[Stage, ...] = (Stage(),)

    def to_dict(self) -> dict[str, Any]:
        return _plain(dataclasses.asdict(self))

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())


CHOICES = {
    "data.resize": ("squash", "crop"),
    "data.resample": ("bilinear", "bicubic"),
    "tokenizer.kind": ("word", "bpe", "unigram"),
    "stages.objective": ("xe", "scst", "distill"),
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
)
SHARES = ("label_smoothing", "dropout", "ema", "teacher_share")  # in [0, 1)


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
