"""Greedy and beam search in numpy over any `Session`: one implementation serves every engine, and streams."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np

from .errors import EdgecapError, UsageError
from .process import computing

if TYPE_CHECKING:
    from .session import Ids, Logits, Pixels, Session

    Steps: TypeAlias = Generator[list[tuple[int, int]], None, list[list["Hypothesis"]]]

T = TypeVar("T")
MAX_BEAM = 64
MAX_LENGTH = 4096
MAX_DEADLINE = 10**9


class CancelToken(Protocol):
    """What may end a search early: a threading.Event, or anything with its `is_set`. Asked at every step."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class DecodeOptions:
    """How to search. Lengths count tokens after BOS and prompt; EOS is not counted.

    beam: hypotheses kept per photo, 1 is greedy. max_length ≥ 1, 0 ≤ min_length ≤ max_length.
    length_penalty ≥ 0: hypotheses are ranked by logprob / length**penalty, where length counts EOS too
    (Wu et al. 2016 in the simple form that transformers and fairseq use; 0 ranks by log-probability).
    no_repeat_ngram: no n-gram of this many tokens twice in one caption; 0 allows any.
    deadline_ms: milliseconds from the call's beginning after which the search ends with the best that it has, of one
    token at least; 0 is none. A step is not broken off: the last one may end later.
    Raises UsageError for values out of range.
    """

    beam: int = 1
    max_length: int = 24
    min_length: int = 0
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0
    deadline_ms: float = 0

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
        limit = self.deadline_ms
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit <= MAX_DEADLINE:
            raise UsageError(f"deadline_ms must be a number from 0 to {MAX_DEADLINE}, not {limit!r}")

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
    before anything was suppressed. finished: EOS was emitted; otherwise max_length cut it off, or, where `cut`, the
    deadline or a cancellation.
    """

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    finished: bool
    cut: bool = False


def never_said(tokens: Mapping[str, int]) -> tuple[int, ...]:
    """A bundle's "tokens" → the ids that no caption holds: bos, pad and unk.

    Not those that end captions, too, and not a BOS that is a word ("bos_is_word": the last one of a prompt).
    """
    names = ("pad", "unk") if tokens.get("bos_is_word") else ("bos", "pad", "unk")
    return tuple(sorted({tokens[name] for name in names if name in tokens} - {tokens["eos"]}))


def decode(
    session: Session,
    pixels: Pixels,
    options: DecodeOptions,
    *,
    eos_id: int,
    suppress: Sequence[int] = (),
    prompt_ids: Ids | None = None,
    began: float | None = None,
    cancel: CancelToken | None = None,
) -> list[list[Hypothesis]]:
    """Caption photos uint8 [N, H, W, 3]: per photo up to `options.beam` hypotheses, best first.

    began: the time.monotonic() from which the deadline counts, by default now. cancel: once it is set, the search ends
    before its next step, as at a deadline. `suppress` are ids never emitted (BOS, padding, unknown). Ties go to the
    lower beam, then the lower id, so results do not depend on how photos are batched.
    Raises EdgecapError if the model yields NaN.
    """
    steps = search(
        session,
        pixels,
        options,
        eos_id=eos_id,
        suppress=suppress,
        prompt_ids=prompt_ids,
        began=began,
        cancel=cancel,
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def search(
    session: Session,
    pixels: Pixels,
    options: DecodeOptions,
    *,
    eos_id: int,
    suppress: Sequence[int] = (),
    prompt_ids: Ids | None = None,
    began: float | None = None,
    cancel: CancelToken | None = None,
) -> Steps:
    """`decode` step by step: a generator that returns what that does.

    With beam 1 it yields what each step said, (photo, token) without EOS, before it makes the next one. With more it
    yields nothing: which words the best caption has is known at the end.
    """
    if len(pixels) == 0:
        return []
    end = (time.monotonic() if began is None else began) + options.deadline_ms / 1000
    with computing():
        logits = session.start(pixels, prompt_ids)
    banned = np.asarray(sorted(set(suppress) - {eos_id}), np.int64)
    rules = _Rules(options, eos_id, banned, end if options.deadline_ms else math.inf, cancel)
    if options.beam == 1:
        return (yield from _greedy(session, logits, rules))
    return _beam(session, logits, rules)


def _score(logprob: float, length: int, penalty: float) -> float:
    return logprob / length**penalty if length else logprob


@dataclass(frozen=True)
class _Rules:
    """What may follow a history, shared by both searches."""

    options: DecodeOptions
    eos_id: int
    suppress: Ids
    end: float = math.inf  # of time.monotonic()
    cancel: CancelToken | None = None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed, or the call was cancelled."""
        if self.cancel is not None and self.cancel.is_set():
            return True
        return self.end < math.inf and time.monotonic() >= self.end

    def shift(self, logits: Logits) -> tuple[Logits, list[float]]:
        """Logits [rows, vocab] → a copy less each row's largest, and log Σ exp of that [rows].

        Their difference is the log softmax. Raises EdgecapError for a row that has none.
        """
        shifted = logits - logits.max(axis=1, keepdims=True)  # [rows, vocab]
        normaliser = np.log(np.exp(shifted).sum(axis=1)).tolist()  # [rows]
        if not all(map(math.isfinite, normaliser)):
            raise EdgecapError(
                "the model's output is not a number (NaN or infinity): its graph is broken, export it again"
            )
        return shifted, normaliser

    def free(self, length: int) -> bool:
        """Whether nothing but `suppress` is banned after this many tokens."""
        return length >= self.options.min_length and not 0 < self.options.no_repeat_ngram <= length

    def ban(self, values: Logits, histories: Sequence[Sequence[int]]) -> None:
        """Set to -inf what may not follow, in values [rows, vocab] after histories [rows][t] of one length."""
        values[:, self.suppress] = -np.inf
        length, n = len(histories[0]), self.options.no_repeat_ngram
        if length < self.options.min_length:
            values[:, self.eos_id] = -np.inf
        if 0 < n <= length:
            history = np.array(histories, np.int64)  # [rows, t]
            grams = np.lib.stride_tricks.sliding_window_view(history, n, axis=1)  # [rows, length-n+1, n]
            seen = (grams[:, :, :-1] == history[:, None, length - n + 1 :]).all(axis=2)
            rows, at = np.nonzero(seen)
            values[rows, grams[rows, at, -1]] = -np.inf


