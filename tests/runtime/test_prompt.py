"""Prompts of ids alone: token by token those of transformers' processor, for every way a photo can be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgecap.runtime import Tokenizer, UsageError
from edgecap.runtime.frames import Framing
from edgecap.runtime.prompt import FAKE, GLOBAL, IMAGE, Prompt, Segments

ID = 14  # of IMAGE in the small tokenizers
ASKED = "Can you describe this image?"
PHOTO = {"type": "image"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


TALKS: dict[str, list[dict[str, Any]]] = {
    "the photo first": [{"role": "user", "content": [PHOTO, said(ASKED)]}],
    "the words first": [{"role": "user", "content": [said(ASKED), PHOTO]}],
    "words around it": [
        {"role": "system", "content": [said("You are terse.\n")]},
        {"role": "user", "content": [said("In 15 words\n\n"), PHOTO, said("\n\n é?")]},
    ],
}
SIZES = [(96, 96), (300, 70), (70, 300), (150, 100), (33, 31), (90, 190), (31, 400)]


def saved(folder: Path, *added: Any) -> Path:
    """A small SmolVLM's tokenizer, with some more tokens."""
    transformers = pytest.importorskip("transformers", reason="the small tokenizers are made with it")
    from ..train.parts import _byte_level, _save_tokenizer
    from ..train.vlms import CHAT, SPECIAL

    assert SPECIAL.index(IMAGE) == ID
    tokenizer = _byte_level(SPECIAL, digits=True)
    for token in added:
        (tokenizer.add_tokens if isinstance(token, str) else tokenizer.add_special_tokens)([token])
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    _save_tokenizer(folder, tokenizer, transformers.PreTrainedTokenizerFast, {**names, "chat_template": CHAT})
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def breaks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for two line breaks, as SmolVLM's has."""
    return saved(tmp_path_factory.mktemp("breaks"), "\n\n")


def opened(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "tokenizer.json")


def processor(folder: Path, framing: Framing) -> Any:
    from ..train.vlms import processor

    return processor(folder, framing.longest_edge, framing.side, split=framing.split)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", ["plain", "breaks"])
def test_every_token_is_that_of_the_processor(name: str, talk: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    framing = Framing(32, 48, 8, 2, longest_edge=96, split=True)
    tokenizer, grids = opened(folder), set()
    assert (len(tokenizer.encode("\n\n")) == 1) == (name == "breaks")
    for cut, sizes in ((framing, SIZES), (framing.at(32), SIZES[:2]), (framing.at(48, split=True), SIZES[:4])):
        theirs = processor(folder, cut)
        text = theirs.apply_chat_template(TALKS[talk], add_generation_prompt=True)
        prompt = Prompt.build(tokenizer, text, tiles=cut.most)
        assert prompt == Prompt.build(tokenizer, text, tiles=None if cut.most == 3 else cut.most)
        for size in sizes:
            wanted = theirs(text=[text], images=[[Image.new("RGB", size)]], add_special_tokens=False)["input_ids"][0]
            grid = cut.grid(*size)
            found = prompt.segments(*grid)
            assert found.flat(ID, cut.tokens) == wanted
            assert found.length(cut.tokens) == len(wanted)
            assert len(found.after) == (grid[0] * grid[1] + 1 if grid[0] else 1)
            grids.add(grid)
    assert grids >= {(0, 0), (3, 3), (1, 3), (3, 1), (2, 3), (2, 2)}


def test_what_the_exporter_renders_is_what_the_processor_renders(plain: Path) -> None:
    """The same text from the tokenizer's template alone, with `{image}` for the photo."""
    transformers = pytest.importorskip("transformers")
    from edgecap.train.pretrained import chat_text

    theirs = processor(plain, Framing(48, 48, 8, 2, 48))
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
    for talk, chat, system in (
        ("the photo first", ASKED, ""),
        ("the words first", ASKED + "{image}", ""),
        ("words around it", "In 15 words\n\n{image}\n\n é?", "You are terse.\n"),
    ):
        text = chat_text(tokenizer, chat, "here", system).replace("{image}", IMAGE)
        assert text == theirs.apply_chat_template(TALKS[talk], add_generation_prompt=True)


def test_segments_of_a_grid(plain: Path) -> None:
    tokenizer = opened(plain)
    prompt = Prompt.build(tokenizer, f"a{IMAGE}b", tiles=2)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text))

    assert prompt.most == (2, 2)
    assert prompt.segments() == Segments(ids(f"a{FAKE}{GLOBAL}"), (ids(f"{FAKE}b"),))
    assert prompt.segments(1, 2) == Segments(
        ids(f"a{FAKE}<row_1_col_1>"),
        (ids(f"{FAKE}<row_1_col_2>"), ids("\n\n") + ids(f"{FAKE}{GLOBAL}"), ids(f"{FAKE}b")),
    )
    assert prompt.segments(2, 1).after == (
        ids("\n") + ids(f"{FAKE}<row_2_col_1>"),
        ids("\n\n") + ids(f"{FAKE}{GLOBAL}"),
        ids(f"{FAKE}b"),
    )
    for rows, columns in ((3, 1), (1, 3), (0, 2), (2, 0), (-1, 1)):
        with pytest.raises(UsageError, match=f"in {rows} × {columns} tiles: this prompt knows up to 2 × 2"):
            prompt.segments(rows, columns)


