"""The search inside the graph: greedy and beam as one ONNX Loop each, token for token what runtime/decode.py does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..runtime.decode import DecodeOptions
from .fused_build import BOOL, DOUBLE, FLOAT, INT64, Scope, inline, value

FLOOR = -np.inf


@dataclass(frozen=True)
class Decoder:
    """The decoder as the loops need it.

    roles: the manifest's "session". photo: encoder output → its name in the main graph. vocab: number of ids.
    """

    model: onnx.ModelProto
    roles: Mapping[str, Any]
    photo: Mapping[str, str]
    vocab: int

    @property
    def carried(self) -> list[Mapping[str, Any]]:
        """What goes from step to step: hidden states and KV cache."""
        return [*self.roles.get("state", []), *self.roles.get("kv", [])]

    @property
    def grows(self) -> bool:
        """Whether the first step has one row even for a beam. With photo tensors stored per row it has all."""
        return "photo_index" not in self.roles


@dataclass(frozen=True)
class Rules:
    """What is fixed when the graph is made: everything but the beam and max_length."""

    options: DecodeOptions
    bos: int
    eos: int
    suppress: tuple[int, ...]

    def may_get_stuck(self, vocab: int) -> bool:
        """Whether all ids could be banned at once."""
        options = self.options
        open_ids = vocab - len(set(self.suppress)) - (options.min_length > 0)
        return options.no_repeat_ngram > 0 or open_ids <= 0


class Body:
    """A Loop's body in the making. `nexts` and `scans`: (name, element type) of its outputs."""

    def __init__(self, around: Scope, name: str) -> None:
        self.around, self.scope = around, Scope(f"{name}/", around)
        self.name = name
        self.step = f"{name}/step"  # int64 scalar: tokens so far
        self.starts: list[str] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.nexts: list[tuple[str, int]] = []
        self.scans: list[tuple[str, int]] = []

    def carry(self, name: str, start: str, kind: int, shape: Iterable[int | str] | None = None) -> str:
        """A tensor that starts as `start`; `nexts` must get its next values in the order of these calls."""
        inner = f"{self.name}/{name}"
        self.starts.append(start)
        self.inputs.append(value(inner, kind, shape))
        return inner

    def close(self, trips: str, going: str) -> list[str]:
        """Add the Loop to the scope around; returns its outputs: last carried values, then scans."""
        scope = self.scope
        outputs = [*self.nexts, *self.scans]
        kinds = [kind for _, kind in outputs]
        computed = {name for node in scope.nodes for name in node.output}
        names: list[str] = []
        for name in (going, *(name for name, _ in outputs)):
            fresh = name in computed and name not in names
            names.append(name if fresh else scope("Identity", name))
        body = helper.make_graph(
            scope.nodes,
            self.name,
            [value(self.step, INT64, []), value(f"{self.name}/going", BOOL, []), *self.inputs],
            [value(names[0], BOOL, []), *(value(*each) for each in zip(names[1:], kinds, strict=True))],
        )
        begin = scope.constant(True, bool)
        return self.around.many("Loop", trips, begin, *self.starts, count=len(outputs), body=body)


