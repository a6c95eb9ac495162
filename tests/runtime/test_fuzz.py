"""Bundles nobody would export: loading works, or says in one line what is wrong; no trace, no hang, no giant."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgecap import cli
from edgecap.runtime import Captioner, EdgecapError, verify_golden
from edgecap.runtime.claims import check_npy, check_openvino, gguf_summary
from edgecap.runtime.graphfile import GraphError, onnx_summary
from edgecap.runtime.tokenizer import Tokenizer

from .test_claims import IR, gguf, npy

MORE = int(os.environ.get("EDGECAP_FUZZ", "1"))  # times as many examples, for a long search

bounded = settings(
    max_examples=120 * MORE,
    deadline=5000,  # ms: what hangs fails, a busy machine does not
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JUNK = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("inf")),
        *("", "../x", "/etc/passwd", "\x00", "\ud800", "\U0001f600", "é", "\u202e", "x" * 5000, "(a+)+$", "onnx"),
        *(
            [],
            {},
            [[]],
            [1, "a", None],
            {"a": 1},
            [["a", "b"]],
            {"type": "Strip", "content": "a", "start": 9, "stop": 9},
        ),
        *({"Regex": "("}, {"Regex": "(a*)*b"}, {"String": ""}, {"Fixed": 10**9}, {"type": "Fuse"}),
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, each in items for inner in places(each, (*path, key)))]


def nest(value: Any, depth: int, key: str | None) -> Any:
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


def mutate(data: st.DataObject, values: Any) -> bytes:
    """JSON of `values` with up to three things in it changed, and then perhaps its bytes."""
    values = copy.deepcopy(values)
    for _ in range(data.draw(st.integers(0, 3))):
        found = [place for place in places(values) if place]
        if not found:
            break
        path = data.draw(st.sampled_from(found))
        parent = values
        for key in path[:-1]:
            parent = parent[key]
        match data.draw(st.sampled_from(["junk", "junk", "delete", "nest", "move", "rename"])):
            case "junk":
                parent[path[-1]] = copy.deepcopy(data.draw(JUNK))
            case "delete":
                del parent[path[-1]]
            case "nest":
                depth, key = data.draw(st.sampled_from([1, 2, 40, 150])), data.draw(st.sampled_from([None, "a"]))
                parent[path[-1]] = nest(parent[path[-1]], depth, key)
            case "move":
                other = values
                for key in data.draw(st.sampled_from(found)):
                    other = other[key]
                parent[path[-1]] = copy.deepcopy(other)
            case "rename" if isinstance(parent, dict):
                parent[data.draw(st.text(max_size=8))] = parent.pop(path[-1])
    text = bytearray(json.dumps(values).encode())
    match data.draw(st.sampled_from(["whole"] * 6 + ["cut", "byte", "twice"])):
        case "cut":
            del text[data.draw(st.integers(0, len(text))) :]
        case "byte":
            text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
        case "twice":
            at = text.find(b'"', data.draw(st.integers(0, len(text) - 1)))
            end = text.find(b",", at)
            text[at:at] = text[at : end + 1] if 0 <= at < end else b""
    return bytes(text)


def opens(bundle: Path) -> bool:
    """Whether it loads and runs; anything but an EdgecapError of one line fails the test."""
    try:
        with Captioner.load(bundle, threads=1) as captioner:
            verify_golden(captioner)
        return True
    except EdgecapError as error:
        assert error.message.isprintable() and len(error.message) < 1000, error.message
        return False


def command(capfd: Any, *arguments: str) -> None:
    """The command line succeeds, or writes one line and exits with 1 or 2."""
    before = sys.argv
    sys.argv = ["edgecap", *arguments]
    capfd.readouterr()
    try:
        cli.main()
        code: Any = 0
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.argv = before
    out, err = capfd.readouterr()
    assert code in (0, 1, 2)
    assert err == "" or (code and err.startswith("Error: ") and err.count("\n") == 1), err
    assert code != 2 or out == ""
    assert err or out


def peak() -> float:
    """The most memory that this process has had, in bytes."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture
def little_memory(bundle_path: Path):
    """What is loaded during a test adds no more than 400 MB to what this process ever had."""
    opens(bundle_path)  # the engine's own share
    before = peak()
    yield
    assert peak() - before < 400e6


@bounded
@given(st.data())
def test_manifests(bundle_path, bundle_copy, little_memory, data):
    values = json.loads((bundle_path / "bundle.json").read_text())
    (bundle_copy / "bundle.json").write_bytes(mutate(data, values))
    opens(bundle_copy)


@settings(bounded, max_examples=60 * MORE)
@given(st.data())
def test_manifests_on_the_command_line(bundle_path, bundle_copy, capfd, data):
    values = json.loads((bundle_path / "bundle.json").read_text())
    (bundle_copy / "bundle.json").write_bytes(mutate(data, values))
    options = data.draw(st.sampled_from([["inspect"], ["inspect", "--json"], ["verify"]]))
    command(capfd, *options[:1], str(bundle_copy), *options[1:])


