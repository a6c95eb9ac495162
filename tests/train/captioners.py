"""Small captioners of transformers (BLIP, GIT, ViT + GPT-2) with tokenizers and image processors, as a hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from .parts import TEXTS, _save_model, _save_tokenizer
from .vlms import pictures

SIDE = 48
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": SIDE, "patch_size": 16, "initializer_range": 0.02}  # BLIP's own is 1e-10
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[DEC]"]


def save_captioner(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """kind: blip, git or vision-encoder-decoder; random weights, but some of its captions end."""
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    count = _save_tokenizer(
        folder,
        _words(),
        transformers.PreTrainedTokenizerFast,
        {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[DEC]"},
    )
    bos, eos = SPECIAL.index("[DEC]" if kind == "blip" else "[CLS]"), SPECIAL.index("[SEP]")
    ids = {"vocab_size": count, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": 0}
    if kind == "blip":
        text = {**SIZES, **ids, "sep_token_id": eos, "encoder_hidden_size": 32}
        cls, config = (
            transformers.BlipForConditionalGeneration,
            transformers.BlipConfig(text_config=text, vision_config=VISION),
        )
    elif kind == "git":
        cls, config = transformers.GitForCausalLM, transformers.GitConfig(vision_config=VISION, **SIZES, **ids)
    else:
        words = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)
        cls = transformers.VisionEncoderDecoderModel
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.ViTConfig(**VISION), words
        )
        config.decoder_start_token_id, config.pad_token_id = bos, 0
    _save_model(folder, cls, config, seed)
    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    model = cls.from_pretrained(folder)
    let_end(model, eos, pixel_values=pixels(folder))
    model.save_pretrained(folder)
    return folder


def let_end(model: Any, eos: int, **photos: torch.Tensor) -> None:
    """Makes a model say EOS, and hardly any other special token, instead of its third word of the first photo."""
    with torch.no_grad():
        third = model.eval().generate(**photos, max_new_tokens=3, do_sample=False)[0, -1]
        words = getattr(model, "text_decoder", getattr(model, "decoder", model)).get_output_embeddings()
        words.weight[: len(SPECIAL)] = 0.0  # said, they would be missing in the text
        words.weight[eos] = 1.02 * words.weight[third]
        if getattr(words, "bias", None) is not None:
            words.bias[eos] = words.bias[third] + 0.05


def pixels(folder: Path, count: int = 4) -> torch.Tensor:
    """The first `pictures` as transformers' processor shows them to the model of the folder."""
    from transformers import AutoImageProcessor

    look = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return look([Image.fromarray(photo) for photo in pictures(count, 60)], return_tensors="pt")["pixel_values"]


def _words() -> Tokenizer:
    """Lower-case words and pieces of them, as BERT's."""
    pieces = sorted({word for text in TEXTS for word in text.lower().replace(",", " ").replace(".", " ").split()})
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
