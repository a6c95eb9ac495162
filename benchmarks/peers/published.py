"""Models of a published SmolVLM's exact shape with random weights, where its own cannot be had: speed and memory depend
on the shape alone. `python -m edgecap.benchmarks.peers.published 256m DIR`; needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

WORDS, ROWS = 49152, 49280  # tokens of SmolLM2, and with those that SmolVLM adds
TEXT: dict[str, dict[str, int]] = {  # HuggingFaceTB/SmolVLM-256M-Instruct, -500M-Instruct, -Instruct: config.json
    "256m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "500m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "2.2b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
BASE = {  # siglip-base-patch16-512
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
SO400M = {  # siglip-so400m-patch14-384
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
]
ADDED = [
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    *(f"<|reserved_special_token_{i}|>" for i in range(88)),
    "<end_of_utterance>",
]
FIRST_ADDED = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]  # SmolVLM-Instruct's: tiles have no tokens
BOS, PAD = 1, 2
CHAT = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The words of the usual prompt are whole tokens, as in SmolLM2: its prompts have the published number of tokens.
PIECES = ["Ġyou", "Ġdescribe", "Ġthis", "Ġimage", "ĊĊ", "Can", "User", "Ass", "istant"]


def merges() -> Iterator[tuple[str, str]]:
    """Pairs of a byte-level BPE: PIECES letter by letter, then all combinations of letters, for ever longer words."""
    for piece in PIECES:
        for end in range(1, len(piece)):
            yield piece[:end], piece[end]
    for length in range(1, 5):
        for letters in product(ascii_lowercase, repeat=length):
            word = "".join(letters)
            yield "Ġ" + word[:-1], word[-1]
            if length in (2, 3):
                yield word[:-1], word[-1]


def tokenizer(rows: int = ROWS) -> Any:
    """A tokenizer of SmolVLM's size, kinds of token and special ids, whose words are combinations of letters. rows: of
    the model's embedding, which tell the sizes apart."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    pairs = []
    for pair in merges():
        if len(vocabulary) == WORDS:
            break
        word = "".join(pair)
        if word not in vocabulary:
            vocabulary[word] = len(vocabulary)
            pairs.append(pair)
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in [*SPECIAL, *added(rows)]])
    return found


def added(rows: int) -> list[str]:
    """The tokens that a SmolVLM of so many rows adds to SmolLM2's."""
    return ADDED if rows == ROWS else FIRST_ADDED


def config(size: str, layers: int | None = None) -> dict[str, Any]:
    """config.json as published; layers: of each transformer, instead of all."""
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    large = size == "2.2b"
    rows = WORDS + len(FIRST_ADDED) if large else ROWS
    text = {
        "model_type": "llama",
        **TEXT[size],
        "head_dim": 64,
        "vocab_size": rows,
        "max_position_embeddings": 16384 if large else 8192,
        "rope_theta": 273768.0 if large else 100000,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": rows - 1,
        "pad_token_id": PAD,
    }
    vision = {
        "model_type": "idefics3_vision",
        **(SO400M if large else BASE),
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": WORDS + added(rows).index("<image>"),
        "scale_factor": 3 if large else 4,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": rows,
        "text_config": text | fewer,
        "vision_config": vision | fewer,
    }


def processing(side: int, tokens: int, rows: int = ROWS) -> dict[str, dict[str, Any]]:
    """The files beside weights and tokenizer, as published. side: pixels of a tile; tokens: its embeddings;
    rows: as of `tokenizer`."""
    half, name = [0.5, 0.5, 0.5], "Idefics3Processor"
    image = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": half,
        "image_processor_type": "Idefics3ImageProcessor",
        "image_std": half,
        "max_image_size": {"longest_edge": side},
        "processor_class": name,
        "resample": 1,  # Lanczos
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 4 * side},
    }
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": name,
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT,
    }
    return {
        "preprocessor_config.json": image,
        "processor_config.json": {"image_seq_len": tokens, "processor_class": name},
        "tokenizer_config.json": words,
        "special_tokens_map.json": {k: words[k] for k in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "chat_template.json": {"chat_template": CHAT},
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": rows - 1, "pad_token_id": PAD},
    }


def save(folder: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """Write model, tokenizer and settings as the hub has them, weights in bfloat16 from a seed.

    Weights are larger than transformers initialises them, so that what is said depends on the picture, and the wider
    a model the smaller they are: of one size at every width, 2,048 inputs would make of them layers that are louder
    than what they are added to, and such a stack makes ever more of any rounding, as no trained one does.
    """
    import torch
    from transformers import AutoConfig, Idefics3ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    vision = config["vision_config"]
    grid = vision["image_size"] // vision["patch_size"] // config["scale_factor"]
    files = {"config.json": config, **processing(vision["image_size"], grid * grid, config["vocab_size"])}

    def write() -> None:
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")

    write()
    torch.manual_seed(seed)
    # 2.2 billion weights are drawn in the 16 bits that they are written in.
    options = {"dtype": torch.bfloat16} if config["text_config"]["hidden_size"] > 1000 else {"dtype": torch.float32}
    model: Any = Idefics3ForConditionalGeneration._from_config(AutoConfig.from_pretrained(folder), **options)
    gains = {
        "vision_model": 2.0 * (BASE["hidden_size"] / vision["hidden_size"]) ** 0.5,
        "": 2.0 * (TEXT["256m"]["hidden_size"] / config["text_config"]["hidden_size"]) ** 0.5,
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(next(gain for part, gain in gains.items() if part in name))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    write()  # as published, and not as this transformers writes them: others read the same files
    tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m edgecap.benchmarks.peers.published", description=__doc__)
    parser.add_argument("size", choices=TEXT)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="Of each transformer, instead of the published number.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(save(given.folder, config(given.size, given.layers), seed=given.seed))
