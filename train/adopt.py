"""A published SmolVLM or Idefics3 as it is, without training: what `edgecap export --from` begins with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from ..runtime.frames import Framing
from ..runtime.preprocess import Preprocess
from ..runtime.tokenizer import Tokenizer
from .checkpoint import Checkpoint, model_for
from .models.hub import reading
from .pretrained import open_captions
from .recipe import load_recipe
from .run import RUNS
from .smolvlm import CHAT, with_vlm
from .state import fingerprint, model_tensors
from .tokenizer import token_ids

RECIPE = "smolvlm-lora"  # what it takes from there: lengths and search
PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Published(Checkpoint):
    """A captioner that keeps photos as they are; framing: how its own image processor cuts them."""

    framing: Framing

    @property
    def squashed(self) -> Checkpoint:
        """The same for photos squashed to one frame of the size it learnt, as training and pruning take them."""
        return dataclasses.replace(self, preprocess=Preprocess(self.model.size))

    def pruned_to(self, smaller: Checkpoint) -> Published:
        """What was pruned from it, with its processing of photos."""
        return Published(**{**vars(smaller), "preprocess": self.preprocess}, framing=self.framing)


def adopt(source: str, *, chat: str = CHAT, side: int | None = None, tiles: bool | None = None) -> Published:
    """The captioner of a hub id or directory with weights: its parts, its processing of photos, its chat template
    around them. chat: what the user says; side: pixels of a frame, and tiles: whether photos are split into such, where
    not as published; a smaller side alone means that they are not.

    Raises UsageError where it is another kind of model, or is not all there.
    """
    recipe = load_recipe(RECIPE)
    recipe = dataclasses.replace(
        recipe,
        name=Path(source).name,
        decoder={**recipe.decoder, "max_positions": 2**31 - 1},  # the model's own
        prompt=dataclasses.replace(recipe.prompt, chat=chat, text=""),
        lora=dataclasses.replace(recipe.lora, rank=0),
    )
    tokenizer, recipe = open_captions(with_vlm(recipe, source), [])
    tokens = token_ids(tokenizer, recipe.tokenizer.ids)
    model = model_for(recipe, tokens, load_weights=True)
    config = model.encoder.body.config
    framing = Framing.from_processor(
        _processor(source), native=config.image_size, patch=config.patch_size, scale=model.bridge.scale
    )
    less = side is not None and side < framing.side  # tiles of that size would be more of them
    framing = framing.at(side or framing.side, split=framing.split and not less if tiles is None else tiles)
    return Published(
        path=RUNS / Path(source).name,
        recipe=recipe,
        tokenizer=Tokenizer.load(tokenizer.to_str().encode()),
        tokens=tokens,
        preprocess=Preprocess((framing.side, framing.side), "keep"),
        metrics={"finished": True},
        sha256=fingerprint(model_tensors(model)),
        model=model,
        framing=framing,
    )


def _processor(source: str) -> dict[str, Any]:
    """The image processor's settings, in a file of their own or among those of the whole processor."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    with reading(source, "vlm") as place:
        found = get_image_processor_config(place)
    if not found:
        raise UsageError(f"vlm {source}: there is no {PROCESSOR}, which says how photos are cut")
    return found
