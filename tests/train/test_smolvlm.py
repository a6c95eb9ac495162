"""SmolVLM out of the grid's parts: prompt, logits and captions as transformers' own, from the same files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgecap.runtime.decode import DecodeOptions, decode, never_said
from edgecap.runtime.errors import UsageError
from edgecap.train.checkpoint import model_for
from edgecap.train.models import CaptionModel
from edgecap.train.models.language_model import PHOTO
from edgecap.train.models.tiles import split
from edgecap.train.prepare import prepare_recipe, without_sources
from edgecap.train.pretrained import open_captions
from edgecap.train.settings import Recipe
from edgecap.train.smolvlm import with_vlm
from edgecap.train.tokenizer import token_ids

from .tiny import tiny_recipe
from .vlms import NATIVE, PATCH, SCALE, SPECIAL, expected, load_vlm, pictures, save_vlm

CHAT = "describe this picture, in 15 words"
CASES = {"unsplit": (NATIVE, 0), "smaller": (32, 0), "2 × 2 tiles": (96, 48), "3 × 3 smaller tiles": (96, 32)}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("smolvlm"))


def recipe_of(source: Path, side: int = NATIVE, tile: int = 0) -> Recipe:
    recipe = tiny_recipe(image_size=side)
    recipe = dataclasses.replace(
        recipe,
        encoder=dataclasses.replace(recipe.encoder, tile=tile),
        prompt=dataclasses.replace(recipe.prompt, chat=CHAT),
    )
    return with_vlm(recipe, str(source))


def open_model(recipe: Recipe) -> tuple[CaptionModel, Recipe, dict[str, int]]:
    tokenizer, recipe = open_captions(recipe, [])
    tokens = token_ids(tokenizer, recipe.tokenizer.ids)
    return model_for(recipe, tokens, load_weights=True), recipe, tokens


def prompt_ids(recipe: Recipe, tokens: dict[str, int], each: int) -> list[int]:
    """The prompt as transformers writes it: an <image> for each embedding, and what BOS stands for behind."""
    image = SPECIAL.index("<image>")
    prompt = [i for token in recipe.decoder["prompt"] for i in ([image] * each if token == PHOTO else [token])]
    return [*prompt, tokens["bos"]]


@pytest.mark.parametrize("case", CASES)
def test_prompt_logits_and_greedy_captions_are_those_of_transformers(vlm: Path, case: str) -> None:
    side, tile = CASES[case]
    model, recipe, tokens = open_model(recipe_of(vlm, side, tile))
    photos = pictures(3, side)
    theirs, fed = load_vlm(vlm), expected(vlm, photos, tile, CHAT)

    each = ((tile or side) // PATCH // SCALE) ** 2
    prompt = prompt_ids(recipe, tokens, each)
    assert prompt == fed["input_ids"][0].tolist()

    if tile:  # the same photos for both, where float32 rounds a value of the overview another way than Pillow
        frames = split(torch.from_numpy(photos).permute(0, 3, 1, 2).float(), tile) * model.encoder.scale
        frames = (frames + model.encoder.shift).view_as(fed["pixel_values"])
        assert (frames - fed["pixel_values"]).abs().max() < 1.01 / 127.5
        assert (frames - fed["pixel_values"]).abs().gt(0.001).float().mean() < 1e-3
        fed["pixel_values"] = frames
    captions = torch.randint(len(SPECIAL), tokens["vocab_size"], (3, 6), generator=torch.Generator().manual_seed(1))
    whole = torch.cat((fed["input_ids"], captions), 1)
    with torch.no_grad():
        wanted = theirs(**{**fed, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
        bos = torch.full((3, 1), tokens["bos"])
        logits = model(torch.cat((bos, captions), 1).unsqueeze(1), pixels=torch.from_numpy(photos)).squeeze(1)
    wanted = wanted[:, len(prompt) - 1 :]
    assert wanted.std() > 0.3  # a parity of nothing but zeros would say nothing
    assert (wanted[0] - wanted[1]).abs().max() > 0.01  # and the photos count
    assert (logits - wanted).abs().max() < 1e-4

    with torch.no_grad():
        said = theirs.generate(
            **fed,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=tokens["eos"],
            suppress_tokens=list(never_said(tokens)),
        )[:, len(prompt) :]
    options = DecodeOptions(max_length=8)
    ours = decode(model.session(), photos, options, eos_id=tokens["eos"], suppress=never_said(tokens))
    for row, best in zip(said.tolist(), ours, strict=True):
        assert list(best[0].token_ids) == [i for i in row if i not in (tokens["eos"], tokens["pad"])]


@pytest.mark.parametrize(("kind", "tied", "shard"), [("idefics3", True, "1GB"), ("smolvlm", False, "20KB")])
def test_idefics3_tied_models_and_shards_load_too(tmp_path: Path, kind: str, tied: bool, shard: str) -> None:
    folder = save_vlm(tmp_path, kind, tied=tied, shard=shard, seed=3)
    assert (folder / "model.safetensors.index.json").is_file() == (shard != "1GB")
    model, recipe, tokens = open_model(recipe_of(folder))
    assert recipe.decoder["tied"] == tied
    photos = pictures(2, NATIVE, seed=4)
    fed = expected(folder, photos, 0, CHAT)
    with torch.no_grad():
        wanted = load_vlm(folder)(**fed).logits[:, -1]
        logits = model(torch.full((2, 1, 1), tokens["bos"]), pixels=torch.from_numpy(photos))[:, 0, 0]
    assert (logits - wanted).abs().max() < 1e-4


def test_a_checkpoint_is_rebuilt_without_its_source(vlm: Path) -> None:
    model, recipe, tokens = open_model(recipe_of(vlm, 96, 32))
    recipe = dataclasses.replace(
        recipe, encoder=dataclasses.replace(recipe.encoder, config=model.encoder.settings(), source="gone")
    )
    again = model_for(recipe, tokens, load_weights=False)
    again.load_state_dict(model.state_dict())
    pixels = torch.from_numpy(pictures(2, 96))
    with torch.no_grad():
        assert torch.equal(again.photo(pixels=pixels)["prefix"], model.photo(pixels=pixels)["prefix"])
        # The frozen encoder's features are what stages cache.
        features = model.encoder(pixels)
        assert features.shape == (2, 10 * 16, 32)
        assert torch.equal(model.photo(features=features)["prefix"], model.photo(pixels=pixels)["prefix"])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_overview_is_pillows_lanczos_and_tiles_are_whole(k: int) -> None:
    photo = pictures(1, 24 * k, seed=k)[0]
    frames = split(torch.from_numpy(photo)[None].permute(0, 3, 1, 2).float(), 24).permute(0, 2, 3, 1).numpy()
    assert len(frames) == k * k + 1
    assert np.array_equal(frames[k + 1], photo[24:48, 24:48])
    theirs = np.asarray(Image.fromarray(photo).resize((24, 24), Image.Resampling.LANCZOS)).astype(np.float32)
    difference = np.abs(frames[-1] - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.002  # of 255


def test_sizes_that_the_model_cannot_see_become_its_own(vlm: Path) -> None:
    assert recipe_of(vlm, 64).data.image_size == NATIVE  # larger
    assert recipe_of(vlm, 40).data.image_size == NATIVE  # 5 patches a side, of which two make one
    assert recipe_of(vlm, 32).data.image_size == 32
    split = recipe_of(vlm, 512, 256)
    assert (split.data.image_size, split.encoder.tile) == (96, 48)


def test_splitting_is_a_choice_of_the_command_line(vlm: Path, tmp_path: Path) -> None:
    file, said = tmp_path / "tiny.toml", []
    file.write_text(tiny_recipe(image_size=32).to_toml())
    options: dict[str, Any] = {"data": None, "encoder": None, "overrides": (), "skip_bad": False, "seed": None}

    def sizes(name: Path = file, **more: Any) -> tuple[int, int]:
        recipe = prepare_recipe(str(name), **{**options, "vlm": str(vlm), "say": said.append, **more})
        return recipe.data.image_size, recipe.encoder.tile

    assert sizes(split=True) == (4 * NATIVE, NATIVE)
    assert sizes(split=True, image_size=2 * NATIVE) == (2 * NATIVE, NATIVE)
    assert sizes(split=False) == (32, 0) and sizes() == (32, 0) and not said
    assert sizes(split=True, from_scratch=True) == (4 * NATIVE, NATIVE)
    tiled = tmp_path / "tiled.toml"
    recipe = prepare_recipe(str(file), **{**options, "vlm": str(vlm), "split": True})
    tiled.write_text(recipe.to_toml())
    assert sizes(tiled, vlm=None) == (4 * NATIVE, NATIVE) and sizes(tiled, vlm=None, split=False) == (NATIVE, 0)
    _, recipe, _ = open_model(prepare_recipe(str(tiled), **options, split=True, image_size=2 * NATIVE))
    assert recipe.bridge["frames"] == 5
    for more, match in (
        ({"split": True, "vlm": None}, "--split-image: a mobilenet_v2 encoder splits no photos"),
        ({"split": False, "vlm": None}, "--no-split-image: a mobilenet_v2"),
        ({"split": True, "image_size": NATIVE}, f"photos of {NATIVE} px are not whole tiles of {NATIVE}, two a side"),
        ({"split": True, "image_size": 100}, "photos of 100 px are not whole tiles"),
        ({"split": False, "image_size": 96}, f"at most {NATIVE} px, not 96"),
        ({"image_size": 96}, f"--image-longest-edge 96: .* sees photos of {NATIVE} px; give that, or --split-image"),
    ):
        with pytest.raises(UsageError, match=match):
            sizes(**more)
    assert (
        sizes(overrides=("data.image_size=96",)) == (NATIVE, 0) and f"data.image_size is {NATIVE}, not 96" in said[-1]
    )


def test_from_scratch_it_has_the_sizes_of_its_source(vlm: Path) -> None:
    theirs, _, _ = open_model(recipe_of(vlm))
    ours, recipe, _ = open_model(without_sources(recipe_of(vlm)))
    assert not recipe.encoder.source and "source" not in recipe.decoder and recipe.tokenizer.kind == "bpe"
    assert {name: p.shape for name, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_what_does_not_fit_is_one_line(vlm: Path, tmp_path: Path) -> None:
    recipe = recipe_of(vlm, 96, 32)
    short = dataclasses.replace(recipe, decoder={**recipe.decoder, "max_positions": 100})
    with pytest.raises(UsageError, match=r"photo of 40 .*max_positions = 100: raise --max-seq-len, or lower"):
        open_model(short)
    many = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, image_size=128),
        encoder=dataclasses.replace(recipe.encoder, tile=32),
    )
    with pytest.raises(UsageError, match="no <row_1_col_4>"):
        open_model(many)
    odd = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, image_size=80))
    with pytest.raises(UsageError, match="not whole tiles of 32"):
        open_model(odd)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="is a llama model"):
        with_vlm(recipe, str(tmp_path))
