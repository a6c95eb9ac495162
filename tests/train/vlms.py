"""Small SmolVLM and Idefics3 models with their tokenizer, chat template and image processor, saved as a hub's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from .parts import _byte_level, _save_model, _save_tokenizer

NATIVE, PATCH, SCALE = 48, 8, 2
CHAT = (  # HuggingFaceTB/SmolVLM-256M-Instruct's
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
]


def save_vlm(
    folder: Path, kind: str = "smolvlm", *, tied: bool = False, seed: int = 0, shard: str = "1GB", layers: int = 2
) -> Path:
    """kind: smolvlm or idefics3; shard: most bytes of a file of weights; layers: of each transformer."""
    import transformers
    from transformers import PreTrainedTokenizerFast

    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHAT,
    }
    count = _save_tokenizer(folder, _byte_level(SPECIAL, digits=True), PreTrainedTokenizerFast, names)
    stem = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": count,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": NATIVE,
        "patch_size": PATCH,
    }
    image = SPECIAL.index("<image>")
    config = getattr(transformers, f"{stem}Config")(
        image_token_id=image, scale_factor=SCALE, tie_word_embeddings=tied, vision_config=vision, text_config=text
    )
    _save_model(folder, getattr(transformers, f"{stem}ForConditionalGeneration"), config, seed)
    if shard != "1GB":
        model = load_vlm(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=shard)
    image_processor(NATIVE, NATIVE, split=False).save_pretrained(folder)
    return folder


def load_vlm(folder: Path) -> Any:
    """transformers' model of the folder, float32."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()


def image_processor(side: int, tile: int, *, split: bool) -> Any:
    """transformers' for photos that are brought to `side` pixels, in tiles of `tile`."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(
        size={"longest_edge": side}, max_image_size={"longest_edge": tile}, do_image_splitting=split
    )


def processor(folder: Path, side: int, tile: int, *, split: bool) -> Any:
    """Idefics3Processor; SmolVLM's own cannot be made without video packages and does the same to photos."""
    from transformers import AutoTokenizer, Idefics3Processor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = (tile // PATCH // SCALE) ** 2
    found = image_processor(side, tile, split=split)
    return Idefics3Processor(found, tokenizer, image_seq_len=length, chat_template=CHAT)


def pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Shapes on noise: uint8 [count, side, side, 3]."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        image = Image.fromarray(random.integers(0, 90, (side, side, 3), dtype=np.uint8))
        for _ in range(3):
            x, y, size = (int(v) for v in random.integers(0, side, 3))
            colour = tuple(int(v) for v in random.integers(60, 256, 3))
            ImageDraw.Draw(image).ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=colour)
        drawn.append(np.asarray(image))
    return np.stack(drawn)


def expected(folder: Path, photos: np.ndarray, tile: int, chat: str) -> dict[str, torch.Tensor]:
    """What transformers feeds its model for each photo and the user's words: input_ids, pixel_values, …"""
    side = photos.shape[1]
    theirs = processor(folder, side, tile or side, split=bool(tile))
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": chat}]}]
    text = theirs.apply_chat_template(said, add_generation_prompt=True)
    images = [[Image.fromarray(photo)] for photo in photos]
    return theirs(text=[text] * len(photos), images=images, return_tensors="pt", add_special_tokens=False)
