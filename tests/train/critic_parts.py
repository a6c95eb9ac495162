"""Small critics: two towers, a CLIP on disk, and one that knows its photos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from edgecap.benchmarks.datasets import Example, open_dataset
from edgecap.runtime.preprocess import Preprocess
from edgecap.train.critic import Critic, TowersJudge
from edgecap.train.models.bridges import LinearBridge
from edgecap.train.models.towers import Head, TextTower, TwoTowers
from edgecap.train.tokenizer import caption_text

from .tiny import SIZE, tiny_model

DATA = "scenes:train=24,val=6,test=8,size=64"
QUIET: Callable[..., None] = lambda *_: None  # noqa: E731
LOSSES = ("alignment", "contrast", "diversity")


def captions_of(split: str = "train") -> list[str]:
    return [caption_text(c) for e in open_dataset(DATA).splits[split] for c in e.captions]


def wordpiece(size: int) -> Tokenizer:
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner.train_from_iterator(captions_of(), trainers.WordPieceTrainer(vocab_size=size, special_tokens=special))
    return inner


def towers_critic(pieces: int = 400, kind: type[Critic] = Critic) -> Critic:
    """Two small towers with random weights, spread so that texts differ."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(5)
    inner = wordpiece(pieces)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    body = BertModel(BertConfig(vocab_size=inner.get_vocab_size(), max_position_embeddings=40, **sizes))
    body.pooler = None
    with torch.no_grad():
        for parameter in body.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    encoder = tiny_model("gru").encoder
    model = TwoTowers(
        encoder, LinearBridge(encoder.dim, 16), TextTower(body.eval(), "mean"), Head(16, 32, 24),
        tokens={"pad": 0, "unk": 1, "bos": 2, "eos": 3}, max_length=24, size=(SIZE, SIZE),
    )  # fmt: skip
    model.read_with(inner)
    with torch.no_grad():  # what all texts share, which is most of a random tower's mean, is taken out
        model.head.text[-1].bias -= model.head.text(model.text_features(captions_of()[:40])).mean(0)
    loaded = SimpleNamespace(
        model=model, tokenizer=SimpleNamespace(inner=inner), preprocess=Preprocess(size=(SIZE, SIZE))
    )
    return kind(TowersJudge(loaded), "towers", "0" * 64)


def clip_folder(folder: Path) -> Path:
    """A small CLIP on disk, with a byte-level BPE as CLIP has it."""
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ends = ["<|startoftext|>", "<|endoftext|>"]
    inner.train_from_iterator(
        captions_of(), trainers.BpeTrainer(vocab_size=500, special_tokens=ends, end_of_word_suffix="</w>")
    )
    inner.post_processor = processors.RobertaProcessing((ends[1], 1), (ends[0], 0), add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=ends[0], eos_token=ends[1], pad_token=ends[1], unk_token=ends[1]
    ).save_pretrained(folder)
    torch.manual_seed(6)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": inner.get_vocab_size(), "max_position_embeddings": 20, "bos_token_id": 0}
    config = CLIPConfig(
        text_config={**text, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    return folder


class Knowing(Critic):
    """The towers' text side is as it is; each photo lies where its first caption does."""

    def photos(self, examples: Sequence[Example], progress: Any = None) -> np.ndarray:
        return self.texts([example.captions[0] for example in examples])
