"""The cache in place against the torch model, the concatenating graph and a slow search: same captions, no copies."""

from __future__ import annotations

import dataclasses
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from edgecap.export import onnx_quantized
from edgecap.export.artifact import Artifact, Source
from edgecap.export.calibration import engine, teacher_force
from edgecap.export.graph import Graph, op_counts
from edgecap.export.kv_cache import share_cache
from edgecap.export.onnx_quantized import build_graph, build_graphs
from edgecap.export.onnx_target import onnx_artifact
from edgecap.runtime import kv_cache
from edgecap.runtime.backends.onnx import OnnxModel, OnnxSession
from edgecap.runtime.backends.onnx_cache import CachedSession
from edgecap.runtime.decode import DecodeOptions, decode, never_said
from edgecap.runtime.errors import EdgecapError, UsageError

from ..runtime.models import Uncached, next_logits, slow_search
from . import nets
from .nets import photos
from .small_source import cosine

KINDS = ("llama", "wide_llama", "gpt2", "opt", "transformer")
SEARCHES = {  # random nets like to repeat one word, whatever the photo
    "greedy": DecodeOptions(max_length=8, no_repeat_ngram=1),
    "beam": DecodeOptions(beam=3, max_length=8, no_repeat_ngram=1),
    "rules": DecodeOptions(beam=4, max_length=6, length_penalty=1.0, no_repeat_ngram=2, min_length=2),
}


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    """A llama whose heads are large enough that the operator turns queries and keys itself."""
    more = {"dim": 64, "config": {"initializer_range": 0.06}}
    nets.DECODERS["wide_llama"] = {**nets.DECODERS["llama"], **more}
    yield
    del nets.DECODERS["wide_llama"]


def load(source: Source, made: Any) -> OnnxModel:
    """An artifact, or the trunk's pair, as the runtime's model."""
    if isinstance(made, Artifact):
        models = [onnx.load_from_string(made.files[f"{part}.onnx"]) for part in ("encoder", "decoder")]
        graphs = made.graphs
    else:
        models, graphs = [made.encoder, made.decoder], made.graphs()
    manifest = {"session": made.session, "tokens": source.checkpoint.tokens, "graphs": graphs}
    return OnnxModel(manifest, *(engine(model) for model in models))


class Seen:
    """In the place of an encoder: random tensors for each photo. What random encoders give is much the same for all."""

    def __init__(self, model: OnnxModel) -> None:
        self.shapes = {name: value.shape[1:] for name, value in model.encode(photos(1)).items()}

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.shapes}
        for photo in pixels:
            random = np.random.default_rng(zlib.crc32(photo.tobytes()))
            for name, shape in self.shapes.items():
                found[name].append(random.normal(size=shape).astype(np.float32))
        return {name: np.stack(values) for name, values in found.items()}


class Torch:
    """The torch model's own session on what `Seen` gives."""

    def __init__(self, model: Any, seen: Seen) -> None:
        self.session, self.seen = model.session(), seen

    def start(self, pixels: np.ndarray, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        return self.session.start_from({k: torch.tensor(v) for k, v in self.seen(pixels).items()}, prompt_ids)

    def step(self, ids: np.ndarray, parents: np.ndarray) -> np.ndarray:
        return self.session.step(ids, parents)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, sources: Callable[[str], Source]) -> SimpleNamespace:
    """A captioner as torch model, as the trunk's concatenating graph and with its cache in place."""
    source = sources(request.param)
    pair = source.trunk()
    build_graph(source, pair, "decoder", "fp32")
    made = onnx_artifact(pair)
    grown, shared = load(source, source.trunk()), load(source, made)
    seen = Seen(shared)
    for model in (grown, shared):
        model.encode = seen
    return SimpleNamespace(
        kind=request.param,
        source=source,
        made=made,
        torch=source.checkpoint.model,
        seen=seen,
        grown=grown,
        shared=shared,
        tokens=source.checkpoint.tokens,
    )


def search(case: Any, session: Any, pixels: np.ndarray, options: DecodeOptions) -> Any:
    return decode(session, pixels, options, eos_id=case.tokens["eos"], suppress=never_said(case.tokens))


def same(left: Any, right: Any) -> None:
    assert [[each.token_ids for each in found] for found in left] == [
        [each.token_ids for each in found] for found in right
    ]
    scores = [[each.score for found in side for each in found] for side in (left, right)]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)


# --- the graph --------------------------------------------------------------------------------------


