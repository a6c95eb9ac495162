"""Captions as they are said: pieces, cancellation, and calls beside a running event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from edgecap.runtime import Bundle, Captioner, EdgecapError, Hypothesis, Tokenizer, UsageError, load_model
from edgecap.runtime.streaming import spoken

from .graphs import SIZE, photo
from .models import Watched


@pytest.fixture(scope="module")
def photos() -> list:
    return [photo(seed, (SIZE + seed, 2 * SIZE)) for seed in range(11)]


@pytest.fixture
def watched(bundle_path) -> Callable[..., tuple[Captioner, Watched]]:
    def load(before: Callable[[int], None] = lambda step: None) -> tuple[Captioner, Watched]:
        model = Watched(load_model(Bundle.open(bundle_path), threads=1), before)
        return Captioner.load(bundle_path, model=model), model

    return load


def test_pieces_are_the_caption(captioner, photos):
    for each in photos[:4]:
        for options in ({}, {"prompt": "a red"}, {"max_length": 3}, {"min_length": 5}, {"beam": 3}):
            stream = captioner.stream(each, **options)
            pieces = list(stream)
            assert stream.caption == captioner(each, **options) and "".join(pieces) == stream.caption.text
            assert len(pieces) == (1 if options.get("beam") else len(stream.caption.token_ids))
            assert next(stream, None) is None


def test_a_piece_comes_before_the_next_step(watched, photos):
    captioner, model = watched()
    stream = captioner.stream(photos[0], min_length=6, max_length=6)
    for count, _ in enumerate(stream):
        assert model.steps == count
    assert count == 5
    for _ in captioner.stream(photos[0], min_length=6):
        break
    stream = captioner.stream(photos[0], min_length=6)
    next(stream)
    with pytest.raises(UsageError, match="before the stream has ended"):
        _ = stream.caption
    stream.close()
    assert list(stream) == [] and model.steps == 0
    with pytest.raises(UsageError, match="closed before its end"):
        _ = stream.caption


def test_what_a_stream_refuses(captioner, photos, tmp_path):
    with pytest.raises(UsageError, match="one photo"):
        captioner.stream(photos)
    with pytest.raises(UsageError, match="beam"):
        captioner.stream(photos[0], beam=0)
    with pytest.raises(UsageError, match="is_set"):
        captioner.stream(photos[0], cancel=True)
    stream = captioner.stream(tmp_path / "nothing.jpg")
    with pytest.raises(EdgecapError, match="nothing.jpg: there is no such file"):
        next(stream)
    with pytest.raises(UsageError, match="ended in an error, without a caption: .*nothing.jpg"):
        _ = stream.caption
    with pytest.raises(UsageError, match="not NoneType"):
        next(captioner.stream(None))


# --- text ------------------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    """Every byte is a token, in the order of byte-level BPE's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({symbol: at for at, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(inner)


def byte_fallback() -> Tokenizer:
    """As Llama's first tokenizers: words, and bytes for what is none."""
    words = ["▁a", "▁dog", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Inner(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner)


def word_pieces() -> Tokenizer:
    words = ["a", "dog", "##s", "'s", ".", "n't", "##!", "do"]
    inner = Inner(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="a"))
    inner.decoder = decoders.WordPiece()
    return Tokenizer(inner)


def dropping() -> Tokenizer:
    inner = Inner(models.WordLevel({"a": 0, "b": 1, "<pad>": 2}, unk_token="a"))
    inner.decoder = decoders.CTC()  # drops what is said twice
    return Tokenizer(inner)


def steps_of(ids: Iterable[int]) -> Iterator[list[tuple[int, int]]]:
    ids = tuple(ids)
    yield from ([(0, token)] for token in ids)
    yield []
    return [[Hypothesis(ids, 0.0, 0.0, True)]]


