"""Recall, rank, chance and interval against slow, obvious ways to the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from edgecap.benchmarks.retrieval import KS, WAYS, score_retrieval
from edgecap.runtime.errors import UsageError


def embeddings(counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photos and their captions, shuffled, each caption near its photo."""
    random = np.random.default_rng(seed)
    owners = random.permutation(np.repeat(np.arange(len(counts)), counts))
    photos = random.normal(size=(len(counts), 8))
    return photos, photos[owners] + random.normal(size=(len(owners), 8)), owners


def test_ranks_and_recall_are_those_of_sorting() -> None:
    photos, texts, owners = embeddings([1, 5, 2, 3] * 80)
    scores = score_retrieval(photos, texts, owners)
    for photo in range(len(photos)):
        found = sorted(range(len(texts)), key=lambda text: -float(photos[photo] @ texts[text]))
        assert scores.photo_ranks[photo] == next(rank for rank, text in enumerate(found) if owners[text] == photo)
    for text in range(len(texts)):
        found = sorted(range(len(photos)), key=lambda photo: -float(photos[photo] @ texts[text]))
        assert scores.text_ranks[text] == found.index(owners[text])
    for k in KS:
        assert scores.recall("image_to_text", k) == sum(rank < k for rank in scores.photo_ranks) / len(photos)
    assert 0 < scores.recall("text_to_image", 1) < scores.recall("text_to_image", 10) < 1
    record = scores.to_dict()
    assert record["text_to_image"]["median_rank"] == np.median([r + 1 for r in scores.text_ranks])
    assert record["mean_recall"] == pytest.approx(
        np.mean([record[w][f"recall_{k}"]["value"] for w in WAYS for k in KS])
    )


def test_chance_is_the_recall_of_random_orders() -> None:
    owners = np.repeat(np.arange(12), [1, 2, 3] * 4)
    random, rounds = np.random.default_rng(1), 4000
    hits = dict.fromkeys(KS, 0)
    for _ in range(rounds):
        order = random.permutation(owners)
        for k in KS:
            hits[k] += len(set(order[:k]))  # each of these photos would have found a caption of its own
    scores = score_retrieval(np.eye(12), np.eye(12)[owners], owners)
    for k in KS:
        assert scores.chance("image_to_text", k) == pytest.approx(hits[k] / rounds / 12, abs=0.01)
        assert scores.chance("text_to_image", k) == min(1, k / 12)
    assert scores.chance("image_to_text", 100) == 1


def test_embeddings_that_say_nothing_find_nothing() -> None:
    owners = np.repeat(np.arange(40), 5)
    scores = score_retrieval(np.ones((40, 4)), np.ones((200, 4)), owners)
    assert scores.recall("image_to_text", 10) == scores.recall("text_to_image", 10) == 0


def test_the_interval_holds_the_recall_and_narrows_with_photos() -> None:
    widths = []
    for photos in (40, 640):
        scores = score_retrieval(*embeddings([5] * photos))
        low, high = scores.interval("text_to_image", 5)
        assert low < scores.recall("text_to_image", 5) < high
        assert (low, high) == scores.interval("text_to_image", 5)
        widths.append(high - low)
    assert widths[1] < widths[0]
    # A photo's captions are drawn together: five copies of each caption say no more than one.
    photos_, texts, owners = embeddings([1] * 200)
    once = score_retrieval(photos_, texts, owners)
    copies = score_retrieval(photos_, np.repeat(texts, 5, axis=0), np.repeat(owners, 5))
    assert copies.interval("text_to_image", 10) == pytest.approx(once.interval("text_to_image", 10))


def test_what_cannot_be_ranked_is_one_line() -> None:
    photos, texts, owners = embeddings([1, 2, 3])
    with pytest.raises(UsageError, match="a caption for every photo"):
        score_retrieval(photos, texts[owners > 0], owners[owners > 0])
    with pytest.raises(UsageError, match="not finite"):
        score_retrieval(photos * np.nan, texts, owners)
