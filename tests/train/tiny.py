"""Small captioners, recipes and data for the tests of the train and export rooms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

from edgecap.benchmarks.datasets import open_dataset
from edgecap.train import loop
from edgecap.train.data.batches import Batch, encode_captions
from edgecap.train.models import CaptionModel, build_model
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.settings import Recipe, Stage
from edgecap.train.tokenizer import caption_text, train_tokenizer

SIZE = 64
DECODERS: dict[str, dict[str, Any]] = {
    "gru": {"kind": "gru", "hidden": 24, "embed": 16, "heads": 2, "dropout": 0.0},
    "lstm": {"kind": "lstm", "hidden": 24, "embed": 16, "heads": 2, "dropout": 0.0},
    "transformer": {"kind": "transformer", "dim": 32, "layers": 2, "heads": 4, "ffn": 48, "dropout": 0.0},
    "llama": {"kind": "llama", "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "dropout": 0.0},
    "gpt2": {"kind": "gpt2", "dim": 32, "layers": 2, "heads": 4, "ffn": 48, "dropout": 0.0},
    "opt": {"kind": "opt", "dim": 32, "layers": 2, "heads": 4, "ffn": 48, "dropout": 0.0},
}
ENCODER = {"kind": "mobilenet_v2", "config": {"depth_multiplier": 0.35, "finegrained_output": False}}
SIGLIP = {
    "kind": "siglip",
    "config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 16,
    },
}
SCENES = "scenes:train=48,val=16,test=16,size=64"


def tiny_model(decoder: str, *, vocab_size: int = 40, seed: int = 0, siglip: bool = False) -> CaptionModel:
    """A captioner with random weights, wide enough that its captions differ from photo to photo."""
    torch.manual_seed(seed)
    model = build_model(
        encoder=SIGLIP if siglip else ENCODER,
        bridge={"kind": "pixel_shuffle" if siglip else "linear", "dim": 16},
        decoder=DECODERS[decoder],
        vocab_size=vocab_size,
        bos_id=1,
        size=(SIZE, SIZE),
    )
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def tiny_recipe(*stages: dict[str, Any], decoder: str = "gru", **data: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "tiny",
            "data": {"spec": SCENES, "image_size": SIZE, "captions_per_photo": 3, **data},
            "tokenizer": {"min_count": 1, "max_length": 12},
            "encoder": ENCODER,
            "bridge": {"kind": "linear", "dim": 16},
            "decoder": DECODERS[decoder],
            "decoding": {"max_length": 12},
            "stages": list(stages) or [{"epochs": 2, "batch_size": 16, "lr": 3e-3, "encoder_lr": 3e-3}],
        }
    )


def tiny_world(samples: int = 4, decoder: str = "gru", **stage: Any) -> tuple[Any, ...]:
    """Six scenes: recipe, stage, tokenizer, examples, a model, and a batch of them all."""
    recipe = tiny_recipe()
    examples = list(open_dataset("scenes:train=6,val=2,test=2,size=64").splits["train"])
    tokenizer = train_tokenizer([caption_text(c) for e in examples for c in e.captions], recipe.tokenizer)
    ids = encode_captions(examples, tokenizer, max_length=12, captions=3)
    model = tiny_model(decoder, vocab_size=tokenizer.get_vocab_size())
    pixels = torch.randint(0, 256, (6, SIZE, SIZE, 3), dtype=torch.uint8)
    batch = Batch(torch.from_numpy(ids), np.arange(6), pixels=pixels)
    return recipe, Stage(samples=samples, label_smoothing=0.1, **stage), tokenizer, examples, model, batch


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def with_kills(patch: pytest.MonkeyPatch, begin: Callable[[bool], object], lives: Iterable[int]) -> int:
    """Call `begin(resume)` until it comes to its end; each life is killed after so many optimizer steps, and every step
    is saved. Returns how many lives it took."""
    step, left = loop.Trainer._step, 0

    def mortal(self: loop.Trainer, *args: Any) -> Any:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return step(self, *args)

    patch.setattr(loop, "SAVE_EVERY_S", 0.0)
    patch.setattr(loop.Trainer, "_step", mortal)
    for number, left in enumerate(lives):  # noqa: B007 - `mortal` counts it down
        try:
            begin(number > 0)
        except Killed:
            continue
        return number + 1
    raise AssertionError("all lives were too short")
