"""`--prune`: from a checkpoint to a smaller checkpoint, before anything is quantized.

Items: channels=S (a share of the encoder's channels and of the decoder's widths), encoder=S, features=S (the encoder's
output channels), decoder=S, hidden=S, ffn=S, heads=S, layers=N (decoder layers), vocab=used or vocab=N (words used at
least N times in the training captions).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.errors import UsageError, need
from ..runtime.progress import Progress, silent
from ..runtime.tokenizer import Tokenizer
from ..train.checkpoint import METRICS, RECIPE, TOKENIZER, WEIGHTS, Checkpoint, model_for
from ..train.models import CaptionModel
from ..train.models.language_model import PHOTO
from ..train.pretrained import not_continuing
from ..train.settings import Recipe
from ..train.smolvlm import is_vlm
from ..train.state import model_tensors, write_bytes, write_json, write_tensors
from ..train.tokenizer import token_ids
from .graph import PassResult
from .prune_decoder import Captioned, Tensors, caption_batches, drop_layers, narrow
from .prune_encoder import prune_encoder
from .prune_vocab import shrink_vocab
from .threads import one_thread

DECODER = ("hidden", "ffn", "heads")
SHARES = ("channels", "encoder", "features", "decoder", *DECODER)
KEYS = (*SHARES, "layers", "vocab")


@dataclasses.dataclass(frozen=True)
class Plan:
    """encoder: shares by "encoder" and "features"; decoder: shares by width; layers to drop; uses of a word to keep
    it (0 = the vocabulary stays); named: the keys as they were given."""

    encoder: dict[str, float]
    decoder: dict[str, float]
    layers: int = 0
    vocab: int = 0
    named: tuple[str, ...] = ()


def parse_items(items: Sequence[str]) -> Plan:
    """`KEY=VALUE` items, each may hold several with commas. A finer key goes before the one that includes it."""
    said: dict[str, str] = {}
    for item in (part.strip() for text in items for part in text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in KEYS:
            raise UsageError(f"--prune {item!r}: write KEY=VALUE with one of {', '.join(KEYS)}; e.g. channels=0.3")
        if key in said:
            raise UsageError(f"--prune {key} is given twice: give it once")
        said[key] = value
    if not said:
        raise UsageError(f"--prune is empty: write KEY=VALUE with one of {', '.join(KEYS)}")
    shares = {key: _share(key, said[key]) for key in SHARES if key in said}
    every = shares.get("channels")
    encoder = {"encoder": shares.get("encoder", every), "features": shares.get("features")}
    decoder = {key: shares.get(key, shares.get("decoder", every)) for key in DECODER}
    return Plan(
        {key: value for key, value in encoder.items() if value is not None},
        {key: value for key, value in decoder.items() if value is not None},
        _count("layers", said["layers"]) if "layers" in said else 0,
        1 if said.get("vocab") == "used" else _count("vocab", said["vocab"]) if "vocab" in said else 0,
        tuple(said),
    )


def _share(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UsageError(f"--prune {key}={text}: give the share to take out, between 0 and 1")
    return value


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        also = "used, or " if key == "vocab" else ""
        raise UsageError(f"--prune {key}={text}: give {also}a whole number of 1 or more")
    return int(text)


def prune_checkpoint(
    loaded: Checkpoint,
    items: Sequence[str],
    *,
    pixels: np.ndarray,
    captions: Sequence[Sequence[int]],
    corpus: Iterable[str],
    out: Path,
    fingerprint: str = "",
    progress: Progress = silent,
) -> Path:
    """Write a pruned copy of a checkpoint to the folder `out`, which must be free; `loaded` is left as it is.

    pixels uint8 [N, H, W, 3] and captions (ids without BOS and EOS, one a photo): training photos by which importance
    is measured. corpus: all training captions in `caption_text` form, read where the vocabulary is pruned.
    fingerprint: of the data set they are from, for the record in the metrics.
    Raises UsageError for items that this captioner does not have, MissingExtra without torch-pruning.
    """
    plan = parse_items(items)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: remove it or choose another place for the pruned checkpoint")
    _check(plan, loaded)
    with one_thread():
        before = cost(loaded.model)
        model, recipe, tokenizer, details = _prune(loaded, plan, pixels, captions, corpus, progress)
        after = cost(model)
        if after["parameters"] == before["parameters"]:
            raise UsageError(f"--prune {','.join(items)} takes nothing out of {loaded.path}: give more")
        record = {
            "from": loaded.sha256,
            "items": list(items),
            "photos": len(pixels),
            **({"data_fingerprint": fingerprint} if fingerprint else {}),
            **details,
            "before": before,
            "after": after,
        }
    write_bytes(out / TOKENIZER, tokenizer.inner.to_str(pretty=True).encode())
    write_tensors(out / WEIGHTS, model_tensors(model), {"format": "pt"})
    kept = {key: loaded.metrics[key] for key in ("train_photos", "val_photos") if key in loaded.metrics}
    history = [*loaded.metrics.get("pruned", []), record]
    write_json(out / METRICS, {"finished": True, "best": None, **kept, "pruned": history})
    write_bytes(out / RECIPE, recipe.to_toml().encode())  # last: with it, the folder is a checkpoint
    return out


def prune_passes(metrics: dict[str, Any]) -> list[PassResult]:
    """What pruning a checkpoint's metrics tell of, for a bundle's lineage."""
    return [
        PassResult(
            "prune",
            {key: value for key, value in record.items() if key not in ("before", "after")},
            {"before": record["before"], "after": record["after"]},
        )
        for record in metrics.get("pruned", [])
    ]


def _check(plan: Plan, loaded: Checkpoint) -> None:
    """Refuse before anything is computed."""
    kind, decoder = loaded.recipe.decoder["kind"], loaded.model.decoder
    if plan.encoder:
        need("torch_pruning", extra="export", command="edgecap export --prune")
    there = {width.key: width.units for width in decoder.widths()}
    has = ", ".join(sorted(there)) or "nothing of this kind"
    for key in plan.named:
        if key in DECODER and key not in there:
            raise UsageError(f"--prune {key}: a {kind} decoder has {has} to prune")
        if key in there and int(there[key] * plan.decoder[key]) < 1:
            raise UsageError(f"--prune {key}={plan.decoder[key]:g} takes nothing out of {there[key]}: give more")


def _prune(
    loaded: Checkpoint,
    plan: Plan,
    pixels: np.ndarray,
    captions: Sequence[Sequence[int]],
    corpus: Iterable[str],
    progress: Progress,
) -> tuple[CaptionModel, Recipe, Tokenizer, dict[str, Any]]:
    model, recipe, tokenizer = copy.deepcopy(loaded.model).eval(), loaded.recipe, loaded.tokenizer
    tokens, details = dict(loaded.tokens), {}
    if plan.layers or plan.decoder:
        seen = Captioned(model, caption_batches(pixels, captions, tokens))
        if plan.layers:
            gone, tensors = drop_layers(model, plan.layers, seen, progress)
            details["layers"] = gone
            recipe = _with_decoder(recipe, {"layers": model.decoder.layers - plan.layers})
            model = _rebuilt(model, recipe, tokens, tensors)
            seen.model = model
        if {width.key for width in model.decoder.widths()} & set(plan.decoder):
            options, tensors = narrow(model, plan.decoder, seen)
            recipe = _with_decoder(recipe, options)
            model = _rebuilt(model, recipe, tokens, tensors)
    if plan.encoder:
        prune_encoder(model, plan.encoder, pixels, progress)
    if plan.vocab:
        needed = [tokens[name] for name in ("bos", "eos", "pad", "unk")]
        needed += [i for i in recipe.decoder.get("prompt", ()) if i != PHOTO]
        if is_vlm(recipe):  # what stands between the rows of tiles
            plain = not_continuing(tokenizer.inner)
            needed += [i for text in ("\n", "\n\n") for i in plain.encode(text, add_special_tokens=False).ids]
        inner, old = shrink_vocab(tokenizer.inner, corpus, plan.vocab, needed)
        recipe = _renumbered(recipe, old)
        tokenizer, tokens = Tokenizer(inner), token_ids(inner, recipe.tokenizer.ids)
        tensors = dict(model.decoder.state_dict())
        rows = torch.tensor(old)
        tensors |= {name: tensors[name].index_select(0, rows) for name in model.decoder.vocab_rows}
        settings = recipe.tokenizer
        if settings.kind == "word":
            least = max(settings.min_count, plan.vocab)
            recipe = dataclasses.replace(recipe, tokenizer=dataclasses.replace(settings, min_count=least))
        model = _rebuilt(model, recipe, tokens, tensors)
    return model, recipe, tokenizer, details


def _renumbered(recipe: Recipe, old: list[int]) -> Recipe:
    """The recipe with the new ids of its special tokens and its prompt."""
    new = {i: place for place, i in enumerate(old)} | {PHOTO: PHOTO}
    if recipe.decoder.get("prompt"):
        recipe = _with_decoder(recipe, {"prompt": [new[i] for i in recipe.decoder["prompt"]]})
    ids = {name: i if name == "bos_is_word" else new[i] for name, i in recipe.tokenizer.ids.items()}
    return dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, ids=ids))


def _with_decoder(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    return dataclasses.replace(recipe, decoder={**recipe.decoder, **options})


def _rebuilt(model: CaptionModel, recipe: Recipe, tokens: dict[str, int], tensors: Tensors) -> CaptionModel:
    """The model with a decoder of the recipe's new sizes, filled."""
    decoder = model_for(recipe, tokens, load_weights=False).decoder
    decoder.load_state_dict(tensors)
    return CaptionModel(model.encoder, model.bridge, decoder, bos_id=tokens["bos"], size=model.size).eval()


def cost(model: CaptionModel) -> dict[str, Any]:
    """Parameters and float32 bytes of each part; multiply-adds for one photo and for one further word of a caption."""
    from torch.utils.flop_counter import FlopCounterMode

    pixels = torch.zeros(1, *model.size, 3, dtype=torch.uint8)
    bos, row = torch.tensor([[model.bos_id]]), torch.tensor([0])
    with torch.no_grad():
        with FlopCounterMode(display=False) as seeing:
            photo = model.photo(pixels=pixels)
        _, state = model.decoder.begin(photo, bos)
        with FlopCounterMode(display=False) as saying:
            model.decoder.advance(bos[0], row, photo, state)
    parts = ("encoder", "bridge", "decoder")
    return {
        "parameters": {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts},
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in model_tensors(model).values()),
        "macs": {"photo": seeing.get_total_flops() // 2, "word": saying.get_total_flops() // 2},
    }
