"""Self-critical training: what is drawn, what it is rewarded with, and what is learnt from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgecap.benchmarks.metrics import sentence_bleu
from edgecap.runtime.errors import UsageError
from edgecap.train import loop
from edgecap.train.checkpoint import read_metrics
from edgecap.train.data.augment import mirrored_text
from edgecap.train.data.batches import Batch
from edgecap.train.objectives.scst import END, SelfCritical, draw
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train
from edgecap.train.settings import Stage
from edgecap.train.tokenizer import caption_text

from .tiny import Killed, tiny_recipe, tiny_world, with_kills


class Wants:
    """A reward of its own: how much of a caption is one word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def score(self, photos: list[int], captions: list[list[str]]) -> np.ndarray:
        return np.array([caption.count(self.word) / len(caption) for caption in captions])


def test_a_killed_epoch_tells_its_whole_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe({"objective": "scst", "epochs": 1, "batch_size": 24, "lr": 1e-3, "samples": 2})
    _, whole = train(recipe, tmp_path / "whole")

    def killed(self: loop.Trainer, stage: Stage) -> None:
        monkeypatch.setattr(loop.Trainer, "_validate", validate)
        raise Killed

    # In the middle of the epoch, then between its last step and its validation.
    validate, out = loop.Trainer._validate, tmp_path / "killed"
    monkeypatch.setattr(loop.Trainer, "_validate", killed)
    lives = with_kills(monkeypatch, lambda begun: train(None if begun else recipe, out, resume=begun), (1, 9, 0))
    (record,), (wanted,) = read_metrics(out)["history"], whole["history"]
    assert lives == 3 and record.keys() == wanted.keys() and record["captions_per_second"] > 0
    assert record["reward"] == wanted["reward"] != 0


def test_self_critical_raises_what_is_rewarded() -> None:
    recipe, stage, tokenizer, examples, model, batch = tiny_world()
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    objective.cider = Wants("the")
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
    recipe, stage, tokenizer, examples, model, batch = tiny_world()
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    torch.manual_seed(1)
    one = Batch(batch.ids[:1], batch.photos[:1], pixels=batch.pixels[:1])
    objective.samples = 4000
    ids, words, _ = objective.sample(model, one)
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
    recipe, stage, tokenizer, examples, model, batch = tiny_world()
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    own = [caption_text(e.captions[0]).split() + [END] for e in examples]
    right = objective.cider.score(range(6), own)
    wrong = objective.cider.score(range(6), own[1:] + own[:1])
    assert right.mean() > 2 * wrong.mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("decoder", ["gru", "lstm"])
def test_learning_while_drawing_is_learning_from_what_was_drawn(decoder: str) -> None:
    """One pass gives the loss and the gradients of teacher forcing on the same captions."""
    recipe, stage, tokenizer, examples, model, batch = tiny_world(decoder=decoder)
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    torch.manual_seed(3)
    loss, figures = objective.loss(model, model, batch)
    loss.backward()
    one = gradients(model)
    model.zero_grad()

    class Wrapped(nn.Module):  # as processes that share their gradients have it
        def forward(self, *args: torch.Tensor, **view: torch.Tensor) -> torch.Tensor:
            return model(*args, **view)

    torch.manual_seed(3)
    again, same = objective.loss(model, Wrapped(), batch)
    again.backward()
    assert figures == same and objective.reward_seconds > 0
    torch.testing.assert_close(loss, again, rtol=1e-4, atol=1e-4)
    two = gradients(model)
    assert one.keys() == two.keys() and any(name.startswith("bridge") for name in one)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-3, atol=1e-3 * float(two[name].abs().max()))


@pytest.mark.parametrize("decoder", ["transformer", "gpt2"])
def test_decoders_that_keep_no_steps_learn_from_a_second_pass(decoder: str) -> None:
    recipe, stage, tokenizer, examples, model, batch = tiny_world(decoder=decoder)
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    ids, _, logprob = objective.sample(model, batch)
    assert not logprob.requires_grad
    forced = objective.logprob(model, dataclasses.replace(batch, ids=ids))
    torch.testing.assert_close(forced.detach(), logprob, rtol=1e-4, atol=1e-3)
    objective.loss(model, model, batch)[0].backward()
    assert gradients(model)


def test_words_are_drawn_by_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1e9, 2.0, -1e9]).expand(20_000, -1)
    seen = np.bincount(draw(logits.log_softmax(1)).numpy(), minlength=5) / 20_000
    assert np.abs(seen - logits[0].softmax(0).numpy()).max() < 0.01 and seen[2] == seen[4] == 0


def test_mirrored_photos_are_rewarded_for_their_own_sides() -> None:
    recipe, stage, tokenizer, examples, model, batch = tiny_world(samples=2)
    said = [(place, caption_text(c)) for place, e in enumerate(examples) for c in e.captions]
    place, text = next((place, text) for place, text in said if "left" in text.split())
    objective = SelfCritical(recipe, stage, tokenizer, examples)
    words = [text.split() + [END], mirrored_text(text).split() + [END]]
    one = Batch(batch.ids[:1], np.array([place]))
    (plain,), _ = objective.reward(one, words)
    (turned,), _ = objective.reward(dataclasses.replace(one, mirrored=np.array([True])), words)
    assert plain[0] > plain[1] and turned.tolist() == plain.tolist()[::-1]


def test_bleu_joins_the_reward_on_ciders_scale() -> None:
    recipe, stage, tokenizer, examples, model, batch = tiny_world(samples=2)
    own = [caption_text(c).split() + [END] for e in examples for c in e.captions[:2]]
    plain, mixed = (
        SelfCritical(recipe, dataclasses.replace(stage, bleu=bleu), tokenizer, examples) for bleu in (0.0, 0.3)
    )
    alone, figures = plain.reward(batch, own)
    both, parts = mixed.reward(batch, own)
    torch.testing.assert_close(both, alone + 3)  # a reference has a BLEU of 1
    assert parts["sentence_bleu4"] == 1 and parts["cider_d"] == figures["reward"] and set(figures) == {"reward"}
    wrong = own[2:] + own[:2]
    bleu = sentence_bleu(mixed.cider, np.arange(6).repeat(2), wrong)
    torch.testing.assert_close(
        mixed.reward(batch, wrong)[0], plain.reward(batch, wrong)[0] + 3 * torch.from_numpy(bleu).float().view(6, 2)
    )


def test_a_run_tells_how_many_captions_it_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    words = {"epochs": 1, "batch_size": 16, "lr": 3e-3}
    critical = {**words, "objective": "scst", "samples": 3, "accumulate": 2, "bleu": 0.2}
    lines: list[str] = []
    _, metrics = train(tiny_recipe(words, critical, flip=True), tmp_path / "run", say=lines.append)
    first, second = metrics["history"]
    assert 0 < first["step_seconds"] < first["seconds"] and "captions_per_second" not in first
    assert second["captions_per_second"] == pytest.approx(48 * 3 / second["step_seconds"], rel=0.2)
    assert 0 <= second["reward_seconds"] <= second["step_seconds"]
    assert sum("captions/s" in line for line in lines) == 1


@pytest.mark.parametrize("stage", [{"objective": "scst", "bleu": 1.5}, {"bleu": 0.5}])
def test_bleu_that_cannot_count_is_refused(stage: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"stages\.0\.bleu .* must be in \[0, 1\], with objective = scst"):
        recipe_from_dict({"stages": [stage]})