def test_the_graph_has_the_operator_and_nothing_that_copies(case: Any, tmp_path: Path) -> None:
    model, trunk = onnx.load_from_string(case.made.files["decoder.onnx"]), case.source.trunk().decoder
    onnx.checker.check_model(model)
    ops, layers = op_counts(model), len(case.made.session["kv"]) // 2
    assert ops["GroupQueryAttention"] == layers
    assert ops.get("RotaryEmbedding", 0) == (2 * layers if case.kind == "llama" else 0)
    assert ops.get("Attention", 0) == op_counts(trunk)["Attention"] - layers  # over the photo, in a transformer
    assert len(model.graph.node) < len(trunk.graph.node)
    graph = Graph(model)
    for entry in case.made.session["kv"]:
        assert [node.op_type for node in graph.consumers[entry["input"]]] == ["GroupQueryAttention"]
        assert (
            graph.producer[entry["output"]].op_type == "GroupQueryAttention" and entry["output"] not in graph.consumers
        )
    engine_ops = op_counts(loaded(model, tmp_path))
    if case.kind == "wide_llama":  # the table is made once, when the graph is loaded
        assert {"Cos", "Sin", "Range"} < set(ops) and not {"Cos", "Sin", "Range"} & set(engine_ops)
    assert case.made.session["cache"] == {"filled": "filled"}
    assert case.made.graphs["decoder"]["inputs"]["filled"] == {"dtype": "int32", "shape": []}
    done = case.made.passes[-1].to_dict()
    assert done["name"] == "kv_cache_in_place" and done["cost"]["layers"] == layers
    assert done["cost"]["rotary inside"] == (case.kind == "wide_llama")
    assert "cache" not in case.source.trunk().session  # OpenVINO and calibration read that


