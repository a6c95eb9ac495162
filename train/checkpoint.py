"""A trained captioner on disk: recipe.toml, model.safetensors, tokenizer.json, metrics.json; no code, no pickle."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..runtime.errors import EdgecapError, UsageError
from ..runtime.preprocess import Preprocess
from ..runtime.tokenizer import Tokenizer
from .models import CaptionModel, build_model
from .models.towers import build_towers
from .prepare import with_places
from .recipe import recipe_from_dict
from .settings import Recipe, plain
from .shapes import shrink_to
from .state import ADAPTER, WEIGHTS, fingerprint, load_model_tensors, model_tensors
from .tokenizer import token_ids
from .weights import read_weights

RECIPE, TOKENIZER, METRICS = "recipe.toml", "tokenizer.json", "metrics.json"
PROGRESS = Path("last") / "progress.safetensors"
C = TypeVar("C", bound="CheckpointInfo")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint without its model. `tokens`: ids of bos, eos, pad, unk and vocab_size; `sha256`: of the weights
    file."""

    path: Path
    recipe: Recipe
    tokenizer: Tokenizer
    tokens: dict[str, int]
    preprocess: Preprocess
    metrics: dict[str, Any]
    sha256: str

    @property
    def finished(self) -> bool:
        return bool(self.metrics.get("finished"))


@dataclass(frozen=True)
class Checkpoint(CheckpointInfo):
    """A loaded checkpoint."""

    model: CaptionModel


def load_checkpoint(
    path: str | Path,
    *,
    unfinished_ok: bool = False,
    base: Path | None = None,
    full_precision: bool = False,
    moved: str = "",
    on: Any = None,
) -> Checkpoint:
    """Load a checkpoint directory; UsageError where it is none, is damaged, or its training has not finished.

    An adapter run is loaded onto its base, which lies where it lay then or at `base`, a checkpoint or, where it began
    on pretrained parts, their directory; full_precision: not in 4 bits, also where the adapter learnt so; moved: how
    the user can say where a base is that is gone; on: the base, where it has been loaded already.
    """
    info = read_checkpoint(path, unfinished_ok=unfinished_ok)
    path, recipe, tokens = info.path, info.recipe, info.tokens
    tensors = read_weights(path)
    if recipe.lora.rank:
        from .lora import add_adapters

        model = on if on is not None else _base(path, recipe, tokens, info.metrics, base, moved)
        add_adapters(model, replace(recipe.lora, bits=0) if full_precision else recipe.lora)
        model.eval()
    else:
        model = model_for(recipe, tokens, load_weights=False)
        if info.metrics.get("pruned"):
            shrink_to(model, tensors)
    load_model_tensors(model, tensors, f"{_weights_file(path)}")
    if recipe.task == "retrieval":
        model.read_with(info.tokenizer.inner)
    return Checkpoint(**vars(info), model=model)


def read_checkpoint(path: str | Path, *, unfinished_ok: bool = False) -> CheckpointInfo:
    """What a checkpoint directory says of itself, its weights hashed but not loaded; raises as `load_checkpoint`."""
    path = Path(path)
    for name in (RECIPE, TOKENIZER):
        if not (path / name).is_file():
            raise UsageError(f"{path} is not a checkpoint: {name} is missing (edgecap train makes one)")
    metrics = read_metrics(path)
    again = f"continue it with: edgecap train --resume --out {path}"
    weights = _weights_file(path)
    if not weights.is_file():
        raise UsageError(f"{path} has no weights yet, its training stopped before the first validation; {again}")
    if not metrics.get("finished") and not unfinished_ok:
        raise UsageError(f"the training of {path} has not finished; {again} (or take it as it is with --unfinished-ok)")
    recipe = read_recipe(path)
    tokenizer = Tokenizer.load(path / TOKENIZER)
    tokens = token_ids(tokenizer.inner, recipe.tokenizer.ids)
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return CheckpointInfo(path, recipe, tokenizer, tokens, preprocess_for(recipe), metrics, digest)