def _greedy(session: Session, logits: Logits, rules: _Rules) -> Steps:
    options, banned = rules.options, set(rules.suppress.tolist())
    found: list[list[Hypothesis]] = [[] for _ in range(len(logits))]
    live = list(range(len(logits)))  # the photo of each row
    tokens: list[list[int]] = [[] for _ in live]  # of each row
    logprobs = [0.0 for _ in live]

    def close(row: int, finished: bool, cut: bool = False) -> None:
        score = _score(logprobs[row], len(tokens[row]) + finished, options.length_penalty)
        found[live[row]].append(Hypothesis(tuple(tokens[row]), logprobs[row], score, finished, cut))

    cut = False  # by the deadline or a cancellation
    for length in range(options.max_length):
        shifted, normaliser = rules.shift(logits)
        best = shifted.argmax(axis=1)  # [rows]
        if not (rules.free(length) and banned.isdisjoint(best.tolist())):
            rules.ban(shifted, tokens)
            best = shifted.argmax(axis=1)
        going: list[int] = []
        for row, token in enumerate(best.tolist()):
            gain = float(shifted[row, token]) - normaliser[row]
            stuck = gain == -math.inf  # nothing may follow
            logprobs[row] += 0.0 if stuck else gain
            if stuck or token == rules.eos_id:
                close(row, finished=not stuck)
            else:
                tokens[row].append(token)
                going.append(row)
        if len(going) < len(live):
            live, tokens, logprobs = _chosen(live, going), _chosen(tokens, going), _chosen(logprobs, going)
        yield [(photo, row[-1]) for photo, row in zip(live, tokens, strict=True)]
        if not live or length + 1 == options.max_length:
            break
        if cut := rules.late:
            break
        with computing():
            logits = session.step(best[going], np.array(going))
    for row in range(len(live)):
        close(row, finished=False, cut=cut)
    return found


def _chosen(values: list[T], rows: list[int]) -> list[T]:
    return [values[row] for row in rows]