def loaded(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a graph."""
    nets.engine(model, save=folder / "loaded.onnx")
    return onnx.load(folder / "loaded.onnx")


# --- against torch, the concatenating graph and the slow search -------------------------------------


def test_teacher_forced_logits_are_torchs(case: Any) -> None:
    data = case.source.calibration
    models = (case.torch, load(case.source, case.source.trunk()), load(case.source, case.made))  # with their encoders
    wanted, grown, found = (teacher_force(model.session(), data.pixels, data.captions) for model in models)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(found, grown, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SEARCHES)
def test_captions_are_torchs_and_those_of_a_batch_are_those_of_each(case: Any, name: str) -> None:
    pixels, options = photos(5, seed=3), SEARCHES[name]
    session = case.shared.session()
    assert type(session) is CachedSession and type(case.grown.session()) is OnnxSession
    found = search(case, session, pixels, options)
    assert len({best[0].token_ids for best in found}) > 2  # the photos matter
    same(found, search(case, Torch(case.torch, case.seen), pixels, options))
    same(found, search(case, case.grown.session(), pixels, options))
    same(found, [search(case, session, each[None], options)[0] for each in pixels])  # one session, used again


@pytest.mark.parametrize("name", SEARCHES)
def test_captions_are_those_of_a_slow_search(case: Any, name: str) -> None:
    pixels, options = photos(2, seed=5), dataclasses.replace(SEARCHES[name], max_length=5)
    found = search(case, case.shared.session(), pixels, options)
    slow = [slow_search(next_logits(case.shared.session, each), options, never_said(case.tokens)) for each in pixels]
    same(found, slow)
    same(found, search(case, Uncached(case.shared.session), pixels, options))


def test_rows_go_anywhere(case: Any) -> None:
    """Fewer rows and more, doubled, dropped and crossed, with a prompt in front, next to the concatenating graph."""
    random, pixels = np.random.default_rng(0), photos(3, seed=7)
    sessions = [model.session() for model in (case.shared, case.grown)]
    rows = 3
    for each in sessions:
        each.start(pixels, np.array([5, 7]))
    for _ in range(30):
        parents = random.integers(0, rows, random.integers(1, 7))
        rows = len(parents)
        ids = random.integers(4, case.tokens["vocab_size"], rows)
        found, wanted = (each.step(ids, parents) for each in sessions)
        np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-4)


# --- in place ---------------------------------------------------------------------------------------


class Poisoned:
    """A session whose buffers are full of NaN wherever nothing has been written, looked at after every call."""

    def __init__(self, session: CachedSession) -> None:
        self.session, self.moves, self.orders = session, 0, 0
        move, reorder, clear = session.cache._move, session.cache.reorder, session.cache.clear

        def poisoned(parents: Any, capacity: int) -> None:
            self.moves += 1
            move(parents, capacity)
            session.cache._store[:, :, :, session.cache.length :] = np.nan

        def counted(parents: Any) -> None:
            self.orders += 1
            reorder(parents)

        def emptied(rows: int) -> None:
            clear(rows)
            session.cache._store[...] = np.nan

        cache: Any = session.cache
        cache._move, cache.reorder, cache.clear = poisoned, counted, emptied

    def start(self, pixels: np.ndarray, prompt_ids: np.ndarray | None = None) -> np.ndarray:
        return self.checked(self.session.start(pixels, prompt_ids))

    def step(self, ids: np.ndarray, parents: np.ndarray) -> np.ndarray:
        return self.checked(self.session.step(ids, parents))

    def checked(self, logits: np.ndarray) -> np.ndarray:
        cache = self.session.cache
        store = np.stack(cache.tensors())
        assert np.isfinite(logits).all() and np.isfinite(store[:, :, :, : cache.length]).all()
        assert np.isnan(store[:, :, :, cache.length :]).all() and cache.capacity > cache.length
        places = [tensor.ctypes.data for tensor in cache.tensors()]
        outputs = self.session._binding.get_outputs()
        assert {value.data_ptr() for value in outputs} > set(places)  # the presents are the pasts; and the logits
        return logits


def test_nothing_is_written_but_what_is_new_and_nothing_else_is_read(case: Any) -> None:
    poisoned, pixels = Poisoned(case.shared.session()), photos(4, seed=9)
    options = DecodeOptions(max_length=10, min_length=10)  # no row is finished early: none moves
    same(search(case, poisoned, pixels, options), search(case, case.grown.session(), pixels, options))
    assert (poisoned.moves, poisoned.orders) == (1, 0)
    options = DecodeOptions(beam=3, max_length=10)
    same(search(case, poisoned, pixels, options), search(case, case.grown.session(), pixels, options))
    assert poisoned.moves == 2 and poisoned.orders > 0  # from one row for each photo to three


def test_a_cache_that_grows_gives_the_same_captions(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, options = photos(3, seed=11), DecodeOptions(beam=2, max_length=24, min_length=20)
    wanted = search(case, case.shared.session(), pixels, options)
    monkeypatch.setattr(kv_cache, "SPARE", 1)
    session = case.shared.session()
    poisoned = Poisoned(session)
    poisoned.checked = lambda logits: logits  # at times it is full
    found = search(case, poisoned, pixels, options)
    same(found, wanted)
    assert 3 <= poisoned.moves <= 6 and session.cache.capacity <= 2 * session.cache.length


def test_captions_beyond_the_models_positions_are_refused(case: Any) -> None:
    session = case.shared.session()
    limit = case.made.session["positions"]
    assert session.cache.limit == limit == case.torch.decoder.max_positions
    session.start(photos(2))
    left = limit - session.cache.length
    same_rows, ids = np.arange(2), np.array([5, 6])
    for _ in range(left):
        logits = session.step(ids, same_rows)
    assert np.isfinite(logits).all() and session.cache.capacity == limit
    with pytest.raises(UsageError, match=f"need {limit + 1} positions and the model has {limit}: ask for a smaller"):
        session.step(ids, same_rows)
    assert np.isfinite(session.start(photos(1))).all()  # and it can be used again


def test_sessions_share_the_model_and_nothing_else(case: Any) -> None:
    pixels = photos(6, seed=13)
    wanted = [search(case, case.shared.session(), each[None], SEARCHES["beam"])[0] for each in pixels]
    found: list[Any] = [None] * len(pixels)

    def one(place: int) -> None:
        found[place] = search(case, case.shared.session(), pixels[place][None], SEARCHES["beam"])[0]

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(pixels))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    same(found, wanted)


# --- in pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KINDS[:-1], indirect=True)  # a transformer's photo is not read with its words
def test_a_prompt_read_in_pieces_is_the_prompt(case: Any) -> None:
    """A fixed text, the photos' embeddings, a text behind them: at once, and in pieces on what was read before."""
    random, rows = np.random.default_rng(0), 3
    text, behind = random.integers(4, case.tokens["vocab_size"], 5), random.integers(4, case.tokens["vocab_size"], 3)
    role = case.made.session["prefix"]
    seen = random.normal(size=(rows, 6, role["dim"])).astype(np.float32)
    after, tail = np.tile(behind, (rows, 1)), np.array([[5], [6], [7]])

    decoder = case.torch.decoder
    with torch.no_grad():
        words = decoder.embedding(torch.tensor(np.tile(text, (rows, 1))))
        prefix = torch.cat((words, torch.tensor(seen)), 1)
        ids = torch.tensor(np.concatenate((after, tail), 1))
        wanted, _ = decoder.run(prefix, ids, decoder.empty(rows, prefix))

    session = Poisoned(case.shared.session()).session
    nothing = np.zeros((rows, 0), np.int64)
    for attempt in range(2):
        session.open(text, rows)
        if attempt:  # photo and words apart
            session.read(nothing, seen)
            session.read(after)
        else:
            session.read(after, seen)
        found = session.step(tail[:, 0], np.arange(rows))
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5, rtol=1e-4)
    assert list(case.shared.openings) == [tuple(text)]
    again = case.shared.session()  # another session of the process: the text is not read again
    again.open(text, 1)
    again.read(after[:1], seen[:1])
    np.testing.assert_allclose(again.step(tail[0], np.array([0])), wanted.numpy()[:1], atol=2e-5, rtol=1e-4)
    for empty in (lambda: again.begin(2), lambda: again.open(text[:0], 2)):  # nothing read yet: as one batch
        empty()
        first = again.read(np.tile(text, (2, 1)))
        np.testing.assert_allclose(first[0], first[1], atol=1e-6)
    assert list(case.shared.openings) == [tuple(text)]