def _add_decoder(
    body: Body, decoder: Decoder, token: str, rows: str | None
) -> tuple[str, Callable[[str | None], None]]:
    """Inline one decoder step; returns the logits [rows, vocab] in float32 and a function that hands the state on.

    token: carried ids [rows]. rows: name of the int64 [1] number of rows, None for a single one. The returned function
    takes the parents [rows] whose state each row continues, None where rows stay.
    """
    around, scope, roles = body.around, body.scope, decoder.roles
    constant = around.constant
    declared = {each.name: each for each in decoder.model.graph.input}
    kinds = {name: each.type.tensor_type.elem_type for name, each in declared.items()}
    first = None if rows is None or decoder.grows else rows  # rows of the first step, None: one

    def spread(name: str, rank: int) -> str:
        """A photo's tensor [1, ...] for each row of the first step."""
        if first is None:
            return name
        return around("Expand", name, around("Concat", first, constant([1] * (rank - 1)), axis=0))

    def shape(name: str) -> list[int | str]:
        dims = declared[name].type.tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else f"{body.name}/{dim.dim_param}" for dim in dims]

    given, fixed = {}, set()
    given[roles["ids"]["input"]] = token if roles["ids"]["rank"] == 1 else scope("Unsqueeze", token, constant([1]))
    for name, source in roles.get("photo", {}).items():
        given[name] = decoder.photo[source]
        fixed.add(name)
    if "photo_index" in roles:
        zero = constant([0])
        given[roles["photo_index"]] = zero if rows is None else around("Expand", zero, rows)
        fixed.add(roles["photo_index"])
    empties = []
    for state in roles.get("state", []):
        name = state["input"]
        start = spread(decoder.photo[state["init"]], len(shape(name)))
        given[name] = body.carry(name, start, kinds[name], shape(name))
    for kv in roles.get("kv", []):
        name = kv["input"]
        empty = constant(np.zeros((1, kv["heads"], 0, kv["dim"])), helper.tensor_dtype_to_np_dtype(kinds[name]))
        given[name] = body.carry(name, spread(empty, 4), kinds[name], shape(name))
    if "prefix" in roles:
        name, dim = roles["prefix"]["input"], roles["prefix"]["dim"]
        given[name] = body.carry(name, spread(decoder.photo[roles["prefix"]["from"]], 3), kinds[name], shape(name))
        empty = constant(np.zeros((1, 0, dim)), helper.tensor_dtype_to_np_dtype(kinds[name]))
        if rows is not None:
            empty = around("Expand", empty, around("Concat", rows, constant([1, 1]), axis=0))
        empties.append((empty, kinds[name]))
    if "cache" in roles:  # positions filled behind this step: those of the past, which grows here, and what it reads
        read = [roles["ids"]["input"], *([roles["prefix"]["input"]] if "prefix" in roles else [])]
        filled = scope("Shape", given[roles["kv"][0]["input"]], start=2, end=3)
        for name in read:
            filled = scope("Add", filled, scope("Shape", given[name], start=1, end=2))
        given[roles["cache"]["filled"]] = scope("Cast", scope("Squeeze", filled), to=TensorProto.INT32)
    outputs = inline(decoder.model, given, scope, f"{body.name}/decoder/", weights="decoder/", fixed=fixed)
    logits = outputs[roles["logits"]]
    if {each.name: each for each in decoder.model.graph.output}[roles["logits"]].type.tensor_type.elem_type != FLOAT:
        logits = scope("Cast", logits, to=FLOAT)

    def hand_on(parents: str | None) -> None:
        for entry in decoder.carried:
            after = outputs[entry["output"]]
            after = after if parents is None else scope("Gather", after, parents, axis=0)
            body.nexts.append((after, kinds[entry["input"]]))
        body.nexts.extend(empties)  # the photo's prefix is fed once

    return logits, hand_on


def _ban(body: Body, rules: Rules, vocab: int, logits: str, history: str | None) -> str:
    """Logits [rows, vocab] with -inf where a token may not follow history [rows, ≥ step]."""
    scope, options = body.scope, rules.options
    constant = scope.constant
    banned = np.zeros(vocab, np.float32)
    banned[list(set(rules.suppress) - {rules.eos})] = FLOOR
    mask = constant(banned, np.float32) if np.isinf(banned).any() else None
    if options.min_length:
        early = banned.copy()
        early[rules.eos] = FLOOR
        soon = scope("Less", body.step, constant(options.min_length))
        mask = scope("Where", soon, constant(early, np.float32), constant(banned, np.float32))
    allowed = logits if mask is None else scope("Add", logits, mask)
    n = options.no_repeat_ngram
    if n == 0:
        return allowed
    assert history is not None
    # Of the n-grams that start at 0, 1, ... count - 1, those that begin as the last n - 1 tokens: their last token.
    zero, one, axis = constant([0]), constant([1]), constant([1])
    step = scope("Reshape", body.step, one)
    count = scope("Max", scope("Sub", step, constant([n - 1])), zero)  # [1]
    ends = scope("Slice", history, constant([n - 1]), scope("Add", count, constant([n - 1])), axis)  # [rows, count]
    seen = scope("Equal", ends, ends)
    for place in range(n - 1):
        then = scope("Slice", history, constant([place]), scope("Add", count, constant([place])), axis)
        at = scope("Add", count, constant([place]))
        now = scope("Slice", history, at, scope("Add", at, one), axis)  # [rows, 1]
        seen = scope("And", seen, scope("Equal", then, now))
    worst, best = constant(FLOOR, np.float32), constant(np.inf, np.float32)
    return scope("ScatterElements", allowed, ends, scope("Where", seen, worst, best), axis=1, reduction="min")