def identity(info: CheckpointInfo) -> dict[str, Any]:
    """All that what a captioner says depends on, its search aside: the key of caches that hold it."""
    recipe = info.recipe
    parts = plain({name: getattr(recipe, name) for name in ("bridge", "decoder")})
    parts |= {name: asdict(getattr(recipe, name)) for name in ("encoder", "lora")}
    return {
        "weights": info.sha256,
        "base": (info.metrics.get("base") or {}).get("sha256"),  # of adapters
        "parts": {name: {k: v for k, v in part.items() if k != "source"} for name, part in parts.items()},
        "tokens": info.tokens,
        "tokenizer": info.tokenizer.inner.to_str(),
        "preprocess": info.preprocess.to_dict(),
    }


def _weights_file(path: Path) -> Path:
    return path / (ADAPTER if (path / ADAPTER).is_file() else WEIGHTS)


def _base(
    path: Path, recipe: Recipe, tokens: dict[str, int], metrics: dict[str, Any], base: Path | None, moved: str
) -> Any:
    """The base of an adapter run, see `load_checkpoint`."""
    known = metrics.get("base")
    if not isinstance(known, dict) or not {"checkpoint", "sha256"} <= set(known):
        raise UsageError(f"{path / METRICS} does not say which base the adapter belongs to: restore it, or train again")
    place, whose = known["checkpoint"], f"the adapter of {path}"
    if base is not None and place:
        if not (base / RECIPE).is_file():
            raise UsageError(f"{base} is not a checkpoint: {RECIPE} is missing; give the base of {whose}")
        place = str(base)
    elif base is not None:
        parts = {recipe.encoder.source, recipe.bridge.get("source"), recipe.decoder.get("source")}
        if len(parts) > 1:
            raise UsageError(
                f"{whose} began on weights of several places: put them back at {', '.join(map(str, parts))}"
            )
        recipe = with_places(recipe, lambda source: str(base) if source in parts else source)
    return base_model(recipe, tokens, place, known["sha256"], whose, moved)[0]


def base_model(
    recipe: Recipe, tokens: dict[str, int], path: str, sha256: str, whose: str, moved: str = ""
) -> tuple[Any, str]:
    """What adapters are put on, and its hash: the checkpoint at `path`, or, if that is empty, the recipe's sources.

    sha256: what the hash must be ("": anything); UsageError where the base is gone or another one now.
    """
    if path and not (Path(path) / RECIPE).is_file():
        raise UsageError(f"the base of {whose} is gone: put it back at {path}{', or ' if moved else ''}{moved}")
    if path:
        loaded = load_checkpoint(path)
        model, digest = loaded.model, loaded.sha256
    else:
        import torch

        torch.manual_seed(recipe.seed)
        model = model_for(recipe, tokens, load_weights=True)
        digest = fingerprint(model_tensors(model))
    if sha256 not in ("", digest):
        where = path or "what the recipe's sources give"
        raise UsageError(f"{where} is not the base of {whose}, or has changed since: put that back")
    return model, digest


def require_captioner(loaded: C) -> C:
    """The checkpoint, where it says captions; UsageError for a retrieval model."""
    if loaded.recipe.task != "caption":
        raise UsageError(f"{loaded.path} is a retrieval model and says no captions: edgecap eval tells what it finds")
    return loaded


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


def load_again(path: str, sha256: str, role: str) -> Checkpoint:
    """The checkpoint that a run began with; UsageError where it is gone or another one now."""
    loaded = load_checkpoint(path)
    if loaded.sha256 != sha256:
        raise UsageError(f"{path} has changed since this run began with it as {role}: put it back, or begin anew")
    return loaded


def model_for(recipe: Recipe, tokens: dict[str, int], *, load_weights: bool) -> Any:
    """The recipe's CaptionModel or TwoTowers; with `load_weights` its parts start from their sources' weights."""
    build = {"caption": _build_captioner, "retrieval": build_towers}[recipe.task]
    return build(recipe, tokens, load_weights=load_weights)


def _build_captioner(recipe: Recipe, tokens: dict[str, int], *, load_weights: bool) -> CaptionModel:
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
