"""Random models for the search tests, and the slow, obvious search they are compared with."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgecap.runtime import DecodeOptions, Hypothesis

EOS, PAD = 2, 0


def random_logits(seed: int, photo: bytes, history: tuple[int, ...], vocab: int, eos_bias: float, ties: bool):
    """Logits [vocab] seeded by a hash of photo and history: they depend on all of it and nothing else."""
    key = hashlib.sha256(repr((seed, photo, history)).encode()).digest()
    logits = np.random.default_rng(list(key)).normal(size=vocab) * 2
    logits[EOS] += eos_bias
    return np.round(logits) if ties else logits


class HashSession:
    """A session over random_logits that keeps every row's history, as a cache would."""

    def __init__(self, vocab: int = 7, seed: int = 0, eos_bias: float = 0.0, ties: bool = False) -> None:
        self.vocab, self.seed, self.eos_bias, self.ties = vocab, seed, eos_bias, ties
        self.rows: list[tuple[bytes, tuple[int, ...]]] = []
        self.fed = 0

    def logits(self) -> np.ndarray:
        self.fed += len(self.rows)
        rows = [random_logits(self.seed, *row, self.vocab, self.eos_bias, self.ties) for row in self.rows]
        return np.stack(rows)

    def start(self, pixels, prompt_ids=None):
        prompt = tuple(np.asarray(prompt_ids).tolist()) if prompt_ids is not None else ()
        self.rows = [(photo.tobytes(), prompt) for photo in pixels]
        return self.logits()

    def step(self, ids, parents):
        ids, parents = np.asarray(ids), np.asarray(parents)
        assert ids.shape == parents.shape and ids.ndim == 1 and len(ids)
        self.rows = [
            (self.rows[p][0], self.rows[p][1] + (t,)) for t, p in zip(ids.tolist(), parents.tolist(), strict=True)
        ]
        return self.logits()


class Uncached:
    """Any session without its cache: each step starts again from the photo and feeds the whole history."""

    def __init__(self, new_session: Callable[[], object]) -> None:
        self.new_session = new_session

    def start(self, pixels, prompt_ids=None):
        self.pixels, self.prompt = pixels, prompt_ids
        self.rows = [(i, ()) for i in range(len(pixels))]
        return self.recompute()

    def step(self, ids, parents):
        self.rows = [
            (self.rows[p][0], self.rows[p][1] + (t,)) for t, p in zip(ids.tolist(), parents.tolist(), strict=True)
        ]
        return self.recompute()

    def recompute(self):
        return np.concatenate([self.one(self.pixels[i : i + 1], history) for i, history in self.rows])

    def one(self, pixels, history):
        session = self.new_session()
        logits = session.start(pixels, self.prompt)
        for token in history:
            logits = session.step(np.array([token]), np.array([0]))
        return logits


# --- the search, slowly -----------------------------------------------------------------------------

NextLogits = Callable[[tuple[int, ...]], np.ndarray]


def next_logits(new_session: Callable[[], object], photo: np.ndarray) -> NextLogits:
    """history → logits [vocab] of one photo, from scratch."""
    uncached = Uncached(new_session)
    uncached.prompt = None
    return lambda history: uncached.one(photo[None], history)[0]


def log_softmax(logits: np.ndarray) -> list[float]:
    values = [float(x) for x in logits]
    top = max(values)
    total = math.log(math.fsum(math.exp(x - top) for x in values))
    return [x - top - total for x in values]


def banned(history: tuple[int, ...], token: int, options: DecodeOptions, suppress: tuple[int, ...]) -> bool:
    if token in suppress or (token == EOS and len(history) < options.min_length):
        return True
    n = options.no_repeat_ngram
    longer = history + (token,)
    grams = [longer[i : i + n] for i in range(len(longer) - n + 1)] if n else []
    return token != EOS and grams.count(longer[len(longer) - n :]) > 1 if grams else False


def slow_search(follow: NextLogits, options: DecodeOptions, suppress: tuple[int, ...]) -> list[Hypothesis]:
    """Beam search over Python lists; with beam 1 it keeps one list, which is greedy search."""

    def hypothesis(tokens: tuple[int, ...], logprob: float, ended: bool) -> Hypothesis:
        score = logprob / (len(tokens) + ended) ** options.length_penalty if tokens or ended else logprob
        return Hypothesis(tokens, logprob, score, ended)

    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    pool: list[Hypothesis] = []
    for length in range(options.max_length):
        last = length + 1 == options.max_length
        candidates = []
        for tokens, total in live:
            for token, gain in enumerate(log_softmax(follow(tokens))):
                if not banned(tokens, token, options, suppress):
                    candidates.append((total + gain, tokens, token))
        candidates.sort(key=lambda candidate: -candidate[0])
        if not candidates and not pool:
            pool = [hypothesis(tokens, total, False) for tokens, total in live]
        going = []
        for place, (total, tokens, token) in enumerate(candidates[: 2 * options.beam]):
            if token == EOS:
                if place < options.beam:
                    pool.append(hypothesis(tokens, total, True))
            else:
                going.append((tokens + (token,), total))
                if last and place < options.beam:
                    pool.append(hypothesis(tokens + (token,), total, False))
        pool = sorted(pool, key=lambda each: -each.score)[: options.beam]
        live = going[: options.beam]
        if not live:
            break
        best = hypothesis(live[0][0], live[0][1], False).score
        if len(pool) == options.beam and best <= pool[-1].score:
            break
    return pool


def best_of_all(follow: NextLogits, vocab: int, max_length: int, suppress: tuple[int, ...]) -> Hypothesis:
    """The most probable caption of all that there are."""
    words = [token for token in range(vocab) if token != EOS and token not in suppress]
    found = []
    for length in range(max_length + 1):
        for tokens in itertools.product(words, repeat=length):
            ends = length < max_length
            steps = [*tokens, EOS] if ends else tokens
            logprob = sum(log_softmax(follow(tokens[:i]))[token] for i, token in enumerate(steps))
            found.append(Hypothesis(tokens, logprob, logprob, ends))
    return max(found, key=lambda each: each.score)


class Watched:
    """A model that does something before a session's steps, in the thread that makes them; counted since `start`."""

    def __init__(self, model: Any, before: Callable[[int], None]) -> None:
        self.model, self.before, self.steps = model, before, 0

    def session(self) -> Watched:
        self.inner, self.steps = self.model.session(), 0
        return self

    def start(self, pixels, prompt_ids=None):
        return self.inner.start(pixels, prompt_ids)

    def step(self, ids, parents):
        self.steps += 1
        self.before(self.steps)
        return self.inner.step(ids, parents)