@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_pieces])
def test_pieces_are_never_taken_back(make):
    tokenizer = make()
    assert tokenizer.appends

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12), st.integers(0, 3))
    def check(ids: list[int], prompt: int) -> None:
        before, after = tuple(ids[:prompt]), tuple(ids[prompt:])
        assert "".join(spoken(tokenizer, before, steps_of(after))) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_break_no_character(make):
    tokenizer, text = make(), "dog €😀 über 日本"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces = list(spoken(tokenizer, (), steps_of(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) and "😀" in "".join(pieces)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 3 or make is byte_fallback


def test_a_tokenizer_that_takes_back_gives_one_piece():
    tokenizer = dropping()
    assert not tokenizer.appends
    assert list(spoken(tokenizer, (), steps_of([0, 0, 1, 1, 0]))) == [tokenizer.decode([0, 0, 1, 1, 0])]


# --- cancelling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", [1, 3])
def test_cancelling_ends_the_search_with_what_it_has(watched, photos, beam):
    cancel = threading.Event()
    captioner, model = watched(lambda step: cancel.set() if step == 3 else None)
    caption = captioner(photos[0], beam=beam, min_length=8, max_length=9, cancel=cancel)
    assert model.steps == 3 and caption.cut and len(caption.token_ids) == 4
    whole = captioner(photos[0], beam=1, min_length=8, max_length=9)
    assert not whole.cut and (beam > 1 or whole.token_ids[:4] == caption.token_ids)
    at_once = captioner(photos[0], beam=beam, min_length=8, cancel=cancel)
    assert at_once.cut and len(at_once.token_ids) == 1 and model.steps == 0
    stream = captioner.stream(photos[0], beam=beam, min_length=8, cancel=cancel)
    assert "".join(stream) == stream.caption.text and stream.caption.cut
    assert len(captioner(photos, beam=beam, cancel=cancel)) == 8  # the first batch


# --- asyncio ---------------------------------------------------------------------------------------


def test_the_event_loop_is_not_blocked(watched, photos):
    captioner, model = watched(lambda step: time.sleep(0.02))
    expected = captioner(photos[0], min_length=8, max_length=8)

    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.002)
                ticks += 1

        ticker = asyncio.create_task(tick())
        assert await captioner.acaption(photos[0], min_length=8, max_length=8) == expected
        stream = captioner.astream(photos[0], min_length=8, max_length=8)
        assert "".join([piece async for piece in stream]) == expected.text and stream.caption == expected
        ticker.cancel()
        assert ticks > 15

    asyncio.run(main())


def test_many_tasks_at_once(captioner, photos):
    expected = captioner(photos)

    async def main() -> None:
        assert await asyncio.gather(*(captioner.acaption(each) for each in photos)) == [
            captioner(each) for each in photos
        ]
        assert await captioner.acaption(photos) == expected
        with pytest.raises(UsageError, match="beam"):
            await captioner.acaption(photos[0], beam=0)

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cancelled_task_ends_the_search(watched, photos, streamed):
    going = threading.Event()

    def before(step: int) -> None:
        going.set()
        time.sleep(0.02)

    captioner, model = watched(before)

    async def said() -> None:
        if streamed:
            async for _ in captioner.astream(photos[0], min_length=200, max_length=200):
                pass
        else:
            await captioner.acaption(photos[0], min_length=200, max_length=200, beam=2)

    async def main() -> None:
        task = asyncio.create_task(said())
        await asyncio.to_thread(going.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)
        steps = model.steps
        await asyncio.sleep(0.1)
        assert model.steps == steps < 20

    asyncio.run(main())


def test_a_step_that_outlasts_its_wait(watched, photos):
    """The next one to ask waits for it, and the search ends: never "generator already executing"."""
    going, go_on = threading.Event(), threading.Event()

    def before(step: int) -> None:
        going.set()
        go_on.wait(5)

    captioner, model = watched(before)

    async def main() -> None:
        stream = captioner.astream(photos[0], min_length=8, max_length=8)
        first = await anext(stream)
        with pytest.raises(TimeoutError):
            step = asyncio.ensure_future(anext(stream))
            await asyncio.to_thread(going.wait, 5)
            await asyncio.wait_for(step, 0.02)
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        rest = [piece async for piece in stream]
        assert stream.caption.cut and model.steps == 1 and first + "".join(rest) != ""
        stream = captioner.astream(photos[0], min_length=8, max_length=8)
        await anext(stream)
        await stream.aclose()
        assert [piece async for piece in stream] == []
        with pytest.raises(UsageError, match="closed before its end"):
            _ = stream.caption

    asyncio.run(main())
