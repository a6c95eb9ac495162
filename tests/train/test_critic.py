"""The critic hears what was said, reads as its models do, and scores captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecap.benchmarks.datasets import open_dataset
from edgecap.runtime.errors import UsageError
from edgecap.train.critic import GENERIC, Critic, alignment_lines, alignment_scores
from edgecap.train.tokenizer import token_ids, train_tokenizer

from .critic_parts import DATA, QUIET, Knowing, captions_of, clip_folder, towers_critic
from .tiny import tiny_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "cache"))


# --- the critic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
def test_each_token_becomes_the_mean_of_its_text_in_the_critics_pieces(kind: str) -> None:
    critic = towers_critic(pieces=90)  # few: most words are several
    settings = dataclasses.replace(tiny_recipe().tokenizer, kind=kind, vocab_size=400)
    tokenizer = train_tokenizer(captions_of(), settings)
    tokens = token_ids(tokenizer)
    critic.read_with(tokenizer, tokens)
    weight, inner = critic.judge.embedding.weight, critic.judge.tokenizer
    assert critic.vocabulary.shape == (tokens["vocab_size"], 32)
    several = 0
    for word in sorted({word for caption in captions_of() for word in caption.split()}):
        line = tokenizer.encode(word, add_special_tokens=False).ids
        if len(line) == 1:  # a whole word of ours
            pieces = inner.encode(word, add_special_tokens=False).ids
            several += len(pieces) > 1
            torch.testing.assert_close(critic.vocabulary[line[0]], weight[pieces].mean(0))
    assert several
    torch.testing.assert_close(critic.vocabulary[tokens["bos"]], weight[2])
    torch.testing.assert_close(critic.vocabulary[tokens["eos"]], weight[3])
    assert not critic.vocabulary[[tokens["pad"], tokens["unk"]]].any()
    if kind == "bpe":  # half a character is no text
        assert not critic.vocabulary[tokenizer.token_to_id("Ã")].any()


def clip_critic(tmp_path: Path) -> Critic:
    return Critic.load(clip_folder(tmp_path / "clip"))


@pytest.mark.parametrize("kind", ["towers", "clip"])
def test_certain_words_are_read_as_their_text(kind: str, tmp_path: Path) -> None:
    critic = towers_critic() if kind == "towers" else clip_critic(tmp_path)
    tokenizer = train_tokenizer(captions_of(), tiny_recipe().tokenizer)
    critic.read_with(tokenizer, token_ids(tokenizer))

    def single(word: str) -> bool:
        pieces = critic.judge.tokenizer.encode(word, add_special_tokens=False).ids
        return len(pieces) == 1 and tokenizer.token_to_id(word) is not None

    texts = [text for text in dict.fromkeys(captions_of("test")) if all(map(single, text.split()))][:6]
    lines = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert len(texts) > 2 and len({len(line) for line in lines}) > 1
    hot = torch.zeros(len(lines), max(map(len, lines)), tokenizer.get_vocab_size())
    mask = torch.zeros(hot.shape[:2], dtype=torch.bool)
    for i, line in enumerate(lines):
        hot[i, torch.arange(len(line)), line], mask[i, : len(line)] = 1.0, True
    hot[~mask] = torch.rand(hot.shape[2])  # what stands behind a caption does not count
    soft, read = critic.soft(hot, mask), torch.from_numpy(critic.texts(texts))
    assert float((soft * read).sum(1).min()) > 0.99
    assert float((read @ read.T - torch.eye(len(texts))).max()) < 0.99  # different texts differ


def test_a_clip_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    critic, folder = clip_critic(tmp_path), tmp_path / "clip"
    model, words = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = captions_of("test")[:5]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    seen = (pixels / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    with torch.inference_mode():
        inputs = words(texts, return_tensors="pt", padding=True, truncation=True, max_length=20)
        out = model(
            **{key: inputs[key] for key in ("input_ids", "attention_mask")},
            pixel_values=torch.from_numpy(seen).float().permute(0, 3, 1, 2),
        )
    np.testing.assert_allclose(critic.texts(texts), out.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(critic.look(pixels), out.image_embeds.numpy(), atol=1e-5)
    assert critic.scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert critic.sha256 == Critic.load(folder).sha256


def test_photos_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    critic, examples = towers_critic(), list(open_dataset(DATA).splits["val"])
    photos = critic.photos(examples)
    np.testing.assert_allclose(np.linalg.norm(photos, axis=1), 1, atol=1e-5)
    pixels = np.stack([critic.judge.preprocess(e.load()) for e in examples])
    np.testing.assert_allclose(photos, critic.look(pixels), atol=1e-5)
    seen: list[int] = []
    look = critic.look
    monkeypatch.setattr(critic, "look", lambda pixels: (seen.append(len(pixels)), look(pixels))[1])
    np.testing.assert_array_equal(critic.photos(examples), photos)
    assert seen == [1]  # the first one, for the shape
    assert len(critic.photos(examples[:4])) == 4  # other photos, another cache


def test_a_critic_that_does_not_know_the_photos_is_refused(tmp_path: Path) -> None:
    examples = list(open_dataset(DATA).splits["train"])
    knowing = towers_critic(kind=Knowing)
    knowing.check_knows(examples)
    photos = np.roll(knowing.photos(examples), 1, axis=0)
    knowing.photos = lambda examples, progress: photos
    with pytest.raises(UsageError, match="does not know these photos"):
        knowing.check_knows(examples)
    with pytest.raises(UsageError, match="no config.json there"):
        Critic.load(tmp_path)


# --- the score -----------------------------------------------------------------------------------------------------


def test_the_score_sets_captions_against_references_and_generic_ones() -> None:
    data = open_dataset(DATA)
    examples = list(data.splits["test"])
    critic = towers_critic(kind=Knowing)
    own = [example.captions[0] for example in examples]
    scores = alignment_scores(critic, own, examples, data, QUIET)
    assert scores["captions"] == pytest.approx(1.0, abs=1e-5) and scores["beats_generic"] == 1.0
    assert scores["references"] < 1.0
    told = {generic["caption"]: generic for generic in scores["generic"]}
    assert set(GENERIC) < set(told) and len(told) == 3
    said = alignment_scores(critic, [GENERIC[0]] * len(examples), examples, data, QUIET)
    assert said["captions"] == pytest.approx(told[GENERIC[0]]["mean"], abs=1e-6)
    assert said["beats_generic"] == 0.0 and said["distinct"] == 1 / len(examples)
    assert any(GENERIC[0] in line for line in alignment_lines(scores))
