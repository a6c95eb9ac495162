"""Small captioners, recipes and checkpoints that adapters go on."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from edgecap.benchmarks.datasets import open_dataset
from edgecap.train.checkpoint import METRICS, RECIPE, TOKENIZER, model_for
from edgecap.train.settings import EncoderSettings, Lora, Recipe
from edgecap.train.state import write_bytes, write_json
from edgecap.train.tokenizer import caption_text, token_ids, train_tokenizer
from edgecap.train.weights import write_weights

from .tiny import SIGLIP, tiny_recipe

KINDS = ("llama", "gpt2", "opt")
LORA = Lora(rank=4, alpha=8.0)
STAGE = {"epochs": 3, "batch_size": 24, "lr": 0.03, "schedule": "constant", "label_smoothing": 0.0}
needs_4_bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def base_recipe(kind: str) -> Recipe:
    recipe = tiny_recipe(STAGE, decoder=kind)
    return dataclasses.replace(recipe, encoder=EncoderSettings(**SIGLIP))  # quick to export


def save_base(folder: Path, kind: str, seed: int = 0) -> Path:
    """A captioner with random weights as a finished checkpoint."""
    recipe = base_recipe(kind)
    captions = [caption_text(c) for e in open_dataset(recipe.data.spec).splits["train"] for c in e.captions]
    tokenizer = train_tokenizer(captions, recipe.tokenizer)
    torch.manual_seed(seed)
    model = model_for(recipe, token_ids(tokenizer), load_weights=False)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    write_weights(folder, model)
    write_bytes(folder / TOKENIZER, tokenizer.to_str().encode())
    write_bytes(folder / RECIPE, recipe.to_toml().encode())
    write_json(folder / METRICS, {"finished": True, "best": None})
    return folder


def adapter_recipe(kind: str, **settings: Any) -> Recipe:
    return dataclasses.replace(base_recipe(kind), lora=dataclasses.replace(LORA, **settings))
