"""Shrinks a tokenizer to the words that captions use; the kept tokens' texts do not change, their ids close up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from ..runtime.errors import UsageError
from ..train.tokenizer import SPECIALS

UNPRUNED = "--prune vocab: this tokenizer cannot be shrunk"


def shrink_vocab(
    tokenizer: Tokenizer, captions: Iterable[str], at_least: int, needed: Iterable[int] = ()
) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with the tokens used `at_least` so often in the captions (in `caption_text` form), all special
    ones and the ids `needed`; with it the old id of each new one, in order. Pieces that other tokens are merged from
    stay."""
    if at_least < 1:
        raise UsageError(f"--prune vocab={at_least}: give vocab=used, or how often a word must be used (1 or more)")
    tree = json.loads(tokenizer.to_str())
    kind = tree["model"].get("type")
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(captions), add_special_tokens=False):
        counts.update(encoding.ids)
    names = {i: name for name, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    keep = {names[i] for i, count in counts.items() if count >= at_least}
    keep |= {token["content"] for token in tree["added_tokens"]} | {name for name in SPECIALS if name in names.values()}
    keep |= {names[i] for i in needed}
    keep |= _pieces(kind, tree["model"], keep)
    old = sorted(i for i, name in names.items() if name in keep)
    new = {names[i]: place for place, i in enumerate(old)}
    _rewrite(kind, tree, new)
    small = Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))
    if small.get_vocab(with_added_tokens=True) != new:
        raise UsageError(f"{UNPRUNED} without changing what its tokens mean")
    return small, old


def _pieces(kind: str, model: dict[str, Any], keep: set[str]) -> set[str]:
    """Tokens that must stay so that all other text can still be encoded."""
    if kind == "WordLevel":
        return {model["unk_token"]}
    if kind == "BPE":
        pieces = {token for token in model["vocab"] if len(token) == 1}  # bytes, or letters
        pieces |= {token for token in model["vocab"] if model.get("byte_fallback") and _is_byte(token)}
        pieces |= set(pre_tokenizers.ByteLevel.alphabet()) & set(model["vocab"])
        made = {}
        for left, right in map(_pair, model["merges"]):
            made.setdefault(left + right, []).append((left, right))
        waiting = list(keep)
        while waiting:
            for pair in made.get(waiting.pop(), ()):
                waiting += [piece for piece in pair if piece not in keep | pieces]
                pieces.update(pair)
        return pieces
    if kind == "Unigram":
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
        return {piece for piece, _ in model["vocab"] if len(piece) == 1 or piece == unknown or _is_byte(piece)}
    raise UsageError(f"{UNPRUNED}: it is of type {kind}, and only WordLevel, BPE and Unigram are known")


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _rewrite(kind: str, tree: dict[str, Any], new: dict[str, int]) -> None:
    """Give the kept tokens their new ids wherever the tokenizer's description has them."""
    model = tree["model"]
    post = tree.get("post_processor") or {}
    if post.get("type", "ByteLevel") != "ByteLevel":
        raise UsageError(f"{UNPRUNED}: its post-processor ({post['type']}) holds ids of its own")
    for token in tree["added_tokens"]:
        token["id"] = new[token["content"]]
    if kind == "Unigram":
        unknown = model.get("unk_id")
        name = None if unknown is None else model["vocab"][unknown][0]
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in new]
        model["unk_id"] = None if name is None else [entry[0] for entry in model["vocab"]].index(name)
        return
    model["vocab"] = {token: new[token] for token in model["vocab"] if token in new}
    if kind == "BPE":
        model["merges"] = [
            merge for merge in model["merges"] if all(t in new for t in (*_pair(merge), "".join(_pair(merge))))
        ]