def test_a_prompt_of_words_alone() -> None:
    """For captioners that know no tokens around a photo."""
    prompt = Prompt((1, 2), (3,))
    assert prompt.segments() == Segments((1, 2), ((3,),)) and prompt.most == (0, 0)
    assert prompt.segments().flat(9, 2) == [1, 2, 9, 9, 3] and prompt.segments().length(2) == 5
    assert Prompt.from_dict({"before": [1, 2], "after": [3]}) == prompt


def test_tokenizers_and_texts_that_do_not_serve(plain: Path, tmp_path: Path) -> None:
    tokenizer = opened(plain)
    for text in ("no photo", IMAGE * 2):
        with pytest.raises(UsageError, match="a prompt has one photo, <image>, not"):
            Prompt.build(tokenizer, text)
    with pytest.raises(UsageError, match="has no <row_1_col_4>: photos may become too many tiles, 4 a side"):
        Prompt.build(tokenizer, IMAGE, tiles=4)
    for tiles in (-1, 65):
        with pytest.raises(UsageError, match="from 0 to 64 tiles a side"):
            Prompt.build(tokenizer, IMAGE, tiles=tiles)

    from tokenizers import AddedToken

    swallows = opened(saved(tmp_path / "swallows", AddedToken(FAKE, lstrip=True, special=True)))
    assert Prompt.build(swallows, f"a {IMAGE}").before == tuple(swallows.encode("a"))
    with pytest.raises(UsageError, match="joins the prompt's words with what is around the photo"):
        Prompt.build(swallows, f"a {IMAGE}", tiles=2)
    tree = json.loads((plain / "tokenizer.json").read_text())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != GLOBAL]
    with pytest.raises(UsageError, match="has no <global-img>: it is none of a SmolVLM's"):
        Prompt.build(Tokenizer.load(json.dumps(tree).encode()), IMAGE)


WHOLE = Prompt((1,), (2, 3), (4, 5), (4,), (6,), (7,), (((4, 8), (4, 9)),))


def test_to_and_from_json() -> None:
    values = json.loads(json.dumps(WHOLE.to_dict()))
    assert Prompt.from_dict(values) == WHOLE == Prompt.from_dict(values | {"later": 1}, vocab_size=10)
    with pytest.raises(UsageError, match="the id 9, outside the vocabulary of 9"):
        Prompt.from_dict(values, vocab_size=9)


JUNK = (None, True, 1, 1.5, "1", {}, [-1], [True], [1.0], ["1"], [None], [2**31], [[[[1]]]], {"0": 1})


@pytest.mark.parametrize("name", sorted(WHOLE.to_dict()))
def test_what_a_broken_bundle_says_is_one_line(name: str) -> None:
    for junk in JUNK:
        with pytest.raises(UsageError, match=f"prompt {name}") as told:
            Prompt.from_dict(WHOLE.to_dict() | {name: junk})
        assert len(told.value.message) < 120 and "\n" not in str(told.value)
    if name in ("before", "after"):
        with pytest.raises(UsageError, match=f"prompt {name} is missing"):
            Prompt.from_dict({key: value for key, value in WHOLE.to_dict().items() if key != name})


def test_prompts_out_of_all_proportion() -> None:
    values = WHOLE.to_dict()
    for junk in (None, 1, [], "x"):
        with pytest.raises(UsageError, match="must be an object"):
            Prompt.from_dict(junk)
    for tiles in ([[[1], [2]], [[3]]], [[]], [[[1]] * 65], [[[1]]] * 65, [[1]], [1]):
        with pytest.raises(UsageError, match="prompt tiles"):
            Prompt.from_dict(values | {"tiles": tiles})
    with pytest.raises(UsageError, match="more than 65,536"):
        Prompt.from_dict(values | {"before": [1] * 70_000})
