"""A trained captioner on disk: recipe.toml, model.safetensors, tokenizer.json, metrics.json; no code, no pickle."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import EdgecapError, UsageError
from ..runtime.preprocess import Preprocess
from ..runtime.tokenizer import Tokenizer
from .models import CaptionModel, build_model
from .recipe import recipe_from_dict
from .settings import Recipe
from .shapes import shrink_to
from .state import WEIGHTS, load_model_tensors, read_weights
from .tokenizer import token_ids

RECIPE, TOKENIZER, METRICS = "recipe.toml", "tokenizer.json", "metrics.json"
PROGRESS = Path("last") / "progress.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `tokens`: ids of bos, eos, pad, unk and vocab_size; `sha256`: of the weights file."""

    path: Path
    recipe: Recipe
    model: CaptionModel
    tokenizer: Tokenizer
    tokens: dict[str, int]
    preprocess: Preprocess
    metrics: dict[str, Any]
    sha256: str

    @property
    def finished(self) -> bool:
        return bool(self.metrics.get("finished"))


def load_checkpoint(path: str | Path, *, unfinished_ok: bool = False) -> Checkpoint:
    """Load a checkpoint directory; UsageError where it is none, is damaged, or its training has not finished."""
    path = Path(path)
    for name in (RECIPE, TOKENIZER):
        if not (path / name).is_file():
            raise UsageError(f"{path} is not a checkpoint: {name} is missing (edgecap train makes one)")
    metrics = read_metrics(path)
    again = f"continue it with: edgecap train --resume --out {path}"
    if not (path / WEIGHTS).is_file():
        raise UsageError(f"{path} has no weights yet, its training stopped before the first validation; {again}")
    if not metrics.get("finished") and not unfinished_ok:
        raise UsageError(f"the training of {path} has not finished; {again} (or take it as it is with --unfinished-ok)")
    recipe = read_recipe(path)
    tokenizer = Tokenizer.load(path / TOKENIZER)
    tokens = token_ids(tokenizer.inner, recipe.tokenizer.ids)
    model = model_for(recipe, tokens, load_weights=False)
    tensors = read_weights(path)
    if metrics.get("pruned"):
        shrink_to(model, tensors)
    load_model_tensors(model, tensors, f"{path / WEIGHTS}")
    digest = hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
    return Checkpoint(path, recipe, model, tokenizer, tokens, preprocess_for(recipe), metrics, digest)


def read_recipe(path: Path) -> Recipe:
    try:
        tree = tomllib.loads((path / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgecapError(f"{path / RECIPE} cannot be read: {error}") from error
    return recipe_from_dict(tree, where=str(path / RECIPE))


def read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads((path / METRICS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EdgecapError(f"{path / METRICS} cannot be read: {error}") from error
    return metrics if isinstance(metrics, dict) else {}


def model_for(recipe: Recipe, tokens: dict[str, int], *, load_weights: bool) -> Any:
    """The recipe's CaptionModel or TwoTowers; with `load_weights` its parts start from their sources' weights."""
    if recipe.task == "retrieval":
        from .models.towers import build_towers

        return build_towers(recipe, load_weights=load_weights)
    return build_model(
        encoder={
            "kind": recipe.encoder.kind,
            "source": recipe.encoder.source or None,
            "config": recipe.encoder.config,
            "features": recipe.encoder.features,
            "tile": recipe.encoder.tile,
        },
        bridge=recipe.bridge,
        decoder=recipe.decoder,
        vocab_size=tokens["vocab_size"],
        bos_id=tokens["bos"],
        size=(recipe.data.image_size, recipe.data.image_size),
        load_weights=load_weights,
    )


def preprocess_for(recipe: Recipe) -> Preprocess:
    size = recipe.data.image_size
    return Preprocess(size=(size, size), mode=recipe.data.resize, resample=recipe.data.resample)
