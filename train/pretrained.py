"""Pretrained language models and tokenizers: what a recipe names by hub id or directory, resolved when a run begins.

A resolved recipe holds sizes, ids and the prompt's tokens: its checkpoint is rebuilt without the sources.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from ..runtime.errors import EdgecapError, UsageError
from .models.decoders import DECODERS
from .models.hub import reading
from .models.language_model import IMAGE, PHOTO, LanguageModelDecoder
from .settings import Recipe
from .smolvlm import around_photo, check_length, with_frames
from .tokenizer import SPECIALS, named_tokens, token_ids, train_tokenizer

# A prompt, and the tokenizer if it is a pretrained one → the prompt.
Frame: TypeAlias = Callable[[str, Tokenizer | None], str]
# What a tokenizer that edgecap trains says around the user's words, having no template: SmolVLM's dialogue.
SPACE = {"type": "Prepend", "prepend": " "}  # the normalizer of captions that follow a word
DIALOGUE = "<|im_start|>User:{chat}<end_of_utterance>\nAssistant:"


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with the sizes and settings of its decoder's source, so that a checkpoint can be rebuilt without it.

    Reads the source's config.json, not its weights. Raises UsageError for sources that are no model of the kind.
    """
    source = recipe.decoder.get("source")
    make = DECODERS.get(recipe.decoder["kind"])
    if not source or not _is_language_model(make):
        return recipe
    try:
        found = make.described(source)
    except ValueError as error:
        raise UsageError(f"decoder {source}: {error}") from error
    if "dropout" in recipe.decoder:
        found["config"] = {key: value for key, value in found["config"].items() if key not in make.dropouts}
    if recipe.decoder["kind"] == "llama":  # with rotary positions the limit is free
        found["max_positions"] = min(recipe.decoder.get("max_positions", math.inf), found["max_positions"])
    return dataclasses.replace(recipe, decoder={**recipe.decoder, **found})


def open_tokenizer(
    recipe: Recipe, captions: Iterable[str], frame: Frame = lambda text, tokenizer: text
) -> tuple[Tokenizer, Recipe]:
    """The recipe's tokenizer, learnt from the captions (in `caption_text` form) or pretrained, and the recipe with the
    ids of bos, eos, pad and unk where they are not those of a trained one, and with the prompt's tokens.

    A pretrained one is saved without its post-processor: BOS and EOS belong to the session. frame: puts into a prompt
    what a model expects around its photos. Raises UsageError.
    """
    settings, prompt = recipe.tokenizer, recipe.prompt
    if (prompt.text or prompt.chat) and not _is_language_model(DECODERS.get(recipe.decoder["kind"])):
        raise UsageError(f"recipe [prompt]: a {recipe.decoder['kind']} decoder reads no prompt, language models do")
    if settings.kind == "pretrained":
        source = settings.source or recipe.decoder.get("source") or recipe.text.source
        if not source:
            raise UsageError("recipe [tokenizer]: kind = pretrained needs a source, here or of the decoder")
        theirs = load_tokenizer(source)
        tokenizer, ids = _plain(theirs, source), _special_ids(theirs, source)
        text = chat_text(theirs, prompt.chat, source) if prompt.chat else prompt.text
        text = frame(_with_image(text), tokenizer)
    else:
        text = DIALOGUE.replace("{chat}", _with_image(prompt.chat)) if prompt.chat else prompt.text
        text = frame(_with_image(text), None)
        tokenizer, ids = train_tokenizer(captions, settings, named_tokens(text)), {}
    if text:
        tokens, ids = prompt_tokens(tokenizer, text), dict(token_ids(tokenizer, ids))
        ids.pop("vocab_size")
        if tokens[-1] != PHOTO:
            ids["bos"] = tokens.pop()
            special = tokenizer.get_added_tokens_decoder()
            if ids["bos"] not in special:
                ids["bos_is_word"] = 1
                tokenizer = _continuing(tokenizer, ids["bos"])
        recipe = dataclasses.replace(recipe, decoder={**recipe.decoder, "prompt": tokens})
    if ids != settings.ids:
        recipe = dataclasses.replace(recipe, tokenizer=dataclasses.replace(settings, ids=ids))
    return tokenizer, recipe


def open_captions(recipe: Recipe, captions: Iterable[str]) -> tuple[Tokenizer, Recipe]:
    """The tokenizer of a captioner and its recipe with what its sources say: sizes, token ids and the prompt."""
    recipe = resolve(with_frames(recipe))
    tokenizer, recipe = open_tokenizer(recipe, captions, functools.partial(around_photo, recipe))
    check_length(recipe)
    return tokenizer, recipe


# --- prompts --------------------------------------------------------------------------------------------------------


