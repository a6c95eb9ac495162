"""Recipes say everything, and say clearly what is wrong with them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edgecap.runtime.errors import UsageError
from edgecap.train.recipe import load_recipe, recipe_from_dict, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_being_written(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe_from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_overrides_reach_every_place() -> None:
    recipe = load_recipe(
        "mobilenetv2-gru",
        ("stages.0.epochs=3", "data.spec=folder:my photos", "decoder.hidden=64", "data.flip=false", "stages.1.lr=1"),
    )
    assert recipe.stages[0].epochs == 3
    assert recipe.data.spec == "folder:my photos"
    assert recipe.decoder["hidden"] == 64
    assert recipe.data.flip is False
    assert recipe.stages[1].lr == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.colour=1", "unknown key data.colour"),
        ("stages.0.epochs=many", "must be of type int"),
        ("stages.7.epochs=1", "no such place"),
        ("stages.0.batch_size=0", "out of range"),
        ("stages.0.lr=-1", "out of range"),
        ('stages.0.schedule="zigzag"', "choices: constant, cosine"),
        ("seed", "KEY=VALUE"),
        ("stages=[]", "no \\[\\[stages\\]\\]"),
        ("decoder=3", "decoder must be a table"),
        ("data.image_size=true", "must be of type int"),
        ("decoder.heads=0", "decoder.heads = 0 is out of range"),
        ("decoder.hidden=-3", "decoder.hidden = -3 is out of range"),
        ("decoder.dropout=1.0", "must be in"),
        ("stages.0.label_smoothing=2", "must be in"),
        ("stages.0.epochs=0", "must be 1 or more"),
        ("stages.0.lr=nan", "out of range"),
        ("stages.0.curriculum=99", "stages.0.curriculum = 99 is more than the stage's epochs"),
        ("stages.0.unfreeze_blocks=2", "stages.0.unfreeze_blocks is of an encoder that learns"),
        ("stages.0.match=0.5", "stages.0.match is of an encoder that learns"),
    ],
)
def test_a_wrong_override_is_one_line(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe("mobilenetv2-gru", (override,))
    assert "\n" not in caught.value.message


def test_retrieval_watches_its_recall() -> None:
    with pytest.raises(UsageError, match="watch = cider is of captions"):
        load_recipe("query-bridge", ("watch=cider",))
    with pytest.raises(UsageError, match="augment.sides = drop is of captions"):
        load_recipe("query-bridge", ("augment.sides=drop",))


def test_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mobilenetv2-gru-small"):
        load_recipe("no-such-recipe")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe(str(tmp_path / "absent.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [")
    with pytest.raises(UsageError, match="broken.toml"):
        load_recipe(str(broken))
    broken.write_bytes('name = "größe"'.encode("latin-1"))
    with pytest.raises(UsageError, match="broken.toml cannot be read"):
        load_recipe(str(broken))