# --- with the other passes --------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4", "blocks"])
def test_quantized_graphs_share_their_cache_too(case: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision == "blocks":
        monkeypatch.setattr("edgecap.export.onnx_quantized.STREAMED", 0)
    monkeypatch.setattr(onnx_quantized, "share_cache", lambda model, session: (session, []))
    kept = build_graphs(case.source, "int4" if precision == "blocks" else precision)
    monkeypatch.undo()
    if precision == "blocks":
        monkeypatch.setattr("edgecap.export.onnx_quantized.STREAMED", 0)
    made = build_graphs(case.source, "int4" if precision == "blocks" else precision)
    assert "cache" not in kept.session and made.session["cache"]
    ops = op_counts(onnx.load_from_string(made.files["decoder.onnx"]))
    assert ops["GroupQueryAttention"] == 2 and ("MatMulNBits" in ops) == (precision == "blocks")
    data = case.source.calibration
    old, new = (teacher_force(load(case.source, each).session(), data.pixels, data.captions) for each in (kept, made))
    assert cosine(old, new) > 0.9999  # an activation may be rounded to its neighbour
    pixels = photos(3, seed=15)
    model = load(case.source, made)
    together = search(case, model.session(), pixels, SEARCHES["beam"])
    apart = [search(case, model.session(), each[None], SEARCHES["beam"])[0] for each in pixels]
    assert [best[0].token_ids for best in together] == [best[0].token_ids for best in apart]


# --- what it does not know --------------------------------------------------------------------------


def test_other_attention_is_refused_in_one_line(case: Any) -> None:
    def refused(change: Callable[[Graph, onnx.ModelProto], None], message: str) -> None:
        pair = case.source.trunk()
        change(Graph(pair.decoder), pair.decoder)
        with pytest.raises(EdgecapError, match=message) as caught:
            share_cache(pair.decoder, pair.session)
        assert "\n" not in caught.value.message and "kv_cache_in_place" in caught.value.message

    entry = case.made.session["kv"][0]

    def other(graph: Graph, model: onnx.ModelProto) -> None:
        graph.producer[entry["output"]].op_type = "Sum"

    def hidden(graph: Graph, model: onnx.ModelProto) -> None:
        (le,) = (node for node in model.graph.node if node.op_type == "LessOrEqual")
        le.op_type = "Less"

    def causal(graph: Graph, model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for each in node.attribute:
                each.i = 1 if each.name == "is_causal" else each.i

    def asked(graph: Graph, model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("ReduceSum", [entry["input"]], ["total"]))
        model.graph.output.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, [1, 1, 1, 1]))

    def turned(graph: Graph, model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "Transpose":
                node.attribute[0].CopyFrom(helper.make_attribute("perm", [0, 1, 2, 3]))

    refused(other, f"{entry['output']} is not {entry['input']} with what is new behind it")
    refused(hidden, "is not that of causal attention")
    refused(causal, "is not that of causal attention")
    refused(asked, f"{entry['input']} is read by ReduceSum, too")
    refused(turned, "was not cut into heads from a projection")


def test_heads_of_another_size_keep_the_concatenating_graph(case: Any) -> None:
    pair = case.source.trunk()
    before = pair.decoder.SerializeToString()
    session = {**pair.session, "kv": [{**entry, "dim": 6} for entry in pair.session["kv"]]}
    kept, (done,) = share_cache(pair.decoder, session)
    assert kept is session and pair.decoder.SerializeToString() == before
    assert "no multiple of 8" in done.cost["left as it is"]
    assert share_cache(pair.decoder, {"ids": {}, "state": []}) == ({"ids": {}, "state": []}, [])