def chat_text(tokenizer: Any, chat: str, source: str, system: str = "") -> str:
    """What a dialogue with the photo and the user's words is, up to where the answer begins, by the chat template of a
    transformers tokenizer; the photo at IMAGE. system: what is said before the dialogue."""
    template = tokenizer.chat_template
    if not template:
        raise UsageError(f"recipe [prompt]: the tokenizer of {source} has no chat template; write prompt.text instead")
    before, _, after = _with_image(chat).partition(IMAGE)
    content: Any = f"{before}{IMAGE}{after}"
    rules: Any = system
    if "image" in str(template):  # a model for photos; others take texts alone
        texts = [{"type": "text", "text": part} for part in (before, after)]
        content = [part for part in (texts[0], {"type": "image"}, texts[1]) if part.get("text", True)]
        rules = [{"type": "text", "text": system}]
    messages = [{"role": "system", "content": rules}] * bool(system) + [{"role": "user", "content": content}]
    try:
        said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its author's
        raise UsageError(f"recipe [prompt]: the chat template of {source} fails: {error}") from error
    return said.replace("<image>", IMAGE)


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's ids, PHOTO at each IMAGE. UsageError for words that the tokenizer does not know."""
    tokens: list[int] = []
    unknown = tokenizer.token_to_id(SPECIALS[3])
    for place, part in enumerate(text.split(IMAGE)):
        found = tokenizer.encode(part, add_special_tokens=False)
        if unknown is not None and unknown in found.ids and SPECIALS[3] not in part:
            start, end = found.offsets[found.ids.index(unknown)]
            raise UsageError(
                f"recipe [prompt]: the tokenizer does not know {part[start:end]!r}; say it in the captions' words, or "
                "take tokenizer.kind = bpe"
            )
        tokens += [PHOTO] * (place > 0) + found.ids
    return tokens


def _with_image(text: str) -> str:
    return text if not text or IMAGE in text else IMAGE + text


def _continuing(tokenizer: Tokenizer, last: int) -> Tokenizer:
    """A tokenizer for captions that follow a word: they begin with a space, where that makes other tokens."""
    text = tokenizer.decode([last], skip_special_tokens=False)
    if text[-1:].isspace() or tokenizer.encode("a b").ids == tokenizer.encode(" a b").ids:
        return tokenizer
    tree = json.loads(tokenizer.to_str())
    steps = [step for step in (tree["normalizer"], SPACE) if step]
    tree["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))


def not_continuing(tokenizer: Tokenizer) -> Tokenizer:
    """What a tokenizer for captions that follow a word was made of."""
    tree = json.loads(tokenizer.to_str())
    normalizer = tree["normalizer"] or {}
    if normalizer.get("type") != "Sequence" or normalizer["normalizers"][-1:] != [SPACE]:
        return tokenizer
    steps = normalizer["normalizers"][:-1]
    tree["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    return Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))


# --- tokenizers -----------------------------------------------------------------------------------------------------


def load_tokenizer(source: str) -> Any:
    """The transformers tokenizer of a hub id or directory. UsageError where it is none, or not a fast one."""
    from transformers import AutoTokenizer

    files = ("tokenizer_config.json", "tokenizer.json", "config.json")
    with reading(source, "tokenizer", files) as place:
        found = AutoTokenizer.from_pretrained(place)
    if getattr(found, "backend_tokenizer", None) is None:
        raise UsageError(f"tokenizer {source} has no tokenizer.json, and none can be made of it; take another")
    return found


def _plain(tokenizer: Any, source: str) -> Tokenizer:
    """What is inside, adding nothing to a text and cutting nothing off."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree |= {"post_processor": None, "truncation": None, "padding": None}
    plain = Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))
    # Checked as the device will read it.
    from ..runtime.tokenizer import Tokenizer as Runtime

    try:
        Runtime.load(plain.to_str().encode())
    except EdgecapError as error:
        raise UsageError(f"tokenizer {source}: {error.message}") from error
    return plain


def _special_ids(tokenizer: Any, source: str) -> dict[str, int]:
    """bos, eos, pad and unk; a tokenizer without one of them uses another: EOS, which is never suppressed."""
    has = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk", "cls", "sep")}
    eos = has["eos"] if has["eos"] is not None else has["sep"]
    if eos is None:
        raise UsageError(f"tokenizer {source} has no token that ends a text (eos); take another")
    bos = has["bos"] if has["bos"] is not None else has["cls"]
    found = {"bos": bos, "eos": eos, "pad": has["pad"], "unk": has["unk"]}
    return {name: eos if value is None else value for name, value in found.items()}


def _is_language_model(make: Any) -> bool:
    return isinstance(make, type) and issubclass(make, LanguageModelDecoder)