def greedy(around: Scope, decoder: Decoder, rules: Rules, trips: str) -> tuple[str, str]:
    """Greedy search of at most `trips` [1] tokens → names of ids [length] and logprob (double scalar)."""
    body = Body(around, "greedy")
    constant = around.constant
    scope = body.scope
    repeats = rules.options.no_repeat_ngram > 0
    # The row's number stays open: were it a known 1, ONNX Runtime would turn MatMuls into Gemms before it quantizes.
    token = body.carry("token", constant([rules.bos]), INT64, ["greedy/rows"])
    history = body.carry("history", constant(np.zeros((1, 0))), INT64, [1, "greedy/length"]) if repeats else None
    logits, hand_on = _add_decoder(body, decoder, token, None)
    allowed = _ban(body, rules, decoder.vocab, logits, history)
    best = scope("ArgMax", allowed, axis=1, keepdims=0)  # [1]; ties: the lower id
    gain = scope("Gather", scope("LogSoftmax", logits, axis=1), best, axis=1)  # [1, 1]
    if rules.may_get_stuck(decoder.vocab):
        floor = constant(FLOOR, np.float32)
        gain = scope("Where", scope("Equal", scope("ReduceMax", allowed), floor), floor, gain)
    ended = scope("Equal", best, constant(rules.eos))
    body.nexts.append((best, INT64))
    if history:
        body.nexts.append((scope("Concat", history, scope("Unsqueeze", best, constant([0])), axis=1), INT64))
    hand_on(None)
    body.scans = [(best, INT64), (gain, FLOAT)]
    *_, tokens, gains = body.close(trips, scope("Squeeze", scope("Not", ended)))

    # Where nothing may follow (gain -inf) the caption ends, too, unfinished; the steps after it are in vain.
    flat = constant([-1])
    tokens, gains = around("Reshape", tokens, flat), around("Reshape", gains, flat)
    stuck = around("Equal", gains, constant(FLOOR, np.float32))
    stops = around("Or", around("Equal", tokens, constant(rules.eos)), stuck)
    length = _first(around, stops)
    counted = around("Where", stuck, constant(0, np.float64), around("Cast", gains, to=DOUBLE))
    counted = around("Slice", counted, constant([0]), around("Add", length, constant([1])))
    return around("Slice", tokens, constant([0]), length), around("ReduceSum", counted, keepdims=0)


def _first(scope: Scope, flags: str) -> str:
    """Index [1] of the first true of flags [n]; n where there is none."""
    closed = scope("Concat", flags, scope.constant([True], bool), axis=0)
    return scope("ArgMax", scope("Cast", closed, to=FLOAT), axis=0)


