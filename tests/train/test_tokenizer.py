"""Every kind of tokenizer gives back what it was taught."""

from __future__ import annotations

import pytest

from edgecap.runtime.tokenizer import Tokenizer
from edgecap.train.settings import TokenizerSettings
from edgecap.train.tokenizer import SPECIALS, caption_text, token_ids, train_tokenizer

CAPTIONS = [caption_text(c) for c in ["A dog runs.", "Two dogs, one cat!", "The dog's ball is red", "a cat sleeps"]] * 3


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
def test_round_trip(kind: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, TokenizerSettings(kind=kind, vocab_size=400, min_count=1))
    assert [tokenizer.token_to_id(name) for name in SPECIALS] == [0, 1, 2, 3]
    runtime = Tokenizer.load(tokenizer.to_str().encode())
    for caption in CAPTIONS:
        assert runtime.decode(runtime.encode(caption)) == caption
    assert runtime.encode("A DOG") == runtime.encode("a dog")
    assert token_ids(tokenizer)["vocab_size"] == tokenizer.get_vocab_size()


def test_rare_words_are_unknown_and_ids_do_not_depend_on_the_captions_order() -> None:
    settings = TokenizerSettings(kind="word", min_count=2)
    tokenizer = train_tokenizer(["red ball", "red cat", "blue cat"], settings)
    assert tokenizer.encode("red ball").ids == [tokenizer.token_to_id("red"), 3]
    assert tokenizer.to_str() == train_tokenizer(["blue cat", "red cat", "red ball"], settings).to_str()


def test_vocab_size_is_a_limit() -> None:
    tokenizer = train_tokenizer(CAPTIONS, TokenizerSettings(kind="word", vocab_size=7, min_count=1))
    assert tokenizer.get_vocab_size() == 7
    assert tokenizer.token_to_id("dog") is not None  # the most frequent words stay