def _beam(session: Session, logits: Logits, rules: _Rules) -> list[list[Hypothesis]]:
    """Beam search with a pool of the best finished hypotheses (as in transformers with early_stopping=False).

    Of the best 2·beam continuations of a photo, those in the first `beam` places that end go to its pool and
    the first `beam` that do not end live on. A photo is done when its pool is full and the best live
    hypothesis would, at its present length, not enter it: so with beam 1 the search is greedy for every
    length penalty.
    """
    options, width, eos = rules.options, rules.options.beam, rules.eos_id
    pools: list[list[Hypothesis]] = [[] for _ in range(len(logits))]
    live = list(range(len(logits)))  # the photos still being searched, one after the other in the rows
    beams = 1  # rows of each of them
    tokens: list[tuple[int, ...]] = [()] * len(live)  # of each row
    totals = [0.0] * len(live)  # log-probability of each row so far

    for length in range(options.max_length):
        longest = length + 1 == options.max_length
        cut = not longest and rules.late
        last = longest or cut
        shifted, normaliser = rules.shift(logits)
        rules.ban(shifted, tokens)
        tops = shifted.argmax(axis=1).tolist()  # [rows]
        going: list[int] = []  # the photos that live on, and for each of their rows:
        parents: list[int] = []
        next_tokens: list[tuple[int, ...]] = []
        next_totals: list[float] = []
        for place, photo in enumerate(live):
            rows = slice(place * beams, (place + 1) * beams)
            offsets = [total - lost for total, lost in zip(totals[rows], normaliser[rows], strict=True)]
            best = _best(shifted[rows], offsets, tops[rows], 2 * width)
            pool = pools[photo]
            alive = []
            for rank, (total, beam, token) in enumerate(best):
                if token != eos:
                    alive.append((total, beam, token))
                if rank < width and (last or token == eos):
                    text = tokens[rows.start + beam] + (() if token == eos else (token,))
                    score = _score(total, length + 1, options.length_penalty)
                    pool.append(Hypothesis(text, total, score, token == eos, cut and token != eos))
            if not alive and not pool:  # every continuation is banned
                pool.extend(_cut_off(tokens[rows], totals[rows], options))
            pool.sort(key=lambda hypothesis: -hypothesis.score)  # stable: earlier finds stay first
            del pool[width:]
            if last or not alive:
                continue
            if len(pool) == width and _score(alive[0][0], length + 1, options.length_penalty) <= pool[-1].score:
                continue
            # Beams that do not exist (a vocabulary smaller than the beam) are filled up at -inf.
            missing = (-math.inf, *alive[0][1:])
            going.append(photo)
            for total, beam, token in (alive + [missing] * width)[:width]:
                parents.append(rows.start + beam)
                next_totals.append(total)
                next_tokens.append((*tokens[rows.start + beam], token))
        if not going:
            break
        live, beams, totals, tokens = going, width, next_totals, next_tokens
        with computing():
            logits = session.step(np.array([ids[-1] for ids in tokens]), np.array(parents))
    return pools


def _best(values: Logits, offsets: list[float], tops: list[int], count: int) -> list[tuple[float, int, int]]:
    """The `count` largest of values [beams, vocab] + offsets [beams], best first: (sum, beam, token).

    Ties go to the lower beam, then the lower token; sums of -inf are left out. tops: the largest of each beam. What is
    returned is taken out of `values`. A few more argmax of single rows cost less than any sort of all.
    """
    sums = [float(row[top]) + offset for row, top, offset in zip(values, tops, offsets, strict=True)]
    found: list[tuple[float, int, int]] = []
    while len(found) < count and (total := max(sums)) > -math.inf:
        beam = sums.index(total)
        row = values[beam]
        found.append((total, beam, tops[beam]))
        row[tops[beam]] = -np.inf
        tops[beam] = top = int(row.argmax())
        sums[beam] = float(row[top]) + offsets[beam]
    return found


def _cut_off(tokens: Sequence[tuple[int, ...]], totals: Sequence[float], options: DecodeOptions) -> list[Hypothesis]:
    """Live hypotheses that nothing may follow, as unfinished ones."""
    return [
        Hypothesis(row, total, _score(total, len(row), options.length_penalty), False)
        for row, total in zip(tokens, totals, strict=True)
        if total > -math.inf
    ]
