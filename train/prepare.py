"""What a run is asked for: the recipe with what the command line says on top, or why the two do not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from .recipe import load_recipe
from .settings import Recipe

VITS = ("vit", "dino", "clip")  # whose positions are interpolated for photos of another size
TILES = 4  # a side, of a photo that is split as SmolVLM's are: 2048 px for an encoder of 512


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
    split: bool | None = None,
    max_positions: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Recipe:
    """The recipe with what the command line says on top; `say` is told what of the recipe does not count then.

    encoder, decoder, text, vlm: hub ids or directories with weights; from_scratch: no weights from anywhere; split:
    photos into tiles or not, None as the recipe says. Directories are made absolute: a run may go on elsewhere.
    Raises UsageError for what does not go together.
    """
    recipe = load_recipe(name, tuple(overrides))
    _check_options(recipe, encoder, decoder, text, vlm, from_scratch, max_positions)
    if image_size:
        recipe = _with(recipe, "data", image_size=image_size)
        if recipe.encoder.kind in VITS:
            recipe = _with(recipe, "encoder", config={**recipe.encoder.config, "image_size": image_size})
    if max_positions:
        recipe = dataclasses.replace(recipe, decoder={**recipe.decoder, "max_positions": max_positions})
    if data:
        recipe = _with(recipe, "data", spec=data)
    if skip_bad:
        recipe = _with(recipe, "data", skip_bad=True)
    if encoder:
        recipe = _with(recipe, "encoder", source=encoder)
    if decoder:
        recipe = dataclasses.replace(recipe, decoder={**recipe.decoder, "source": decoder})
    if text:
        recipe = _with(recipe, "text", source=text)
    if vlm:
        recipe = _of_vlm(recipe, vlm, split, say)
    if from_scratch:
        recipe = without_sources(recipe)
    if split is not None:
        recipe = _split(recipe, split, image_size)
    if image_size and recipe.data.image_size != image_size:
        raise UsageError(
            f"--image-longest-edge {image_size}: {vlm} sees photos of {recipe.data.image_size} px; give that, or "
            "--split-image with a multiple of it"
        )
    if recipe.encoder.source and recipe.encoder.config:
        recipe = _own_configuration(recipe, overrides, image_size, say if encoder else lambda line: None)
    recipe = with_places(recipe)
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)


def with_places(recipe: Recipe, at: Callable[[str], str] | None = None) -> Recipe:
    """The recipe with every source that is a directory by its absolute path; at: what to make of a source instead."""
    at = at or _place
    for table in ("encoder", "tokenizer", "text"):
        recipe = _with(recipe, table, source=at(getattr(recipe, table).source))
    for table in ("bridge", "decoder"):
        if source := getattr(recipe, table).get("source"):
            recipe = dataclasses.replace(recipe, **{table: {**getattr(recipe, table), "source": at(source)}})
    return recipe


def _place(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if source and path.is_dir() else source


def _with(recipe: Recipe, table: str, **values: Any) -> Recipe:
    return dataclasses.replace(recipe, **{table: dataclasses.replace(getattr(recipe, table), **values)})


def _check_options(
    recipe: Recipe,
    encoder: str | None,
    decoder: str | None,
    text: str | None,
    vlm: str | None,
    from_scratch: bool,
    max_positions: int | None,
) -> None:
    """UsageError for options that would not count."""
    given = {"--encoder": encoder, "--decoder": decoder, "--text": text, "--vlm": vlm, "--max-seq-len": max_positions}
    given = {option: value for option, value in given.items() if value}
    others = ("--decoder", "--vlm", "--max-seq-len") if recipe.task == "retrieval" else ("--text",)
    if wrong := [option for option in others if option in given]:
        has = "no text tower" if recipe.task == "caption" else "no decoder"
        raise UsageError(f"{wrong[0]}: a recipe with task = {recipe.task} has {has}: leave it out")
    parts = [option for option in ("--encoder", "--decoder", "--text") if option in given]
    if parts and (from_scratch or vlm):
        whole = "--from-scratch starts without pretrained weights" if from_scratch else "--vlm brings every part"
        raise UsageError(f"{whole}: leave out {parts[0]}")
    kind = recipe.decoder["kind"]
    pretrained = (decoder or recipe.decoder.get("source")) and not from_scratch
    if max_positions and pretrained and not vlm and kind != "llama":
        raise UsageError(
            f"--max-seq-len: the positions of a pretrained {kind} are learnt, as many as it has: leave it out"
        )


def _of_vlm(recipe: Recipe, vlm: str, split: bool | None, say: Callable[[str], None]) -> Recipe:
    """`smolvlm.with_vlm`; `say` is told which sizes are not the recipe's."""
    from .smolvlm import with_vlm

    before = recipe if split is None else _with(recipe, "encoder", tile=0)
    recipe = with_vlm(before, vlm)
    sizes = {
        "data.image_size": [each.data.image_size for each in (before, recipe)],
        "encoder.tile": [each.encoder.tile for each in (before, recipe)],
        "decoder.max_positions": [each.decoder.get("max_positions") for each in (before, recipe)],
    }
    for key, (asked, has) in sizes.items():
        if asked not in (None, has) and split is None:
            say(f"vlm {vlm}: {key} is {has}, not {asked}")
    return recipe


def _split(recipe: Recipe, split: bool, image_size: int | None) -> Recipe:
    """The recipe with photos in tiles of the encoder's own size, or whole."""
    if recipe.encoder.kind != "siglip":
        option = "--split-image" if split else "--no-split-image"
        raise UsageError(f"{option}: a {recipe.encoder.kind} encoder splits no photos, SmolVLM's (siglip) does")
    from .smolvlm import native_side

    native = native_side(recipe)
    if not split:
        if image_size and image_size > native:
            raise UsageError(f"--no-split-image: the encoder sees photos of at most {native} px, not {image_size}")
        return _with(_with(recipe, "encoder", tile=0), "data", image_size=min(recipe.data.image_size, native))
    side = image_size or TILES * native
    if side % native or side == native:
        raise UsageError(f"--split-image: photos of {side} px are not whole tiles of {native}, two a side or more")
    return _with(_with(recipe, "encoder", tile=native), "data", image_size=side)


def _own_configuration(
    recipe: Recipe, overrides: Sequence[str], image_size: int | None, say: Callable[[str], None]
) -> Recipe:
    """Of the recipe's encoder.config, which pretrained weights do not follow, only the size that photos are to have."""
    source, config = recipe.encoder.source, recipe.encoder.config
    side = "encoder.config.image_size"
    said = [item.partition("=")[0] for item in overrides if item.startswith("encoder.config")]
    if any(key != side for key in said):
        raise UsageError(f"encoder {source} has a configuration of its own: leave out --set encoder.config")
    wanted = {recipe.data.image_size, recipe.encoder.tile} if not said else {config["image_size"]}
    kept = {"image_size": config["image_size"]} if config.get("image_size") in wanted else {}
    if config != kept:
        say(f"encoder {source}: its own configuration is used, not the recipe's encoder.config")
    return _with(recipe, "encoder", config=kept)


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
