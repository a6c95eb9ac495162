"""Greedy and beam search in numpy over any `Session`: one implementation serves every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import EdgecapError, UsageError

if TYPE_CHECKING:
    from .session import Ids, Logits, Pixels, Session

MAX_BEAM = 64
MAX_LENGTH = 4096


@dataclass(frozen=True)
class DecodeOptions:
    """How to search. Lengths count tokens after BOS and prompt; EOS is not counted.

    beam: hypotheses kept per photo, 1 is greedy. max_length ≥ 1, 0 ≤ min_length ≤ max_length.
    length_penalty ≥ 0: hypotheses are ranked by logprob / length**penalty, where length counts EOS too
    (Wu et al. 2016 in the simple form that transformers and fairseq use; 0 ranks by log-probability).
    no_repeat_ngram: no n-gram of this many tokens twice in one caption; 0 allows any.
    Raises UsageError for values out of range.
    """

    beam: int = 1
    max_length: int = 24
    min_length: int = 0
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("beam", 1, MAX_BEAM),
            ("max_length", 1, MAX_LENGTH),
            ("min_length", 0, self.max_length),
            ("no_repeat_ngram", 0, MAX_LENGTH),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty <= 10:
            raise UsageError(f"length_penalty must be a number from 0 to 10, not {penalty!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecodeOptions:
        """Options from names and values; an unknown name is a UsageError that lists the known ones."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"unknown decoding option {name!r}; there are {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class Hypothesis:
    """One decoded caption: ids without BOS, prompt and EOS.

    logprob: sum of the model's log softmax over the ids, and over EOS when it was emitted (natural log, ≤ 0),
    before anything was suppressed. finished: EOS was emitted; otherwise max_length cut it off.
    """

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    finished: bool


def decode(
    session: Session,
    pixels: Pixels,
    options: DecodeOptions,
    *,
    eos_id: int,
    suppress: Sequence[int] = (),
    prompt_ids: Ids | None = None,
) -> list[list[Hypothesis]]:
    """Caption photos uint8 [N, H, W, 3]: per photo up to `options.beam` hypotheses, best first.

    `suppress` are ids never emitted (BOS, padding, unknown). Ties go to the lower beam, then the lower id, so
    results do not depend on how photos are batched. Raises EdgecapError if the model yields NaN.
    """
    if len(pixels) == 0:
        return []
    logits = session.start(pixels, prompt_ids)
    rules = _Rules(options, eos_id, np.asarray(sorted(set(suppress) - {eos_id}), np.int64))
    return (_greedy if options.beam == 1 else _beam)(session, logits, rules)


def _score(logprob: float, length: int, penalty: float) -> float:
    return logprob / length**penalty if length else logprob


@dataclass(frozen=True)
class _Rules:
    """What may follow a history, shared by both searches."""

    options: DecodeOptions
    eos_id: int
    suppress: Ids

    def apply(self, logits: Logits, history: Ids) -> tuple[Logits, Logits]:
        """Logits [rows, vocab] after history [rows, t] → (logits, -inf where banned; normaliser [rows])."""
        top = logits.max(axis=1, keepdims=True)  # [rows, 1]
        normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))  # [rows]
        if not np.isfinite(normaliser).all():
            raise EdgecapError(
                "the model's output is not a number (NaN or infinity): its graph is broken, export it again"
            )
        allowed = logits.copy()
        allowed[:, self.suppress] = -np.inf
        length, n = history.shape[1], self.options.no_repeat_ngram
        if length < self.options.min_length:
            allowed[:, self.eos_id] = -np.inf
        if 0 < n <= length:
            grams = np.lib.stride_tricks.sliding_window_view(history, n, axis=1)  # [rows, length-n+1, n]
            seen = (grams[:, :, :-1] == history[:, None, length - n + 1 :]).all(axis=2)
            rows, at = np.nonzero(seen)
            allowed[rows, grams[rows, at, -1]] = -np.inf
        return allowed, normaliser


def _greedy(session: Session, logits: Logits, rules: _Rules) -> list[list[Hypothesis]]:
    options, photos = rules.options, len(logits)
    tokens = np.zeros((photos, options.max_length), np.int64)
    logprobs = np.zeros(photos)
    found: list[list[Hypothesis]] = [[] for _ in range(photos)]
    live = np.arange(photos)  # the photo of each row

    def close(photo: int, length: int, finished: bool) -> None:
        logprob = float(logprobs[photo])
        score = _score(logprob, length + finished, options.length_penalty)
        found[photo].append(Hypothesis(tuple(tokens[photo, :length].tolist()), logprob, score, finished))

    for length in range(options.max_length):
        allowed, normaliser = rules.apply(logits, tokens[live, :length])
        best = allowed.argmax(axis=1)  # [rows]
        gain = allowed[np.arange(len(live)), best] - normaliser  # [rows]
        stuck = np.isneginf(gain)  # nothing may follow
        logprobs[live] += np.where(stuck, 0.0, gain)
        tokens[live, length] = best
        ended = best == rules.eos_id
        for row in np.flatnonzero(ended | stuck):
            close(live[row], length, finished=not stuck[row])
        going = np.flatnonzero(~(ended | stuck))
        live = live[going]
        if not len(live) or length + 1 == options.max_length:
            break
        logits = session.step(best[going], going)
    for photo in live:
        close(photo, options.max_length, finished=False)
    return found


