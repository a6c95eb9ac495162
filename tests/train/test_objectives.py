"""The losses against plain PyTorch and against what they are meant to do."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from edgecap.benchmarks.datasets import open_dataset
from edgecap.train.batches import Batch, EpochPlan, encode_captions
from edgecap.train.objectives import END, CrossEntropy, SelfCritical
from edgecap.train.settings import Stage
from edgecap.train.tokenizer import caption_text, train_tokenizer

from .tiny import SIZE, tiny_model, tiny_recipe


def world(samples: int = 4):
    recipe = tiny_recipe()
    examples = list(open_dataset("scenes:train=6,val=2,test=2,size=64").splits["train"])
    tokenizer = train_tokenizer([caption_text(c) for e in examples for c in e.captions], recipe.tokenizer)
    ids = encode_captions(examples, tokenizer, max_length=12, captions=3)
    model = tiny_model("gru", vocab_size=tokenizer.get_vocab_size())
    pixels = torch.randint(0, 256, (6, SIZE, SIZE, 3), dtype=torch.uint8)
    batch = Batch(torch.from_numpy(ids), np.arange(6), pixels=pixels)
    stage = Stage(samples=samples, label_smoothing=0.1)
    return recipe, stage, tokenizer, examples, model, batch


def test_cross_entropy_is_pytorch_over_padded_captions() -> None:
    recipe, stage, tokenizer, examples, model, batch = world()
    objective = CrossEntropy(recipe, stage, tokenizer, examples)
    loss, _ = objective.loss(model, model, batch)
    targets = batch.ids[:, :, 1:].clone()
    logits = model(batch.inputs, pixels=batch.pixels)
    plain = F.cross_entropy(
        logits.flatten(0, 2), targets.flatten(), ignore_index=-1, label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-3)
    assert objective.count(batch.ids) == int((targets >= 0).sum())


class Wants:
    """A reward of its own: how much of a caption is one word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def score(self, photos: list[int], captions: list[list[str]]) -> np.ndarray:
        return np.array([caption.count(self.word) / len(caption) for caption in captions])


def test_self_critical_raises_what_is_rewarded() -> None:
    recipe, stage, tokenizer, examples, model, batch = world()
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    objective.reward = Wants("the")
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=1e-2)
    rewards = []
    for _ in range(40):
        loss, figures = objective.loss(model, model, batch)
        optimizer.zero_grad()
        (loss / objective.count(batch.ids)).backward()
        optimizer.step()
        rewards.append(figures["reward"])
    assert np.mean(rewards[-8:]) > 2 * np.mean(rewards[:8]) + 0.1


def test_samples_follow_the_model_and_end_once() -> None:
    recipe, stage, tokenizer, examples, model, batch = world()
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    torch.manual_seed(1)
    one = Batch(batch.ids[:1], batch.photos[:1], pixels=batch.pixels[:1])
    objective.samples = 4000
    ids, words = objective.sample(model, one)
    eos = tokenizer.token_to_id("<eos>")
    assert ids.shape == (1, 4000, 14)
    ended = 0
    for line, said in zip(ids[0].tolist(), words, strict=True):
        if eos in line:
            end, ended = line.index(eos), ended + 1
            assert set(line[end + 1 :]) <= {-1} and -1 not in line[:end] and said[-1] == END
        else:  # cut at 12 words: no end that nobody drew, neither in the reward nor in the loss
            assert line[13] == -1 and -1 not in line[:13] and END not in said
    assert 0 < ended < 4000
    # The first word's frequencies are the model's probabilities (pad, bos and unknown left out).
    logits = torch.from_numpy(model.session().start(one.pixels.numpy()))[0]
    logits[[0, 1, 3]] = -1e9
    expected = logits.softmax(0).numpy()
    seen = np.bincount(ids[0, :, 1].numpy(), minlength=len(expected)) / 4000
    assert np.abs(seen - expected).max() < 0.04


def test_references_score_high_in_the_reward() -> None:
    recipe, stage, tokenizer, examples, model, batch = world()
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    own = [caption_text(e.captions[0]).split() + [END] for e in examples]
    right = objective.reward.score(range(6), own)
    wrong = objective.reward.score(range(6), own[1:] + own[:1])
    assert right.mean() > 2 * wrong.mean()


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
