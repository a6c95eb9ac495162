"""Varied views of photos, and encoders of which only the upper blocks learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgecap.benchmarks.datasets import Example, open_dataset
from edgecap.runtime.errors import UsageError
from edgecap.train.checkpoint import WEIGHTS, load_checkpoint, preprocess_for
from edgecap.train.data import batches, cache, features
from edgecap.train.data.augment import PLAIN, View, vary, views_of
from edgecap.train.data.batches import Photos, encode_captions, encoder_digest
from edgecap.train.data.features import FeatureExtractor, quick
from edgecap.train.data.material import Material, seen_in
from edgecap.train.models.captioner import build_encoder
from edgecap.train.optim import frozen_blocks, make_optimizer
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.settings import Augment, EncoderSettings, Recipe, Stage
from edgecap.train.tokenizer import caption_text, train_tokenizer

from .tiny import SCENES, SIZE, Killed, tiny_model, tiny_recipe, with_kills

QUIET = lambda phase, done, total: None  # noqa: E731
VIT = {"kind": "vit", "config": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                                 "intermediate_size": 48, "image_size": SIZE, "patch_size": 16}}  # fmt: skip
PARTS = ("train", "val")
FEW = "scenes:train=24,val=4,test=4,size=64"
TOP = {"batch_size": 12, "lr": 1e-3, "encoder_lr": 1e-3, "keep_every": 1}
STAGES = (
    {"name": "words", "epochs": 3, "batch_size": 12, "lr": 3e-3, "keep_every": 3},
    {**TOP, "name": "top", "epochs": 2, "unfreeze_blocks": 2},
    {**TOP, "name": "more", "epochs": 1, "unfreeze_blocks": 5},
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


def with_views(recipe: Recipe, **augment: object) -> Recipe:
    return dataclasses.replace(recipe, augment=Augment(**augment))


def photo(side: int = 80) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side + 20, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_view_is_drawn_from_its_number_alone() -> None:
    draw = lambda seed, **how: vary(photo(), Augment(**how), np.random.default_rng(seed))  # noqa: E731
    assert np.array_equal(draw(1), draw(1)) and draw(1).size != draw(2).size
    assert np.array_equal(draw(1, crop=1.0, rotate=0.0, color_jitter=0.0), photo())
    areas = [np.prod(draw(seed, crop=0.4, rotate=0.0, color_jitter=0.0).size) / (80 * 100) for seed in range(40)]
    assert 0.38 < min(areas) < 0.55 and 0.85 < max(areas) <= 1.01
    light = [np.asarray(draw(seed, crop=1.0, rotate=0.0, color_jitter=0.3)).mean() for seed in range(20)]
    plain = np.asarray(photo()).mean()
    assert min(light) < 0.85 * plain and 1.1 * plain < max(light)
    turned = draw(3, crop=1.0, color_jitter=0.0, rotate=10.0)
    assert turned.size == photo().size and not np.array_equal(turned, photo())


def test_views_are_cached_apart_and_every_second_is_mirrored() -> None:
    recipe = with_views(tiny_recipe(flip=True), views=2)
    data = open_dataset(SCENES)
    photos = Photos(data, "train", recipe, preprocess_for(recipe))
    views = views_of(recipe)
    assert [view.mirrored for view in views] == [False, True, False, True]
    rows = [photos.pixels(view=view, progress=QUIET) for view in views]
    assert np.array_equal(rows[0][:, :, ::-1], rows[1])
    assert all(not np.array_equal(rows[0], other) for other in rows[2:])
    again = Photos(data, "train", with_views(recipe, views=5), preprocess_for(recipe))
    assert np.array_equal(again.pixels(view=views[3], progress=QUIET), rows[3])
    other = Photos(data, "train", with_views(recipe, views=2, crop=0.9), preprocess_for(recipe))
    assert not np.array_equal(other.pixels(view=views[3], progress=QUIET), rows[3])
    assert np.array_equal(other.pixels(view=views[1], progress=QUIET), rows[1])


def test_captions_that_name_a_side_can_be_dropped() -> None:
    examples = [
        Example("a", ("a dog left of a cat", "a dog", "a cat to the right")),
        Example("b", ("a bird on the left",)),
    ]
    said = [caption_text(caption) for example in examples for caption in example.captions]
    tokenizer = train_tokenizer(said, tiny_recipe().tokenizer)
    ids = encode_captions(examples, tokenizer, max_length=8, captions=3, mirrored=True, sides="drop")
    texts = [[tokenizer.decode([i for i in row if i >= 0]) for row in rows] for rows in ids.tolist()]
    # A photo of which nothing would be left keeps its captions, with the sides swapped.
    assert texts == [["a dog", "", ""], ["a bird on the right", "", ""]]


@pytest.mark.parametrize(
    "bad", [{"crop": 0.0}, {"crop": 1.5}, {"color_jitter": 1.0}, {"sides": "mirror"}, {"views": -1}]
)
def test_impossible_views_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="augment"):
        recipe_from_dict({"augment": bad})


def test_the_trunk_and_the_rest_are_the_encoder() -> None:
    encoder = tiny_model("gru").encoder
    pixels = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.inference_mode():
        whole = encoder(pixels)
        for links in (0, 1, 9, len(encoder.chain)):
            encoder.trunk = links
            assert torch.equal(encoder.upper(encoder.lower(pixels)), whole)


def test_only_the_upper_blocks_learn_and_the_others_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_views(tiny_recipe(*STAGES, spec=FEW), views=1)
    sees = set()
    batch = Material.batch

    def watched(self: Material, *args: object) -> object:
        sees.add((self.number, self.sees, self.trunk))
        return batch(self, *args)

    monkeypatch.setattr(Material, "batch", watched)
    out, metrics = train(recipe, tmp_path / "a")
    blocks = len(tiny_model("gru").encoder.blocks())
    trunk = 1 + blocks - 5
    assert sees == {(0, "features", trunk), (1, "trunk", trunk), (2, "trunk", trunk)}
    assert [record["stage"] for record in metrics["history"]] == [*["words"] * 3, "top", "top", "more"]

    def changed(first: str, then: str) -> set[str]:
        """Numbers of the blocks that differ, "" for the last convolution."""
        one, two = (load_checkpoint(out / "kept" / name).model.encoder.body.state_dict() for name in (first, then))
        names = [name for name in one if not torch.equal(one[name], two[name])]
        assert all(name.startswith(("layer.", "conv_1x1.")) for name in names)
        return {name.partition("layer.")[2].partition(".")[0] for name in names}

    assert changed("1-words-003", "2-top-001") == {str(n) for n in (blocks - 2, blocks - 1)} | {""}
    assert changed("1-words-003", "3-more-001") == {str(n) for n in range(blocks - 5, blocks)} | {""}

    # Killed after every fifth step, it ends with the same bits.
    lives = with_kills(
        monkeypatch, lambda begun: train(None if begun else recipe, tmp_path / "b", resume=begun), repeat(5)
    )
    assert lives > 2 and (tmp_path / "b" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


def test_an_encoder_that_is_no_chain_unfreezes_from_the_top_too() -> None:
    model = tiny_model("gru")
    model.encoder = build_encoder(VIT)
    stage = Stage(encoder_lr=1e-4, unfreeze_blocks=1)
    assert frozen_blocks(model.encoder, [stage]) == 0  # its pixels are seen
    make_optimizer(model, stage)
    learning = {name for name, parameter in model.encoder.body.named_parameters() if parameter.requires_grad}
    assert learning and all(".2." in name or "layernorm" in name for name in learning)
    make_optimizer(model, dataclasses.replace(stage, unfreeze_blocks=0))
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())


def test_the_trunk_is_what_no_stage_trains() -> None:
    encoder = tiny_model("gru").encoder
    blocks, frozen = len(encoder.blocks()), Stage()
    some, more, whole = (Stage(encoder_lr=1e-4, unfreeze_blocks=blocks) for blocks in (2, 4, 0))
    assert frozen_blocks(encoder, [frozen]) == frozen_blocks(encoder, [frozen, some, whole]) == 0
    assert frozen_blocks(encoder, [frozen, some]) == 1 + blocks - 2
    assert frozen_blocks(encoder, [some, frozen, more]) == 1 + blocks - 4
    with pytest.raises(UsageError, match=f"unfreeze_blocks = {blocks + 1}: the encoder has {blocks} blocks"):
        frozen_blocks(encoder, [Stage(encoder_lr=1e-4, unfreeze_blocks=blocks + 1)])


def test_a_frozen_stage_of_few_epochs_and_many_views_sees_the_trunk() -> None:
    seen = [seen_in(Stage(epochs=epochs), trunk, views) for epochs, trunk, views in ((4, 5, 3), (3, 5, 3), (1, 0, 3))]
    assert seen == ["features", "trunk", "features"]
    learning = Stage(epochs=9, encoder_lr=1e-4)
    assert [seen_in(learning, trunk, 1) for trunk in (5, 0)] == ["trunk", "pixels"]


def test_many_photos_are_seen_by_a_faster_engine_that_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_model("gru").encoder
    encoder.trunk = 3
    pixels = torch.randint(0, 256, (5, SIZE, SIZE, 3), dtype=torch.uint8)
    engine = quick(encoder.lower, encoder, pixels[:2])
    assert engine is not encoder.lower
    with torch.inference_mode():
        wanted = encoder.lower(pixels)
    assert (engine(pixels) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # What cannot be exported, or comes out otherwise, stays with torch.
    broken = lambda photos: photos * 2.0 if int(photos.sum()) % 2 else photos * 1.0  # noqa: E731
    assert quick(broken, encoder, pixels) is broken
    monkeypatch.setattr(
        "edgecap.train.data.features._engine", lambda module, photos: lambda seen: encoder.lower(seen) + 1
    )
    look = encoder.lower
    assert quick(look, encoder, pixels) is look


def test_the_engine_is_chosen_once_for_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the last chunk of a large split, a run goes on with the same engine; a small split keeps torch's."""
    made = []

    def other(module: torch.nn.Module, pixels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        made.append(len(pixels))
        return lambda seen: module(seen) * 1.0005  # near enough, and told from torch

    monkeypatch.setattr(features, "_engine", other)
    monkeypatch.setattr(batches, "MANY", 40)
    monkeypatch.setattr(cache, "FLUSH", 16)
    recipe = dataclasses.replace(tiny_recipe({"epochs": 1, "batch_size": 16}), encoder=EncoderSettings(**VIT))
    first, _ = train(recipe, tmp_path / "first")
    assert made == [16]
    again, _ = train(recipe, tmp_path / "again")
    assert made == [16]  # what is whole needs no engine

    encoder = load_checkpoint(first).model.encoder
    extractor, key = FeatureExtractor(encoder, encoder), encoder_digest(encoder, "vit")
    train_photos, val = (Photos(open_dataset(SCENES), split, recipe, preprocess_for(recipe)) for split in PARTS)
    for photos, factor in ((train_photos, 1.0005), (val, 1.0)):
        with torch.inference_mode():
            wanted = encoder(torch.from_numpy(photos.load(slice(0, 16), PLAIN))) * factor
        assert np.array_equal(photos.known(key)[:16], wanted.half().numpy())
    assert len(train_photos) == 48 and len(val) == 16

    load = Photos.load

    def killed(self: Photos, part: slice, view: View) -> np.ndarray:
        if part.start == 32:
            raise Killed
        return load(self, part, view)

    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "another"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Photos, "load", killed)
        train(recipe, tmp_path / "killed")
    assert made == [16, 16]
    out, _ = train(None, tmp_path / "killed", resume=True)
    assert made == [16, 16, 16] and (out / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()

    # Where no engine can be made, what torch sees has another key.
    quickly = train_photos.known(key)
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    rows = train_photos.seen(FeatureExtractor(encoder, encoder), key, progress=QUIET)
    assert not np.array_equal(rows, quickly) and np.array_equal(rows, train_photos.known(key))
    assert np.array_equal(rows[:1], extractor(train_photos.load(slice(0, 1), PLAIN)))
