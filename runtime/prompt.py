"""The words around a photo and its frames, as token ids: what SmolVLM's processor writes, without its template.

A chat template is rendered once, at export. The bundle keeps the ids; the tiles of a photo decide their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import UsageError
from .tokenizer import Tokenizer

IMAGE = "<image>"  # in a rendered prompt: where the photo goes; as a token: one of a frame's embeddings
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
MAX_IDS = 2**16  # of a prompt with all its tiles
MAX_TILES = 64  # a side


@dataclass(frozen=True)
class Segments:
    """The ids around one photo's frames: `before` the first one's embeddings, then `after`[i] behind those of frame i.

    The last of them ends the prompt: the answer follows.
    """

    before: tuple[int, ...]
    after: tuple[tuple[int, ...], ...]

    def length(self, tokens: int) -> int:
        """Positions of it all, where a frame is so many embeddings."""
        return len(self.before) + len(self.after) * tokens + sum(map(len, self.after))

    def flat(self, image: int, tokens: int) -> list[int]:
        """As one list, with the id `image` for each embedding: what transformers calls input_ids."""
        found = list(self.before)
        for ids in self.after:
            found += [image] * tokens
            found += ids
        return found


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt with one photo in it.

    before, after: the words in front of the photo and behind it. whole, end: what surrounds the frame that shows the
    whole photo. tiles[row][column]: what is in front of each tile; row: behind each row of tiles, but `rows` behind the
    last one. All empty but the words: a model that knows no such tokens. UsageError for what are no ids.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    whole: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    row: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    tiles: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        count = 0
        for name in ("before", "after", "whole", "end", "row", "rows"):
            count += _check_ids(getattr(self, name), name)
        if type(self.tiles) is not tuple or len(self.tiles) > MAX_TILES:
            raise UsageError(f"prompt tiles must be a list of at most {MAX_TILES} rows")
        for row, cells in enumerate(self.tiles):
            if type(cells) is not tuple or not 1 <= len(cells) <= MAX_TILES or len(cells) != len(self.tiles[0]):
                raise UsageError(f"prompt tiles must be rows of one length, from 1 to {MAX_TILES} tiles")
            count += sum(_check_ids(ids, f"tiles[{row}][{column}]") for column, ids in enumerate(cells))
        if count > MAX_IDS:
            raise UsageError(f"prompt has {count:,} ids, more than {MAX_IDS:,}")

    @property
    def most(self) -> tuple[int, int]:
        """(rows, columns) of tiles that it has names for."""
        return len(self.tiles), len(self.tiles[0]) if self.tiles else 0

    def segments(self, rows: int = 0, columns: int = 0) -> Segments:
        """For a photo in rows × columns tiles and an overview, or in one frame (0, 0). UsageError above `most`."""
        if not rows and not columns:
            return Segments(self.before + self.whole, (self.end + self.after,))
        high, wide = self.most
        if not (0 < rows <= high and 0 < columns <= wide):
            raise UsageError(f"a photo in {rows} × {columns} tiles: this prompt knows up to {high} × {wide}")
        starts = [ids for cells in self.tiles[:rows] for ids in cells[:columns]] + [self.whole]
        breaks = [self.row if (place + 1) % columns == 0 else () for place in range(rows * columns)]
        breaks[-1] = self.rows
        between = tuple(ids + start for ids, start in zip(breaks, starts[1:], strict=True))
        return Segments(self.before + starts[0], (*between, self.end + self.after))

    @classmethod
    def build(cls, tokenizer: Tokenizer, text: str, *, tiles: int | None = 0) -> Prompt:
        """The prompt of a rendered chat template, with IMAGE in it once, as Idefics3Processor and SmolVLMProcessor
        surround its photo.

        tiles: the most a side that photos may have (`Framing.most`), None: as many as the tokenizer has names for.
        UsageError where it has none, or would join what is around a photo with the words.
        """
        if text.count(IMAGE) != 1:
            raise UsageError(f"a prompt has one photo, {IMAGE}, not {text.count(IMAGE)}")
        for name in (IMAGE, FAKE, GLOBAL):
            if not _is_token(tokenizer, name):
                raise UsageError(f"the tokenizer has no {name}: it is none of a SmolVLM's")
        if tiles is None:
            known = (n for n in range(MAX_TILES, 1, -1) if all(_is_token(tokenizer, name) for name in _names(n)))
            tiles = next(known, 0)
        if not 0 <= tiles <= MAX_TILES:
            raise UsageError(f"a photo has from 0 to {MAX_TILES} tiles a side, not {tiles}")
        for name in _names(tiles):
            if not _is_token(tokenizer, name):
                raise UsageError(f"the tokenizer has no {name}: photos may become too many tiles, {tiles} a side")
        (image,) = tokenizer.encode(IMAGE)

        def around(rows: int, columns: int) -> list[int]:
            return tokenizer.encode(text.replace(IMAGE, _surrounded(rows, columns)))

        whole, end = (tuple(tokenizer.encode(part)) for part in (FAKE + GLOBAL, FAKE))
        ids = around(0, 0)
        place = ids.index(image) if image in ids else 0
        prompt = cls(
            before=tuple(ids[: max(place - len(whole), 0)]),
            after=tuple(ids[place + 1 + len(end) :]),
            whole=whole,
            end=end,
            row=tuple(tokenizer.encode("\n")) if tiles else (),
            rows=tuple(tokenizer.encode("\n\n")) if tiles else (),
            tiles=tuple(
                tuple(tuple(tokenizer.encode(FAKE + _name(row, column))) for column in range(tiles))
                for row in range(tiles)
            ),
        )
        for rows, columns in [(0, 0), *itertools.product(range(1, tiles + 1), repeat=2)]:
            if prompt.segments(rows, columns).flat(image, 1) != around(rows, columns):
                raise UsageError("the tokenizer joins the prompt's words with what is around the photo")
        return prompt

    def to_dict(self) -> dict[str, Any]:
        """As written in bundle.json: lists of ids."""
        found: dict[str, Any] = {field.name: list(getattr(self, field.name)) for field in fields(self)}
        found["tiles"] = [[list(ids) for ids in cells] for cells in self.tiles]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, vocab_size: int | None = None) -> Prompt:
        """From bundle.json; names that a later edgecap may add are left aside.

        UsageError for what is no prompt, or has ids from vocab_size on.
        """
        if not isinstance(values, Mapping):
            raise UsageError("prompt must be an object")
        for name in ("before", "after"):
            if name not in values:
                raise UsageError(f"prompt {name} is missing")
        names = [field.name for field in fields(cls) if field.name in values]
        prompt = cls(**{name: _tuples(values[name]) for name in names})
        if vocab_size is not None:
            cells = itertools.chain.from_iterable(prompt.tiles)
            largest = max(
                itertools.chain(prompt.before, prompt.after, prompt.whole, prompt.end, prompt.row, prompt.rows, *cells),
                default=0,
            )
            if largest >= vocab_size:
                raise UsageError(f"prompt has the id {largest}, outside the vocabulary of {vocab_size}")
        return prompt


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_ids(ids: Any, name: str) -> int:
    if type(ids) is not tuple or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise UsageError(f"prompt {name} must be a list of token ids")
    return len(ids)


def _name(row: int, column: int) -> str:
    return f"<row_{row + 1}_col_{column + 1}>"


def _names(tiles: int) -> list[str]:
    return [_name(row, column) for row in range(tiles) for column in range(tiles)]


def _is_token(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.inner.token_to_id(text) is not None and len(tokenizer.encode(text)) == 1


def _surrounded(rows: int, columns: int) -> str:
    """A photo with what SmolVLM reads around it, IMAGE for each frame."""
    tiles = ""
    for row in range(rows):
        tiles += "".join(f"{FAKE}{_name(row, column)}{IMAGE}" for column in range(columns)) + "\n"
    return f"{tiles}{chr(10) * bool(rows)}{FAKE}{GLOBAL}{IMAGE}{FAKE}"
