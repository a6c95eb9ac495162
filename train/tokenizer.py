"""Tokenizers learnt from the training captions, through the `tokenizers` library: words, byte-level BPE or Unigram."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..benchmarks.metrics import ptb_tokenize
from ..runtime.errors import UsageError
from .settings import TokenizerSettings

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0..3 in every tokenizer that edgecap trains


def caption_text(caption: str) -> str:
    """The form captions are learnt in: the metrics' own tokens (lower case, no punctuation), joined by spaces."""
    return " ".join(ptb_tokenize(caption))


def named_tokens(text: str) -> list[str]:
    """The tokens that a text writes as <name> or <|name|>, each once."""
    return list(dict.fromkeys(re.findall(r"<\|[^|<>]+\|>|<[^<>\s]+>", text)))


def train_tokenizer(captions: Iterable[str], settings: TokenizerSettings, more: Sequence[str] = ()) -> Tokenizer:
    """Learn a tokenizer from captions in `caption_text` form. more: special tokens besides SPECIALS."""
    tokenizer = _trained(list(captions), settings, more)
    return _filled(tokenizer, settings.vocab_size) if settings.fill else tokenizer


def _trained(captions: list[str], settings: TokenizerSettings, more: Sequence[str]) -> Tokenizer:
    specials = list(dict.fromkeys((*SPECIALS, *more)))
    if settings.vocab_size < len(specials):
        raise UsageError(
            f"recipe [tokenizer]: vocab_size = {settings.vocab_size} is too few for {len(specials)} tokens"
        )
    if settings.kind == "word":
        counts = Counter(word for caption in captions for word in caption.split())
        # Ties in alphabetical order, so that the same captions always give the same ids.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        words = [word for word in ranked if counts[word] >= settings.min_count]
        words = words[: settings.vocab_size - len(specials)]
        vocab = {word: i for i, word in enumerate([*specials, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIALS[3]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.add_special_tokens(specials)
        return tokenizer
    if settings.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=specials,
            unk_token=SPECIALS[3],
            show_progress=False,
        )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _filled(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """The tokenizer with `size` entries, of which it uses as many as it did."""
    tree = json.loads(tokenizer.to_str())
    vocab = tree["model"]["vocab"]
    for i in range(tokenizer.get_vocab_size(), size):
        if isinstance(vocab, dict):
            vocab[f"<unused{i}>"] = i
        else:  # Unigram: pieces and their log-probabilities, in order
            vocab.append([f"<unused{i}>", -1e6])
    return Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))


def token_ids(tokenizer: Tokenizer, ids: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """bos, eos, pad and unk as the bundle names them, with the size of the vocabulary (the largest id and one more);
    `ids`: those that are not the tokenizer's own <bos>, <eos> ...; several may be the same."""
    found = dict(ids) or {name.strip("<>"): tokenizer.token_to_id(name) for name in SPECIALS}
    return {**found, "vocab_size": max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1}
