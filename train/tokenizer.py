"""Tokenizers learnt from the training captions, through the `tokenizers` library: words, byte-level BPE or Unigram."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..benchmarks.metrics import ptb_tokenize
from .settings import TokenizerSettings

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0..3 in every tokenizer that edgecap trains


def caption_text(caption: str) -> str:
    """The form captions are learnt in: the metrics' own tokens (lower case, no punctuation), joined by spaces."""
    return " ".join(ptb_tokenize(caption))


def train_tokenizer(captions: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """Learn a tokenizer from captions in `caption_text` form."""
    captions = list(captions)
    if settings.kind == "word":
        counts = Counter(word for caption in captions for word in caption.split())
        # Ties in alphabetical order, so that the same captions always give the same ids.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        words = [word for word in ranked if counts[word] >= settings.min_count]
        words = words[: max(0, settings.vocab_size - len(SPECIALS))]
        vocab = {word: i for i, word in enumerate([*SPECIALS, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIALS[3]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.add_special_tokens(list(SPECIALS))
        return tokenizer
    if settings.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=list(SPECIALS),
            unk_token=SPECIALS[3],
            show_progress=False,
        )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, ids: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """bos, eos, pad and unk as the bundle names them, with the size of the vocabulary; `ids`: a pretrained
    tokenizer's own, of which several may be the same."""
    found = dict(ids) or {name.strip("<>"): tokenizer.token_to_id(name) for name in SPECIALS}
    return {**found, "vocab_size": tokenizer.get_vocab_size()}


def spoken_never(tokens: Mapping[str, int]) -> list[int]:
    """The ids that no caption holds: pad, bos and unk, where they are not eos, too."""
    return sorted({tokens[name] for name in ("pad", "bos", "unk")} - {tokens["eos"]})