def use_tokenizer(bundle: Path, text: bytes) -> None:
    """Give the bundle this tokenizer.json, with the hash that goes with it: otherwise it is never read."""
    values = json.loads((bundle / "bundle.json").read_text())
    values["files"]["tokenizer.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(values))
    (bundle / "tokenizer.json").write_bytes(text)


def tokenizers() -> list[dict[str, Any]]:
    """One of each kind of model, with much of what a tokenizer.json can have."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Inner

    words = "<pad> <bos> <eos> <unk> a red blue circle square on the left of .".split()
    level = Inner(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    level.normalizer, level.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    level.add_special_tokens([AddedToken(word, special=True) for word in words[:4]])

    bpe = Inner(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>"], show_progress=False)
    bpe.train_from_iterator(["a red circle on the left of a blue square"] * 3, trainer)
    bpe.enable_padding(length=20)
    bpe.enable_truncation(30, stride=2)

    unigram = Inner(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("red", -2.0), ("▁", -3.0)], 0, byte_fallback=True))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("a", "b"), normalizers.Strip()])
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits()])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    unigram.decoder = decoders.Sequence(parts)
    unigram.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])

    piece = Inner(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3}, unk_token="[UNK]"))
    piece.normalizer, piece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    piece.decoder, piece.post_processor = decoders.WordPiece(), processors.BertProcessing(("a", 1), ("c", 3))
    return [json.loads(each.to_str()) for each in (level, bpe, unigram, piece)]


TOKENIZERS = st.deferred(lambda: st.sampled_from(tokenizers()))


def test_the_tokenizers_that_are_changed_are_sound():
    for values in tokenizers():
        tokenizer = Tokenizer.load(json.dumps(values).encode())
        assert tokenizer.decode(range(tokenizer.vocab_size)) and len(tokenizer.encode("a red circle")) < 20


@settings(bounded, max_examples=300 * MORE)
@given(values=TOKENIZERS, data=st.data())
def test_tokenizers(bundle_copy, little_memory, values, data):
    use_tokenizer(bundle_copy, mutate(data, values))
    opens(bundle_copy)


PANICS = {  # each ends in a panic of the library's Rust, which is no Exception and writes to standard error itself
    "a prefix longer than what is merged": (1, ("model", "continuing_subword_prefix"), "a longer prefix"),
    "a decoder that strips more than there is": (
        0,
        ("decoder",),
        {"type": "Strip", "content": "a", "start": 9, "stop": 9},
    ),
}


@pytest.mark.parametrize("name", PANICS)
def test_panics_of_the_library(name, bundle_copy, capfd):
    which, path, value = PANICS[name]
    values = tokenizers()[which]
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    use_tokenizer(bundle_copy, json.dumps(values).encode())
    command(capfd, "verify", str(bundle_copy))
    assert not opens(bundle_copy)


def test_threads_that_load_at_once_leave_standard_error_where_it_was():
    data = json.dumps(tokenizers()[0]).encode()
    before, interval = os.fstat(2), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: Tokenizer.load(data), range(100)))
    finally:
        sys.setswitchinterval(interval)
    assert os.path.samestat(os.fstat(2), before)


def test_a_tokenizer_may_not_fill_prompts_up():
    values = tokenizers()[1]
    values["padding"]["strategy"] = {"Fixed": 10**12}
    assert len(Tokenizer.load(json.dumps(values).encode()).encode("a red circle")) < 20


def test_giant_tokenizer(bundle_copy, monkeypatch):
    from edgecap.runtime import tokenizer

    monkeypatch.setattr(tokenizer, "MAX_BYTES", 100)
    with pytest.raises(EdgecapError, match=r"tokenizer.json is larger than 100 bytes"):
        Captioner.load(bundle_copy)


@settings(bounded, max_examples=40 * MORE)
@given(values=TOKENIZERS, data=st.data())
def test_tokenizers_on_the_command_line(bundle_copy, capfd, values, data):
    use_tokenizer(bundle_copy, mutate(data, values))
    command(capfd, "verify", str(bundle_copy))


# --- files that engines read ------------------------------------------------------------------------


def changed(data: st.DataObject, original: bytes) -> bytes:
    """Some bytes replaced, put in or cut off; where sizes stand, the odd ones are giant."""
    found = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(found) - 1, 0)))
        few = data.draw(
            st.sampled_from([b"\x00", b"\x01", b"\x7f", b"\x80", b"\xff", b"\xff" * 9, b"\xff" * 8 + b"\x7f"])
        )
        match data.draw(st.sampled_from(["replace", "insert", "cut", "repeat"])):
            case "replace":
                found[at : at + len(few)] = few
            case "insert":
                found[at:at] = few
            case "cut":
                del found[at : at + data.draw(st.sampled_from([1, 8, 10**6]))]
            case "repeat":
                found[at:at] = found[at : at + data.draw(st.integers(1, 64))]
    return bytes(found)


@settings(bounded, max_examples=300 * MORE)
@given(st.data())
def test_graph_files(bundle_path, little_memory, data):
    kind = data.draw(st.sampled_from(["encoder.onnx", "decoder.onnx", "gguf", "xml", "npy"]))
    try:
        if kind == "gguf":
            gguf_summary(changed(data, gguf()))
        elif kind == "xml":
            check_openvino(changed(data, IR.format(offset=0, size=32).encode()), 32)
        elif kind == "npy":
            check_npy(changed(data, npy("'<f4'", "(1,)")))
        else:
            onnx_summary(changed(data, (bundle_path / kind).read_bytes()))
    except GraphError as error:
        assert str(error).isprintable() and len(str(error)) < 500


@settings(bounded, max_examples=200 * MORE)
@given(st.binary(max_size=200))
@example(b"GGUF")
def test_files_of_anything(data):
    for read in (onnx_summary, gguf_summary, check_npy, lambda xml: check_openvino(xml, 32)):
        for prefix in (b"", b"GGUF\x03\0\0\0", b"\x93NUMPY\x01\x00", b"\x3a\xff\x01", b"<net>"):
            try:
                read(prefix + data)
            except GraphError:
                pass
