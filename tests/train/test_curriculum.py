"""Simple captions come first, every photo keeps one, and in the end all are there."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecap.runtime.errors import UsageError
from edgecap.train.checkpoint import WEIGHTS
from edgecap.train.data.curriculum import START, Curriculum
from edgecap.train.data.material import Material
from edgecap.train.recipe import recipe_from_dict
from edgecap.train.run import train

from .tiny import tiny_recipe, tiny_world, with_kills

BOS, EOS, UNK = 1, 2, 3


def table(*photos: list[list[int]]) -> np.ndarray:
    """Captions of words, padded: int64 [N, C, T]."""
    ids = np.full((len(photos), max(map(len, photos)), 8), -1)
    for row, captions in enumerate(photos):
        for slot, words in enumerate(captions):
            ids[row, slot, : len(words) + 2] = [BOS, *words, EOS]
    return ids


def test_long_captions_and_rare_words_are_difficult() -> None:
    common, rare = [4, 5], [6]
    ids = table([common, common * 2, [4, 6]], [common, [4, 5, UNK, 4]], [common, common])
    curriculum = Curriculum(ids, 10, eos=EOS, unk=UNK)
    short, long, odd = curriculum.difficulty(ids)[0]
    assert 0 < short < min(long, odd) and max(long, odd) <= 1
    assert curriculum.difficulty(ids)[1, 1] > long  # as long, with a word that no vocabulary has
    assert curriculum.difficulty(ids)[1, 2] == np.inf
    assert curriculum.difficulty(table([rare], [common]))[0, 0] > 0  # of captions it was not made from, too


def test_competence_is_platanios_root() -> None:
    curriculum = Curriculum(table([[4]]), 100, eos=EOS, unk=UNK)
    assert curriculum.competence(0) == START and curriculum.competence(100) == curriculum.competence(500) == 1
    half = np.sqrt(0.5 * (1 - START**2) + START**2)
    assert curriculum.competence(50) == pytest.approx(half)


def test_captions_come_from_the_simplest_to_all() -> None:
    *_, batch = tiny_world()
    ids = batch.ids.numpy()
    curriculum = Curriculum(ids, 20, eos=EOS, unk=UNK)
    before = np.zeros(ids.shape[:2], bool)
    means = []
    for step in range(21):
        shown = curriculum.show(ids, step)
        there = shown[:, :, 0] >= 0
        assert (there | ~before).all() and there.any(1).all()  # none goes again, no photo has none
        assert (shown[there] == ids[there]).all() and (shown[~there] == -1).all()
        difficulty = curriculum.difficulty(ids)
        assert (difficulty[there].reshape(-1) <= max(curriculum.competence(step), difficulty.min(1).max())).all()
        means.append(difficulty[there].mean())
        before = there
    assert before.all() and means[0] < means[10] < means[20] and (curriculum.show(ids, 20) == ids).all()


def test_a_run_begins_simply_and_resumes_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe({"epochs": 3, "batch_size": 16, "lr": 3e-3, "curriculum": 2}, flip=True)
    learnt: dict[int, list[int]] = {}
    draw = Material.captions

    def watched(self: Material, places: np.ndarray, views: np.ndarray, step: int) -> torch.Tensor:
        drawn = draw(self, places, views, step)
        there = drawn[:, :, 0] >= 0
        assert there.any(1).all() and (there[:, :-1] >= there[:, 1:]).all()  # every photo's come first
        learnt.setdefault(step // self.plan.batches, []).append(int(there.sum()))
        return drawn

    monkeypatch.setattr(Material, "captions", watched)
    first, _ = train(recipe, tmp_path / "first")
    captions = [sum(learnt[epoch]) for epoch in range(3)]
    assert captions[0] < captions[1] < captions[2] == 48 * 3

    out = tmp_path / "killed"
    lives = with_kills(monkeypatch, lambda begun: train(None if begun else recipe, out, resume=begun), repeat(2))
    assert lives > 2 and (out / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


@pytest.mark.parametrize("objective", ["scst", "infonce"])
def test_a_curriculum_needs_captions_to_learn(objective: str) -> None:
    whole = {"task": "retrieval"} if objective == "infonce" else {}
    with pytest.raises(UsageError, match=f"stages.0.curriculum is of captions to learn: {objective} learns none"):
        recipe_from_dict({**whole, "stages": [{"objective": objective, "curriculum": 1}]})