def _beam(session: Session, logits: Logits, rules: _Rules) -> list[list[Hypothesis]]:
    """Beam search with a pool of the best finished hypotheses (as in transformers with early_stopping=False).

    Of the best 2·beam continuations of a photo, those in the first `beam` places that end go to its pool and
    the first `beam` that do not end live on. A photo is done when its pool is full and the best live
    hypothesis would, at its present length, not enter it: so with beam 1 the search is greedy for every
    length penalty.
    """
    options, width = rules.options, rules.options.beam
    pools: list[list[Hypothesis]] = [[] for _ in range(len(logits))]
    live = np.arange(len(logits))  # [A] the photos still being searched
    totals = np.zeros((len(logits), 1))  # [A, beams] log-probability so far; one beam at first
    tokens = np.zeros((len(logits), 1, 0), np.int64)  # [A, beams, length]

    for length in range(options.max_length):
        active, beams = totals.shape
        last = length + 1 == options.max_length
        allowed, normaliser = rules.apply(logits, tokens.reshape(active * beams, length))
        ids, gains = _top(allowed, 2 * width)  # [A*beams, c] each
        each = ids.shape[1]
        sums = totals[:, :, None] + (gains - normaliser[:, None]).reshape(active, beams, each)
        order = np.argsort(-sums.reshape(active, -1), axis=1, kind="stable")[:, : 2 * width]  # [A, ≤ 2·beam]
        sums = np.take_along_axis(sums.reshape(active, -1), order, axis=1)
        ids = np.take_along_axis(ids.reshape(active, -1), order, axis=1)
        origin = order // each  # [A, ≤ 2·beam] the beam each continues

        keep, next_tokens, next_totals, parents = [], [], [], []
        for a in range(active):
            alive = []
            pool = pools[live[a]]
            for place, (total, token, beam) in enumerate(zip(sums[a], ids[a], origin[a], strict=True)):
                if total == -np.inf:
                    break
                ends = bool(token == rules.eos_id)
                if not ends:
                    alive.append(place)
                if (ends or last) and place < width:
                    text = tuple(tokens[a, beam].tolist()) + (() if ends else (int(token),))
                    score = _score(float(total), length + 1, options.length_penalty)
                    pool.append(Hypothesis(text, float(total), score, ends))
            if not alive:  # every continuation ends or is banned
                pool.extend(_cut_off(tokens[a], totals[a], options) if not pool else ())
            pool.sort(key=lambda hypothesis: -hypothesis.score)  # stable: earlier finds stay first
            del pool[width:]
            if last or not alive:
                continue
            best = _score(float(sums[a, alive[0]]), length + 1, options.length_penalty)
            if len(pool) == width and best <= pool[-1].score:
                continue
            # Beams that do not exist (a vocabulary smaller than the beam) are filled up at -inf.
            alive = alive[:width]
            missing = width - len(alive)
            picked = alive + [alive[0]] * missing
            keep.append(a)
            parents.append(a * beams + origin[a, picked])
            next_totals.append(np.concatenate([sums[a, alive], np.full(missing, -np.inf)]))
            grown = np.concatenate([tokens[a, origin[a, picked]], ids[a, picked, None]], axis=1)
            next_tokens.append(grown)  # [beam, length+1]
        if not keep:
            break
        live, totals, tokens = live[keep], np.stack(next_totals), np.stack(next_tokens)
        logits = session.step(tokens[:, :, -1].reshape(-1), np.concatenate(parents))
    return pools


def _top(values: Logits, count: int) -> tuple[Ids, Logits]:
    """The `count` largest of each row [rows, n], best first, ties to the lower index → (indices, values)."""
    count = min(count, values.shape[1])
    rows = np.arange(len(values))
    values = values.copy()
    ids = np.empty((len(values), count), np.int64)
    best = np.empty((len(values), count), values.dtype)
    for place in range(count):  # argmax is vectorised and takes the first of equals; count is small
        ids[:, place] = values.argmax(axis=1)
        best[:, place] = values[rows, ids[:, place]]
        values[rows, ids[:, place]] = -np.inf
    return ids, best


def _cut_off(tokens: Ids, totals: np.ndarray, options: DecodeOptions) -> list[Hypothesis]:
    """Live hypotheses [beams, length] that nothing may follow, as unfinished ones."""
    length = tokens.shape[1]
    return [
        Hypothesis(tuple(row.tolist()), float(total), _score(float(total), length, options.length_penalty), False)
        for row, total in zip(tokens, totals, strict=True)
        if total > -np.inf
    ]