def beam(around: Scope, decoder: Decoder, rules: Rules, width: str, max_length: str, trips: str) -> tuple[str, str]:
    """Beam search → names of the best hypothesis' ids [length] and logprob (double scalar).

    width, max_length, trips (max_length, or 0 for no search at all): names of int64 [1].
    Hypotheses are rows of max_length ids filled up with EOS. The pool starts full of hypotheses that score -inf, so
    that it need not be asked for its size.
    """
    body = Body(around, "beam")
    constant, scope = around.constant, body.scope
    penalty, vocab = rules.options.length_penalty, decoder.vocab
    floor, zero, one = constant(FLOOR, np.float64), constant([0]), constant([1])

    def full(shape: str, content: Any, dtype: Any) -> str:
        return around("Expand", constant(content, dtype), shape)

    both = around("Mul", width, constant([2]))
    each = around("Min", both, constant([vocab]))  # candidates of one row
    places = around("Range", constant(0), around("Squeeze", max_length), constant(1))  # [max_length]
    table = around("Concat", width, max_length, axis=0)
    blank = full(table, rules.eos, np.int64)
    nothing = full(width, FLOOR, np.float64)
    others = around("Expand", floor, around("Sub", width, one))
    alone = around("Concat", constant([0.0], np.float64), others, axis=0)  # one beam at first
    lengths = around("Add", around("Cast", places, to=DOUBLE), constant(1, np.float64))
    norms = around("Pow", lengths, constant(penalty, np.float64)) if penalty else None  # length, EOS included
    enter = around("Less", around("Range", constant(0), around("Squeeze", both), constant(1)), width)  # [2·beam]
    last = around("Sub", max_length, one)
    candidates = around("Concat", width, each, axis=0)

    rows = None if decoder.grows else width
    token = body.carry("token", around("Expand", constant([rules.bos]), rows or one), INT64, ["beam/rows"])
    tokens = body.carry("tokens", blank, INT64, ["beam/width", "beam/places"])
    totals = body.carry("totals", alone, DOUBLE, ["beam/width"])
    scores = body.carry("scores", nothing, DOUBLE, ["beam/width"])
    logprobs = body.carry("logprobs", nothing, DOUBLE, ["beam/width"])
    texts = body.carry("texts", blank, INT64, ["beam/width", "beam/places"])
    logits, hand_on = _add_decoder(body, decoder, token, width)
    if decoder.grows and rules.options.no_repeat_ngram:  # a history for each row
        logits = scope("Expand", logits, around("Concat", width, one, axis=0))
    allowed = _ban(body, rules, vocab, logits, tokens)

    top, ids = scope.many("TopK", allowed, each, count=2, axis=1)  # [rows, each]; ties: the lower id
    gains = scope("GatherElements", scope("LogSoftmax", logits, axis=1), ids, axis=1)
    gains = scope("Where", scope("Equal", top, constant(FLOOR, np.float32)), top, gains)  # -inf where banned
    gains = scope("Cast", gains, to=DOUBLE)
    sums = scope("Add", scope("Unsqueeze", totals, one), gains)  # [beam, each], also where there is one row
    if decoder.grows:
        ids = scope("Expand", ids, candidates)
    flat = constant([-1])
    sums, place = scope.many("TopK", scope("Reshape", sums, flat), both, count=2, axis=0)  # [2·beam]
    ids = scope("Gather", scope("Reshape", ids, flat), place)
    origin = scope("Div", place, each)  # the beam each continues
    ends = scope("Equal", ids, constant(rules.eos))
    here = scope("Equal", places, body.step)  # [max_length]
    grown = scope("Where", here, scope("Unsqueeze", ids, one), scope("Gather", tokens, origin))  # [2·beam, max_length]

    def score(total: str) -> str:
        return total if norms is None else scope("Div", total, scope("Gather", norms, body.step))

    closing = scope("And", enter, scope("Or", ends, scope("Equal", last, body.step)))
    entering = scope("Where", closing, score(sums), floor)
    new = [(entering, sums, grown)]
    if rules.may_get_stuck(vocab):
        # Nothing may follow and nothing has been found: what there is, unfinished.
        stuck = scope("And", scope("Equal", scope("Gather", sums, zero), floor), _none(scope, scores))
        before = totals
        if norms is not None:
            index = scope("Max", scope("Sub", body.step, constant(1)), constant(0))  # of no tokens: their logprob, 0
            before = scope("Div", totals, scope("Gather", norms, index))
        new.append((scope("Where", stuck, before, floor), totals, tokens))
    scores_all, logprobs_all, texts_all = (
        scope("Concat", old, *more, axis=0)
        for old, more in zip((scores, logprobs, texts), zip(*new, strict=True), strict=True)
    )
    pool, at = scope.many("TopK", scores_all, width, count=2, axis=0)  # ties: the earlier find
    live, pick = scope.many("TopK", scope("Where", ends, floor, sums), width, count=2, axis=0)
    parents = scope("Gather", origin, pick)
    if decoder.grows:  # beams that do not exist continue row 0, the only one that surely does
        parents = scope("Where", scope("Equal", live, floor), constant(0), parents)
    worst = scope("Gather", pool, scope("Sub", width, one))  # [1]
    going = scope("Greater", score(scope("Slice", live, zero, one)), worst)
    body.nexts += [
        (scope("Gather", ids, pick), INT64),
        (scope("Gather", grown, pick), INT64),
        (live, DOUBLE),
        (pool, DOUBLE),
        (scope("Gather", logprobs_all, at), DOUBLE),
        (scope("Gather", texts_all, at), INT64),
    ]
    hand_on(parents)
    results = body.close(trips, scope("Squeeze", going))
    _, _, _, _, logprobs, texts, *_ = results
    text = around("Gather", texts, constant(0))  # [max_length]
    length = _first(around, around("Equal", text, constant(rules.eos)))
    return around("Slice", text, zero, length), around("Gather", logprobs, constant(0))


def _none(scope: Scope, scores: str) -> str:
    """Whether the pool's best [1] is no hypothesis."""
    return scope("Equal", scope("Gather", scores, scope.constant([0])), scope.constant(FLOOR, np.float64))
