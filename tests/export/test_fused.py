"""The one-file captioner against the runtime's search: many tiny random models, then every decoder and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgecap.export.artifact import Source
from edgecap.export.assemble import assemble
from edgecap.export.fused import _batch, _resize, _text, add_fused, describe, fuse, text_pieces
from edgecap.export.fused_build import Scope
from edgecap.export.golden import make_golden
from edgecap.export.targets import TARGETS
from edgecap.export.trunk import OnnxPair
from edgecap.runtime import Captioner, EdgecapError, UsageError, write_bundle
from edgecap.runtime.backends.onnx import OnnxModel
from edgecap.runtime.decode import DecodeOptions, decode
from edgecap.runtime.fused import FusedCaptioner, check_fused
from edgecap.runtime.preprocess import Preprocess
from edgecap.runtime.tokenizer import Tokenizer

from .nets import engine, photos

SIDE, STATE = 2, 6
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3}


def words(vocab: int) -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers.models import WordLevel

    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, vocab))]
    inner = Inner(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.add_special_tokens(names[:4])
    return Tokenizer(inner)


def tiny(vocab: int, seed: int, eos_bias: float, *, ties: bool, cache: bool) -> OnnxPair:
    """A random model of a few multiplications: a state per row, or a cache of all earlier ids and a prefix."""
    random = np.random.default_rng(seed)

    def constants(**values: np.ndarray) -> list[TensorProto]:
        return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]

    def model(nodes, inputs, outputs, initializers) -> onnx.ModelProto:
        def values(each):
            return [helper.make_tensor_value_info(*one) for one in each]

        graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs), initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    node, number = helper.make_node, TensorProto.FLOAT
    look = random.normal(0, 0.003, (SIDE * SIDE * 3, STATE)).astype(np.float32)
    encoder = model(
        [
            node("Reshape", ["pixels", "flat"], ["rows"]),
            node("Cast", ["rows"], ["real"], to=number),
            node("MatMul", ["real", "look"], ["sums"]),
            node("Tanh", ["sums"], ["h0"]),
            node("Unsqueeze", ["h0", "axis"], ["prefix"]),
        ],
        [("pixels", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [("h0", number, ["batch", STATE]), ("prefix", number, ["batch", 1, STATE])],
        constants(flat=np.array([0, -1]), look=look, axis=np.array([1])),
    )
    bias = np.zeros(vocab, np.float32)
    bias[2] = eos_bias
    fixed = constants(
        table=random.normal(0, 1, (vocab, STATE)).astype(np.float32),
        mix=random.normal(0, 0.8, (STATE, STATE)).astype(np.float32),
        out=random.normal(0, 1, (STATE, vocab)).astype(np.float32),
        bias=bias,
        one=np.array([1]),
        two=np.array([2]),
        half=np.float32(0.5),
    )
    last = [node("MatMul", ["h_next", "out"], ["raw"]), node("Add", ["raw", "bias"], ["scores"])]
    if ties:  # steps of 2, so that many logits are equal
        last += [node("Mul", ["scores", "half"], ["small"]), node("Round", ["small"], ["steps"])]
        last += [node("Div", ["steps", "half"], ["logits"])]
    else:
        last += [node("Identity", ["scores"], ["logits"])]
    logits = ("logits", number, ["rows", vocab])
    if cache:
        start = [
            node("Gather", ["table", "ids"], ["words"]),
            node("Concat", ["prefix", "words"], ["new"], axis=1),
            node("Unsqueeze", ["new", "one"], ["heads"]),
            node("Concat", ["past", "heads"], ["present"], axis=2),  # [rows, 1, length, dim]
            node("MatMul", ["present", "mix"], ["mixed"]),
            node("Tanh", ["mixed"], ["bent"]),
            node("ReduceSum", ["bent", "two"], ["summed"], keepdims=0),
            node("Squeeze", ["summed", "one"], ["h_next"]),
        ]
        kv = ("rows", 1, "past_length", STATE)
        inputs = [
            ("ids", TensorProto.INT64, ["rows", "length"]),
            ("prefix", number, ["rows", "prefix_length", STATE]),
            ("past", number, kv),
        ]
        decoder = model([*start, *last], inputs, [logits, ("present", number, ["rows", 1, "all", STATE])], fixed)
        session = {
            "ids": {"input": "ids", "rank": 2},
            "logits": "logits",
            "prefix": {"input": "prefix", "from": "prefix", "dim": STATE},
            "kv": [{"input": "past", "output": "present", "heads": 1, "dim": STATE}],
        }
        return OnnxPair(encoder, decoder, session, [])
    start = [
        node("Gather", ["table", "ids"], ["words"]),
        node("Gather", ["grid", "photo"], ["seen"]),
        node("ReduceSum", ["seen", "one"], ["context"], keepdims=0),
        node("MatMul", ["h", "mix"], ["mixed"]),
        node("Sum", ["mixed", "words", "context"], ["added"]),
        node("Tanh", ["added"], ["h_next"]),
    ]
    inputs = [
        ("ids", TensorProto.INT64, ["rows"]),
        ("photo", TensorProto.INT64, ["rows"]),
        ("grid", number, ["batch", 1, STATE]),
        ("h", number, ["rows", STATE]),
    ]
    decoder = model([*start, *last], inputs, [logits, ("h_next", number, ["rows", STATE])], fixed)
    session = {
        "ids": {"input": "ids", "rank": 1},
        "logits": "logits",
        "photo_index": "photo",
        "photo": {"grid": "prefix"},
        "state": [{"input": "h", "output": "h_next", "init": "h0"}],
    }
    return OnnxPair(encoder, decoder, session, [])


def runtime(pair: OnnxPair, tokens: dict[str, int]) -> OnnxModel:
    manifest = {"session": pair.session, "tokens": tokens, "graphs": pair.graphs()}
    return OnnxModel(manifest, engine(pair.encoder), engine(pair.decoder))


def fuse_tiny(pair: OnnxPair, tokens: dict[str, int], decoding: dict, tokenizer: Tokenizer | None = None):
    tokenizer = tokenizer or words(tokens["vocab_size"])
    return fuse(pair, tokens=tokens, preprocess=Preprocess((SIDE, SIDE)), tokenizer=tokenizer, decoding=decoding)


def compare(
    pair: OnnxPair, tokens: dict[str, int], tokenizer: Tokenizer, decoding: dict, photos, beams, lengths
) -> int:
    """Fused and runtime on every photo, beam and length; returns how many captions were finished."""
    fused, finished = FusedCaptioner(engine(fuse_tiny(pair, tokens, decoding, tokenizer))), 0
    model, suppress = runtime(pair, tokens), [tokens[name] for name in ("bos", "pad", "unk")]
    for beam in beams:
        for length in lengths:
            options = DecodeOptions.from_dict({**decoding, "beam": beam, "max_length": length})
            for photo in photos:
                found = decode(model.session(), photo[None], options, eos_id=tokens["eos"], suppress=suppress)[0]
                ours = fused(photo, beam=beam, max_length=length)
                # Two engines round differently: of hypotheses that are as good, either may come first.
                good = {each.token_ids: each for each in found if found[0].score - each.score < 1e-6}
                assert ours.token_ids in good, (decoding, beam, length)
                assert ours.logprob == pytest.approx(good[ours.token_ids].logprob, abs=1e-5)
                assert ours.text == tokenizer.decode(ours.token_ids)
                finished += good[ours.token_ids].finished
    return finished


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.parametrize("cache", [False, True], ids=["state", "cache"])
@pytest.mark.parametrize("seed", range(12))
def test_the_search_is_the_runtimes(seed: int, cache: bool) -> None:
    random = np.random.default_rng(seed + 100)
    vocab = int(random.integers(5, 14))
    decoding = {
        "max_length": 5,
        "min_length": int(random.choice([0, 0, 2, 3])),
        "length_penalty": float(random.choice([0.0, 0.5, 1.0, 2.0])),
        "no_repeat_ngram": int(random.choice([0, 0, 1, 2, 3])),
    }
    pair = tiny(vocab, seed, float(random.choice([-1.0, 0.0, 1.5])), ties=False, cache=cache)
    tokens = {**TOKENS, "vocab_size": vocab}
    compare(
        pair, tokens, words(vocab), decoding, pictures(3, seed), (1, 2, 3, 5, 9), (max(1, decoding["min_length"]), 4, 8)
    )


def test_captions_that_end_and_that_are_cut_off() -> None:
    for cache in (False, True):
        finished, tokens = 0, {**TOKENS, "vocab_size": 9}
        for seed in range(4):
            pair = tiny(9, seed, -0.5, ties=False, cache=cache)
            finished += compare(pair, tokens, words(9), {"length_penalty": 1.0}, pictures(4, seed), (1, 3), (5,))
        assert 4 <= finished <= 28  # of 32


def test_equal_logits_go_to_the_lower_id_and_the_earlier_find() -> None:
    equal = 0
    for seed in range(6):
        pair, tokens = tiny(8, seed, 0.0, ties=True, cache=seed % 2 > 0), {**TOKENS, "vocab_size": 8}
        compare(pair, tokens, words(8), {}, pictures(4, seed), (1,), (6,))
        session = runtime(pair, tokens).session()
        logits = session.start(pictures(4, seed))[:, 4:]
        equal += int((logits == logits.max(1, keepdims=True)).sum(1).max() > 1)
    assert equal  # ties at the top do occur


def test_nothing_may_follow() -> None:
    for cache in (False, True):
        pair, tokens = tiny(4, 0, 0.0, ties=False, cache=cache), {**TOKENS, "vocab_size": 4}
        fused = FusedCaptioner(engine(fuse_tiny(pair, tokens, {"min_length": 2})))
        assert [fused(pictures(1, 0)[0], beam=beam)[0] for beam in (1, 2)] == [(), ()]
        assert fused(pictures(1, 0)[0], beam=2).logprob == 0
        # Only EOS and one word are left, and the word may come but once.
        pair, tokens = tiny(5, 1, -9.0, ties=False, cache=cache), {**TOKENS, "vocab_size": 5}
        decoding = {"min_length": 3, "no_repeat_ngram": 1, "length_penalty": 0.5}
        assert compare(pair, tokens, words(5), decoding, pictures(2, 0), (1, 2, 3), (4,)) == 0


def test_numbers_out_of_range_are_clipped_in_the_graph_and_refused_by_the_runtime() -> None:
    pair, tokens = tiny(8, 0, 0.0, ties=False, cache=False), {**TOKENS, "vocab_size": 8}
    session, photo = engine(fuse_tiny(pair, tokens, {"max_length": 3})), pictures(1, 0)[0]

    def ids(**numbers: int) -> list[int]:
        return session.run(["ids"], {"image": photo, **{k: np.array(v) for k, v in numbers.items()}})[0].tolist()

    assert ids(beam=0) == ids(beam=-5) == ids(beam=1) and ids(beam=65) == ids(beam=1000) == ids(beam=64)
    assert ids(beam=1, max_length=0) == ids(beam=1, max_length=1) == ids(beam=1, max_length=3)[:1]
    fused = FusedCaptioner(session)
    for bad in ({"beam": 0}, {"beam": 65}, {"beam": True}, {"beam": 2.0}, {"max_length": 0}):
        with pytest.raises(UsageError, match="must be a whole number from 1 to"):
            fused(photo, **bad)
    for image in (photo.astype(np.float32), photo[0], photo[:, :, :2], [1]):
        with pytest.raises(UsageError, match="must be uint8"):
            fused(image)
    with pytest.raises(UsageError, match="is empty"):
        fused(photo[:0])


PHOTO = np.random.default_rng(5).integers(0, 256, (24, 31, 3), dtype=np.uint8).repeat(11, 0).repeat(9, 1)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(264, 279), (120, 279), (41, 37), (48, 64), (33, 200)])
def test_pixels_are_pillows(shape: tuple[int, int], resample: str) -> None:
    """Up, down, both, and not at all: nearly all pixels the same, the rest off by one."""
    photo = PHOTO[: shape[0], : shape[1]]
    found, chosen = pixels(photo, size=(48, 64), resample=resample)
    height_first = shape[0] / 48 > shape[1] / 64  # Pillow 13 does a tall photo's height first, earlier ones never
    assert np.abs(found - chosen).max() <= (2 if height_first else 1)
    assert (found == chosen).mean() > (0.6 if height_first else 0.97)
    if shape == (48, 64):
        assert (found == photo).all()


def test_crop_takes_the_centre() -> None:
    for shape in ((100, 200), (200, 100), (101, 200), (96, 128)):
        photo = PHOTO[: shape[0], : shape[1]]
        found, chosen = pixels(photo, size=(48, 64), mode="crop")
        assert np.abs(found - chosen).mean() < 12 and np.abs(found - chosen).mean() < 0.2 * chosen.std()
    found, chosen = pixels(PHOTO[:72, :128], size=(36, 48), mode="crop")  # whole pixels are cut off
    assert np.abs(found - chosen)[2:-2, 2:-2].max() <= 1


def pixels(photo: np.ndarray, **preprocess) -> tuple[np.ndarray, np.ndarray]:
    """What the graph's encoder sees, and what the runtime's does."""
    chosen = Preprocess(**preprocess)
    main = Scope()
    source = _resize(main, _batch(main, main.constant([3]), chosen), chosen)
    graph = helper.make_graph(
        main.nodes,
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["h", "w", 3])],
        [helper.make_tensor_value_info(source, TensorProto.UINT8, None)],
        list(main.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (found,) = engine(model).run(None, {"image": photo})
    return found[0].astype(int), chosen(Image.fromarray(photo)).astype(int)


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
def test_text_is_the_tokenizers(kind: str) -> None:
    from edgecap.train.settings import TokenizerSettings
    from edgecap.train.tokenizer import token_ids, train_tokenizer

    captions = ["a black dog runs over the grass", "two dogs do n't run", "a man on a bike near the café"] * 4
    settings = TokenizerSettings(kind=kind, vocab_size=340, min_count=1)
    tokenizer = Tokenizer(train_tokenizer(captions, settings))
    tokens = token_ids(tokenizer.inner)
    pieces = text_pieces(tokenizer, tokens)
    assert pieces is not None
    main = Scope()
    text = _text(main, "ids", *pieces)
    graph = helper.make_graph(
        main.nodes,
        "graph",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["length"])],
        [helper.make_tensor_value_info(text, TensorProto.STRING, [1])],
        list(main.initializers.values()),
    )
    session = engine(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))

    def read(ids: list[int]) -> str:
        return session.run(None, {"ids": np.array(ids, np.int64)})[0][0]

    for caption in captions[:3]:
        assert read(tokenizer.encode(caption)) == caption
    assert read([]) == ""
    space = tokenizer.inner.token_to_id({"bpe": "\u0120", "unigram": "\u2581"}.get(kind, "a"))
    dog = tokenizer.encode("dog")
    for ids in ([space], [space, space, *dog], [*dog, space], [*dog, space, *dog], [space, *dog, *dog, space, space]):
        assert read(ids) == tokenizer.decode(ids)


def test_a_tokenizer_that_rewrites_across_tokens_gives_no_text() -> None:
    tokenizer = words(9)
    from tokenizers.decoders import CTC

    tokenizer.inner.decoder = CTC()  # drops what is said twice
    tokens = {**TOKENS, "vocab_size": 9}
    assert text_pieces(tokenizer, tokens) is None
    pair = tiny(9, 0, 0.0, ties=False, cache=False)
    model = fuse_tiny(pair, tokens, {}, tokenizer)
    assert set(describe(model)["outputs"]) == {"ids", "logprob"} and model.opset_import[0].version == 18
    fused = FusedCaptioner(engine(model))
    assert fused(pictures(1, 0)[0]).text is None


def test_graphs_that_cannot_be_merged() -> None:
    tokens = {**TOKENS, "vocab_size": 9}
    pair = tiny(9, 0, 0.0, ties=False, cache=False)
    pair.decoder.graph.node[0].op_type = "GridSample"
    with pytest.raises(EdgecapError, match="--fused cannot bring GridSample from opset 18 to 20"):
        fuse_tiny(pair, tokens, {})
    pair = tiny(9, 0, 0.0, ties=False, cache=False)
    inner = helper.make_graph([], "inner", [], [])
    pair.decoder.graph.node[0].attribute.append(helper.make_attribute("body", inner))
    with pytest.raises(EdgecapError, match="--fused cannot merge graphs with Gather nodes"):
        fuse_tiny(pair, tokens, {})


@pytest.fixture(params=["gru", "lstm", "transformer", "llama"])
def source(request: pytest.FixtureRequest, sources: Callable[[str], Source], tmp_path: Path) -> Source:
    found = sources(request.param)
    found.scratch = tmp_path
    return found


@pytest.mark.parametrize("name", [name for name in TARGETS if name.startswith("onnx-")])
def test_every_onnx_target_in_one_file(source: Source, name: str, tmp_path: Path) -> None:
    checkpoint = source.checkpoint
    artifact = TARGETS[name].build(source)
    add_fused(artifact, checkpoint)
    again = dict(artifact.files)
    add_fused(artifact, checkpoint)
    assert again == artifact.files  # the same bytes
    entry = (name, TARGETS[name])
    write_bundle(tmp_path / "x", *assemble(checkpoint, entry, "x", artifact, make_golden(checkpoint), []))
    images = photos(6, seed=3)
    with Captioner.load(tmp_path / "x") as captioner:
        fused = FusedCaptioner.load(tmp_path / "x", threads=1)
        for beam in (1, 3):
            share = check_fused(captioner, fused, images, beam=beam)
            assert share == 1 if TARGETS[name].same_tokens else share >= 0.5  # random int8 nets are near ties
        ours, theirs = fused(images[0]), captioner(images[0], beam=1)
        assert ours.text == theirs.text and ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert artifact.passes[-1].name == "fused"
    sizes = {file: len(content) for file, content in artifact.files.items()}
    assert sizes["fused.onnx"] < sizes["encoder.onnx"] + sizes["decoder.onnx"] + 64_000  # weights are in it once
    with pytest.raises(UsageError, match="no pictures"):
        check_fused(captioner, fused, [])


def test_a_bundle_without_it(source: Source, tmp_path: Path) -> None:
    checkpoint = source.checkpoint
    entry = ("onnx-fp32", TARGETS["onnx-fp32"])
    artifact = entry[1].build(source)
    write_bundle(tmp_path / "x", *assemble(checkpoint, entry, "x", artifact, make_golden(checkpoint), []))
    with pytest.raises(UsageError, match="has no fused graph; export it with --fused"):
        FusedCaptioner.load(tmp_path / "x")
