"""What a run is asked for: the recipe with what the command line says on top, or why the two do not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..runtime.errors import UsageError
from .recipe import load_recipe
from .settings import Recipe


def prepare_recipe(
    name: str,
    *,
    data: str | None,
    encoder: str | None,
    overrides: Sequence[str],
    skip_bad: bool,
    seed: int | None,
    decoder: str | None = None,
    text: str | None = None,
    vlm: str | None = None,
    from_scratch: bool = False,
    image_size: int | None = None,
    max_positions: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Recipe:
    """The recipe with what the command line says on top; `say` is told what of the recipe does not count then.

    encoder, decoder, text, vlm: hub ids or directories with weights; from_scratch: no weights from anywhere.
    """
    recipe = load_recipe(name, tuple(overrides))
    if image_size:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, image_size=image_size))
    if max_positions:
        recipe = dataclasses.replace(recipe, decoder={**recipe.decoder, "max_positions": max_positions})
    if data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, spec=data))
    if skip_bad:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, skip_bad=True))
    if encoder:
        recipe = dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, source=encoder))
    if decoder:
        recipe = dataclasses.replace(recipe, decoder={**recipe.decoder, "source": decoder})
    if text:
        recipe = dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, source=text))
    if vlm:
        from .smolvlm import with_vlm

        recipe = with_vlm(recipe, vlm)
    if from_scratch:
        recipe = without_sources(recipe)
    if recipe.encoder.source and recipe.encoder.config:
        source = recipe.encoder.source
        if any(item.startswith("encoder.config") for item in overrides):
            raise UsageError(f"encoder {source} has a configuration of its own: leave out --set encoder.config")
        if encoder:
            say(f"encoder {source}: its own configuration is used, not the recipe's encoder.config")
        recipe = dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, config={}))
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)


def without_sources(recipe: Recipe) -> Recipe:
    """The recipe with nothing pretrained: every part from its configuration, the tokenizer learnt from the captions,
    with unused entries up to the size of the pretrained one."""
    tokenizer = recipe.tokenizer
    if tokenizer.kind == "pretrained":
        tokenizer = dataclasses.replace(tokenizer, kind="bpe", source="", fill=True)
    parts = {part: {k: v for k, v in getattr(recipe, part).items() if k != "source"} for part in ("bridge", "decoder")}
    return dataclasses.replace(
        recipe,
        tokenizer=tokenizer,
        encoder=dataclasses.replace(recipe.encoder, source=""),
        text=dataclasses.replace(recipe.text, source=""),
        **parts,
    )
