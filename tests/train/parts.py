"""Small language models (OPT, GPT-2, llama) with the tokenizers that belong to them, saved as a hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZES = {"dim": 32, "layers": 2, "heads": 4, "ffn": 48, "positions": 96}
TEXTS = [
    "A photo of a red ball on the table.",
    "two dogs and 15 cats sit on the left",
    "a small blue house, it doesn't move",
    "a green square is above a large yellow circle",
    "User: describe this picture Assistant: the circle is in the corner",
] * 4
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_opt(folder: Path, *, seed: int = 0, rows: int = 5, **config: Any) -> Path:
    """As facebook/opt-125m: BOS = EOS = unk = </s>, a BOS in front of every text, more rows than tokens; in half
    precision on the disk."""
    from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    count = _save_tokenizer(folder, tokenizer, GPT2Tokenizer, names)
    settings = {
        "hidden_size": SIZES["dim"],
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": SIZES["heads"],
        "ffn_dim": SIZES["ffn"],
        "max_position_embeddings": SIZES["positions"],
        "vocab_size": count + rows,
    }
    return _save_model(folder, OPTForCausalLM, OPTConfig(**settings | config), seed, torch.float16)


def save_gpt2(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """As distilgpt2: one special token, the last one, and no padding."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    tokenizer = _byte_level([])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    end = "<|endoftext|>"
    count = _save_tokenizer(folder, tokenizer, GPT2Tokenizer, {"bos_token": end, "eos_token": end, "unk_token": end})
    settings = {
        "n_embd": SIZES["dim"],
        "n_layer": SIZES["layers"],
        "n_head": SIZES["heads"],
        "n_positions": SIZES["positions"],
        "vocab_size": count,
        "bos_token_id": count - 1,
        "eos_token_id": count - 1,
    }
    return _save_model(folder, GPT2LMHeadModel, GPT2Config(**settings | config), seed)


def save_llama(folder: Path, *, seed: int = 0, tied: bool = True, **config: Any) -> Path:
    """As SmolLM2-135M-Instruct: byte-level BPE with single digits, a chat template, grouped queries."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], digits=True)
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHAT,
    }
    count = _save_tokenizer(folder, tokenizer, PreTrainedTokenizerFast, names)
    return _save_llama(folder, count, seed, {"tie_word_embeddings": tied, **config})


def save_tinyllama(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """As TinyLlama: pieces with ▁ for spaces that fall back to bytes, a BOS in front of every text, an output layer of
    its own."""
    from transformers import LlamaTokenizer

    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")  # while it learns
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    vocab = tokenizer.get_vocab()

    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    theirs = LlamaTokenizer(vocab=vocab, merges=merges)
    theirs.save_pretrained(folder)
    return _save_llama(folder, len(theirs), seed, {"tie_word_embeddings": False, "num_key_value_heads": 1, **config})


def _save_llama(folder: Path, count: int, seed: int, config: dict[str, Any]) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": SIZES["dim"],
        "num_hidden_layers": SIZES["layers"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": 2,
        "intermediate_size": SIZES["ffn"],
        "max_position_embeddings": SIZES["positions"],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "vocab_size": count,
    }
    return _save_model(folder, LlamaForCausalLM, LlamaConfig(**settings | config), seed)


def _byte_level(specials: list[str], *, digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] * digits + [
        pre_tokenizers.ByteLevel(add_prefix_space=False)
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, cls: Any, names: dict[str, str]) -> int:
    """Save it as the class that the original names; its number of tokens."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    theirs.save_pretrained(folder)
    if cls is not PreTrainedTokenizerFast:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": cls.__name__}))
    return len(theirs)


def _save_model(folder: Path, cls: Any, config: Any, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights, large enough that captions differ from photo to photo."""
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


SAVE = {"opt": save_opt, "gpt2": save_gpt2, "llama": save_llama}
