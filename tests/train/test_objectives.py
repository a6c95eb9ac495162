"""The losses against plain PyTorch and against what they are meant to do."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from edgecap.benchmarks.datasets import open_dataset
from edgecap.train.data.batches import EpochPlan, encode_captions
from edgecap.train.objectives import CrossEntropy
from edgecap.train.tokenizer import caption_text, train_tokenizer

from .tiny import tiny_recipe, tiny_world


def test_cross_entropy_is_pytorch_over_padded_captions() -> None:
    recipe, stage, tokenizer, examples, model, batch = tiny_world()
    objective = CrossEntropy(recipe, stage, tokenizer, examples)
    loss, _ = objective.loss(model, model, batch)
    targets = batch.ids[:, :, 1:].clone()
    logits = model(batch.inputs, pixels=batch.pixels)
    plain = F.cross_entropy(
        logits.flatten(0, 2), targets.flatten(), ignore_index=-1, label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-3)
    assert objective.count(batch.ids) == int((targets >= 0).sum())


def test_epochs_cover_every_photo_and_repeat_by_number() -> None:
    plan = EpochPlan(23, 5, (7, 0), views=2)
    epochs = [list(plan.epoch(number)) for number in (0, 0, 1)]
    places = [np.concatenate([p for p, _ in epoch]) for epoch in epochs]
    assert all(sorted(p) == list(range(23)) for p in places)
    assert (places[0] == places[1]).all() and (places[0] != places[2]).any()
    views = [np.concatenate([v for _, v in epoch]) for epoch in epochs]
    assert (views[0] == views[1]).all() and all(set(v.tolist()) == {0, 1} for v in views)
    assert len(set(epochs[0][0][1].tolist())) == 2  # photo by photo, not batch by batch


def test_mirrored_captions_swap_sides() -> None:
    examples = list(open_dataset("scenes:train=60,val=2,test=2,size=64").splits["train"])
    tokenizer = train_tokenizer([caption_text(c) for e in examples for c in e.captions], tiny_recipe().tokenizer)
    plain = encode_captions(examples, tokenizer, max_length=30, captions=5)
    mirrored = encode_captions(examples, tokenizer, max_length=30, captions=5, mirrored=True)
    left, right = tokenizer.token_to_id("left"), tokenizer.token_to_id("right")
    swapped = plain.copy()
    swapped[plain == left], swapped[plain == right] = right, left
    assert (plain == left).any() and (swapped == mirrored).all()
