"""The search against a slow one, on random models: the properties every engine's captions rest on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecap.runtime import DecodeOptions, EdgecapError, Hypothesis, UsageError
from edgecap.runtime.decode import _beam, _best, _Rules, decode

from .models import EOS, PAD, HashSession, Uncached, best_of_all, next_logits, slow_search

SUPPRESS = (PAD, 1)
quick = settings(max_examples=60, deadline=None)

models = st.builds(
    lambda vocab, seed, eos_bias: lambda ties=False: HashSession(vocab, seed, eos_bias, ties),
    vocab=st.integers(4, 9),
    seed=st.integers(0, 2**32),
    eos_bias=st.sampled_from([-2.0, 0.0, 1.5]),
)


@st.composite
def options(draw: st.DrawFn, beam: int | None = None) -> DecodeOptions:
    longest = draw(st.integers(1, 7))
    return DecodeOptions(
        beam=beam or draw(st.integers(1, 5)),
        max_length=longest,
        min_length=draw(st.integers(0, longest)),
        length_penalty=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        no_repeat_ngram=draw(st.integers(0, 3)),
    )


photos = st.integers(1, 4).map(lambda n: np.arange(n * 3, dtype=np.uint8).reshape(n, 1, 1, 3))


def run(session: object, pixels: np.ndarray, chosen: DecodeOptions) -> list[list[Hypothesis]]:
    return decode(session, pixels, chosen, eos_id=EOS, suppress=SUPPRESS)


def same(fast: list[Hypothesis], slow: list[Hypothesis]) -> None:
    assert [each.token_ids for each in fast] == [each.token_ids for each in slow]
    assert [each.finished for each in fast] == [each.finished for each in slow]
    for name in ("logprob", "score"):
        ours, theirs = ([getattr(each, name) for each in side] for side in (fast, slow))
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


@quick
@given(models, photos, options())
def test_fast_is_slow(model, pixels, chosen):
    fast = run(model(), pixels, chosen)
    for photo, found in zip(pixels, fast, strict=True):
        same(found, slow_search(next_logits(model, photo), chosen, SUPPRESS))


@quick
@given(models, photos, options(beam=1), st.booleans())
def test_beam_of_one_is_greedy(model, pixels, chosen, ties):
    greedy = run(model(ties), pixels, chosen)
    session = model(ties)
    rules = _Rules(chosen, EOS, np.array(SUPPRESS))
    for ours, theirs in zip(_beam(session, session.start(pixels), rules), greedy, strict=True):
        same(ours, theirs)


@quick
@given(models, photos, options(), st.booleans())
def test_batch_is_one_by_one(model, pixels, chosen, ties):
    together = run(model(ties), pixels, chosen)
    assert together == [run(model(ties), photo[None], chosen)[0] for photo in pixels]


@quick
@given(models, photos, options())
def test_cached_is_uncached(model, pixels, chosen):
    assert run(model(), pixels, chosen) == run(Uncached(model), pixels, chosen)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([-1.0, 0.0, 1.0]))
def test_a_beam_wide_enough_finds_the_best_of_all(seed, eos_bias):
    def model() -> HashSession:
        return HashSession(5, seed, eos_bias)

    pixels = np.zeros((1, 1, 1, 3), np.uint8)
    best = run(model(), pixels, DecodeOptions(beam=32, max_length=4))[0][0]
    same([best], [best_of_all(next_logits(model, pixels[0]), 5, 4, SUPPRESS)])


@quick
@given(models, photos, options())
def test_what_was_asked_for_holds(model, pixels, chosen):
    for found in run(model(), pixels, chosen):
        assert 1 <= len(found) <= chosen.beam
        assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
        assert len({each.token_ids for each in found}) == len(found)
        for each in found:
            ids, n = each.token_ids, chosen.no_repeat_ngram
            assert each.logprob <= 0 and len(ids) <= chosen.max_length
            assert not set(ids) & {EOS, *SUPPRESS}
            assert not each.finished or len(ids) >= chosen.min_length
            grams = [ids[i : i + n] for i in range(len(ids) - n + 1)] if n else []
            assert len(set(grams)) == len(grams)


def test_finished_rows_are_not_fed_again():
    pixels = np.arange(30, dtype=np.uint8).reshape(10, 1, 1, 3)
    chosen = DecodeOptions(max_length=20)
    session = HashSession(6, seed=5, eos_bias=1.0)
    found = [each[0] for each in run(session, pixels, chosen)]
    lengths = [len(each.token_ids) for each in found]
    assert len(set(lengths)) > 2  # they do end at different times
    assert session.fed == sum(length + each.finished for length, each in zip(lengths, found, strict=True))


def test_prompt_reaches_the_session():
    pixels = np.zeros((1, 1, 1, 3), np.uint8)
    chosen = DecodeOptions(max_length=5)

    def after(prompt: list[int] | None) -> list[Hypothesis]:
        ids = None if prompt is None else np.array(prompt)
        return decode(HashSession(8, seed=1), pixels, chosen, eos_id=EOS, prompt_ids=ids)[0]

    assert after([4, 5]) != after(None)
    session = HashSession(8, seed=1)
    session.start(pixels, np.array([4, 5]))
    assert session.rows[0][1] == (4, 5)


def test_no_photos():
    assert run(HashSession(), np.zeros((0, 1, 1, 3), np.uint8), DecodeOptions()) == []


def test_nothing_may_follow():
    # Every token but EOS is suppressed and EOS comes too early: what there is, unfinished, and no crash.
    pixels = np.zeros((2, 1, 1, 3), np.uint8)
    for beam in (1, 3):
        chosen = DecodeOptions(beam=beam, max_length=4, min_length=2)
        for found in decode(HashSession(5), pixels, chosen, eos_id=EOS, suppress=(0, 1, 3, 4)):
            assert found == [Hypothesis((), 0.0, 0.0, False)]


def test_a_model_that_gives_nan_is_an_error():
    class Broken(HashSession):
        def logits(self):
            return np.full((len(self.rows), self.vocab), np.nan, np.float32)

    with pytest.raises(EdgecapError, match="not a number"):
        run(Broken(), np.zeros((1, 1, 1, 3), np.uint8), DecodeOptions())


def test_logits_are_left_as_they_were():
    class Shared(HashSession):
        def logits(self):
            self.shared = super().logits()
            self.copy = self.shared.copy()
            return self.shared

    for beam in (1, 2):
        session = Shared()
        run(session, np.zeros((1, 1, 1, 3), np.uint8), DecodeOptions(beam=beam, max_length=1))
        assert np.array_equal(session.shared, session.copy)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam": 0},
        {"beam": 65},
        {"beam": 2.0},
        {"beam": True},
        {"max_length": 0},
        {"min_length": -1},
        {"min_length": 25},
        {"length_penalty": -0.1},
        {"length_penalty": float("nan")},
        {"length_penalty": "1"},
        {"no_repeat_ngram": -1},
        {"temperature": 1.0},
    ],
    ids=str,
)
def test_bad_options(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        DecodeOptions.from_dict(wrong)


def test_options_from_the_manifest():
    chosen = DecodeOptions(beam=3, max_length=9, length_penalty=1)
    assert DecodeOptions.from_dict(dataclasses.asdict(chosen)) == chosen


@quick
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8), st.integers(0, 2**32))
def test_best_is_a_stable_sort(beams, vocab, count, seed):
    """Against sorting all sums: ties to the lower beam, then the lower token, and nothing banned."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((beams, vocab)) < 0.2, -np.inf, rng.integers(-2, 3, (beams, vocab))).astype(np.float32)
    offsets = np.where(rng.random(beams) < 0.2, -np.inf, rng.integers(-2, 3, beams)).tolist()
    sums = (values + np.array(offsets)[:, None]).ravel()
    order = [i for i in np.argsort(-sums, kind="stable").tolist() if sums[i] > -np.inf][:count]
    found = _best(values, offsets, values.argmax(axis=1).tolist(), count)
    assert [total for total, _, _ in found] == [sums[i] for i in order]
    if vocab > 1:  # within one sum and beam, larger values come first; which here are equal only for equal sums
        assert [beam * vocab + token for _, beam, token in found] == order


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_a_deadline_ends_the_search_with_the_best_so_far(beam, steps, monkeypatch):
    """A clock that a step moves by one second."""
    clock = [0.0]
    session = HashSession(9, 4, -20.0, False)  # that hardly ever ends by itself
    step = session.step
    monkeypatch.setattr("edgecap.runtime.decode.time.monotonic", lambda: clock[0])

    def slow(ids, parents):
        clock[0] += 1
        return step(ids, parents)

    monkeypatch.setattr(session, "step", slow)
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 1, 1, 3)
    found = run(session, pixels, DecodeOptions(beam=beam, max_length=8, deadline_ms=1000 * steps))
    for hypotheses in found:
        best = hypotheses[0]
        assert best.cut is (steps < 7) and not best.finished
        assert len(best.token_ids) == min(steps + 1, 8)
        uncut = run(HashSession(9, 4, -20.0, False), pixels, DecodeOptions(beam=beam, max_length=len(best.token_ids)))
        assert best.token_ids in {each[0].token_ids for each in uncut}
