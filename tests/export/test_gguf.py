"""GGUF files against the torch decoder in llama.cpp itself: numbers, rows, lanes, growth, and every refusal."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip("gguf", reason="needs gguf: pip install 'edgecap[gguf]'")
pytest.importorskip("llama_cpp", reason="needs llama_cpp: pip install 'edgecap[gguf]'")

from edgecap.export.artifact import BuildOptions, Source
from edgecap.export.assemble import assemble
from edgecap.export.calibration import Calibration
from edgecap.export.gguf_decoder import ARCHITECTURES, tensors, write_decoder
from edgecap.export.gguf_mmproj import write_mmproj
from edgecap.export.gguf_targets import f16, q8_0, refuses
from edgecap.export.golden import make_golden
from edgecap.export.targets import Target
from edgecap.export.trunk import OnnxPair, trace
from edgecap.runtime import Captioner, EdgecapError, UsageError, verify_golden, write_bundle
from edgecap.runtime.backends.gguf import GgufModel
from edgecap.runtime.backends.llama import LlamaModel
from edgecap.runtime.backends.mtmd import MtmdEncoder
from edgecap.runtime.decode import DecodeOptions, decode
from edgecap.runtime.preprocess import Preprocess
from edgecap.runtime.tokenizer import Tokenizer
from edgecap.train.checkpoint import load_checkpoint
from edgecap.train.models.language_models import LlamaDecoder
from edgecap.train.settings import TokenizerSettings
from edgecap.train.tokenizer import token_ids, train_tokenizer

from ..train.tiny import SIZE, tiny_model
from .nets import photos, save_run

VOCAB = 40
TOKENS = {"bos": 1, "eos": 2, "pad": 0, "unk": 3, "vocab_size": VOCAB}
WORDS = Tokenizer(
    train_tokenizer([f"w{i}" for i in range(VOCAB - 4)], TokenizerSettings(kind="word", min_count=1, vocab_size=VOCAB))
)


def written(folder: Path, kind: str, precision: str = "f16", **options):
    model = tiny_model(kind, vocab_size=VOCAB)
    with torch.no_grad():
        for parameter in model.decoder.lm.parameters():
            if parameter.ndim == 1:  # biases start at zero and norms at one, which hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    path = folder / f"{kind}.gguf"
    result = write_decoder(path, model.decoder, kind, precision, tokenizer=WORDS, tokens=TOKENS, **options)
    return model, path, result


def opened(model, path: Path, *, beam: int = 1, length: int = 8) -> GgufModel:
    manifest = {"tokens": TOKENS, "decoding": {"beam": beam, "max_length": length}}

    def encode(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model.photo(pixels=torch.from_numpy(pixels))["prefix"].numpy()

    return GgufModel(encode, LlamaModel(path, threads=1), manifest)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    model, path, _ = written(tmp_path_factory.mktemp("f16"), request.param)
    return model, opened(model, path)


def test_logits_are_torch_s_while_rows_are_doubled_dropped_and_reordered(pair) -> None:
    """Six photos are two lanes; rows move within and out of both, and their number outgrows the contexts."""
    model, ours = pair
    pixels, prompt = photos(6, SIZE), np.array([7, 9])
    session, reference = ours.session(), model.session()
    np.testing.assert_allclose(session.start(pixels, prompt), reference.start(pixels, prompt), atol=0.01)
    random = np.random.default_rng(0)
    plan = [[0, 1, 2, 3, 4, 5], [5, 5, 0, 0, 0, 1, 4, 3], [7, 6, 0, 0, 1], [4, 4, 4, 4], list(range(4)) * 8, [31, 0]]
    for parents in [np.array(rows) for rows in plan]:
        ids = random.integers(4, VOCAB, len(parents))
        np.testing.assert_allclose(session.step(ids, parents), reference.step(ids, parents), atol=0.01)
    assert session.step(np.zeros(0, np.int64), np.zeros(0, np.int64)).shape == (0, VOCAB)


@pytest.mark.parametrize("beam", [1, 3])
def test_captions_are_torch_s_and_a_batch_is_its_photos_one_by_one(pair, beam: int) -> None:
    model, ours = pair
    pixels = photos(5, SIZE, seed=1)
    options = DecodeOptions(beam=beam, max_length=9)
    theirs = decode(model.session(), pixels, options, eos_id=2)
    batch = decode(ours.session(), pixels, options, eos_id=2)
    alone = [decode(ours.session(), pixels[i : i + 1], options, eos_id=2)[0] for i in range(5)]
    assert [each[0].token_ids for each in batch] == [each[0].token_ids for each in theirs]
    assert [each[0].token_ids for each in batch] == [each[0].token_ids for each in alone]


def test_sessions_are_their_own(pair) -> None:
    """Two sessions in turns, and two in threads, say what each says alone."""
    _, ours = pair
    pixels = photos(2, SIZE, seed=2)
    ids, row = np.array([5, 9, 11, 4]), np.zeros(1, np.int64)

    def say(photo: int, session=None):
        session = session or ours.session()
        yield session.start(pixels[photo : photo + 1])
        for token in ids:
            yield session.step(np.array([token]), row)

    alone = [list(say(0)), list(say(1))]
    turns = list(zip(say(0), say(1), strict=True))
    for photo in (0, 1):
        np.testing.assert_array_equal([pair_of[photo] for pair_of in turns], alone[photo])
    found: dict[int, list] = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, list(say(i)))) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal([found[0], found[1]], alone)


def test_a_session_may_start_again_and_its_contexts_are_used_again(pair) -> None:
    _, ours = pair
    gc.collect()
    session = ours.session()
    first = session.start(photos(5, SIZE))
    used = {id(context) for context in session._contexts}
    session.step(np.full(5, 6), np.arange(5))
    np.testing.assert_array_equal(session.start(photos(5, SIZE)), first)
    assert {id(context) for context in session._contexts} == used and len(used) == 2
    del session
    gc.collect()
    assert used <= {id(context) for context in ours.pool._idle}


@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_blocks_divide_is_quantized_and_nothing_else(kind: str, precision: str, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model, path, result = written(tmp_path, kind, precision, keep={"blk.0.attn_output.weight"})
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    source = dict(tensors(model.decoder, kind))
    assert stored.keys() == source.keys()
    coarse = 0
    for name, tensor in stored.items():
        real = dequantize(tensor.data, tensor.tensor_type).reshape(source[name].shape)
        if source[name].ndim == 1:
            expected, tolerance = "F32", 0.0
        elif name in ("position_embd.weight", "blk.0.attn_output.weight") or source[name].shape[1] % 32:
            expected, tolerance = "F16", 1e-3
        elif name == "token_embd.weight":
            expected, tolerance = "Q8_0", 0.02
        else:
            expected, tolerance = precision.upper(), {"q8_0": 0.02, "q4_0": 0.25}[precision]
            coarse += 1
        assert tensor.tensor_type.name == expected, name
        assert np.abs(real - source[name]).max() <= tolerance * np.abs(source[name]).max(), name
    assert coarse >= 5 and "blk.0.ffn_down.weight" in result.cost["f16"]  # its 48 inputs are one block and a half
    pixels = photos(2, SIZE)
    ours, theirs = opened(model, path).session().start(pixels), model.session().start(pixels)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.95 and not np.array_equal(ours, theirs)


def test_pruned_heads_keep_their_size_in_llama_and_are_refused_in_gpt2(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    torch.manual_seed(0)
    sizes = {"dim": 32, "layers": 2, "heads": 2, "ffn": 40}
    model.decoder = LlamaDecoder(16, VOCAB, **sizes, kv_heads=1, head_dim=8).eval()  # 2 × 8 of 32
    options = {"tokenizer": WORDS, "tokens": TOKENS}
    write_decoder(tmp_path / "x.gguf", model.decoder, "llama", "f16", **options)
    pixels = photos(2, SIZE)
    ours, theirs = opened(model, tmp_path / "x.gguf").session(), model.session()
    np.testing.assert_allclose(ours.start(pixels), theirs.start(pixels), atol=0.01)
    other = tiny_model("gpt2", vocab_size=VOCAB).decoder
    other.heads = 3
    with pytest.raises(UsageError, match="llama.cpp knows gpt2 only with dim = heads × their size"):
        write_decoder(tmp_path / "y.gguf", other, "gpt2", "f16", **options)


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
def test_any_tokenizer_gives_a_file_that_llama_cpp_loads(kind: str, tmp_path: Path) -> None:
    captions = ["a red square above a blue circle", "two green triangles beside a small dog"] * 4
    tokenizer = train_tokenizer(captions, TokenizerSettings(kind=kind, vocab_size=300, min_count=1))
    tokens = token_ids(tokenizer)
    decoder = tiny_model("llama", vocab_size=tokens["vocab_size"]).decoder
    options = {"tokenizer": Tokenizer(tokenizer), "tokens": tokens}
    for name in "ab":
        write_decoder(tmp_path / name, decoder, "llama", "q4_0", **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert LlamaModel(tmp_path / "a").vocab_size == tokens["vocab_size"]


def test_nothing_is_printed_and_leaving_early_is_clean(tmp_path: Path) -> None:
    """A process that ends with sessions open frees in the right order, and llama.cpp says nothing."""
    _, path, _ = written(tmp_path, "gpt2")
    program = f"""
import numpy as np
from edgecap.runtime.backends.gguf import GgufModel
from edgecap.runtime.backends.llama import LlamaModel
manifest = {{"tokens": {{"bos": 1}}, "decoding": {{}}}}
model = GgufModel(lambda pixels: np.ones((len(pixels), 3, 32), np.float32), LlamaModel({str(path)!r}), manifest)
sessions = [model.session() for _ in range(2)]
for session in sessions:
    session.start(np.zeros((5, 8, 8, 3), np.uint8))
    session.step(np.full(40, 5), np.arange(40) % 5)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_mistakes_are_one_line_and_never_end_the_process(pair, tmp_path: Path) -> None:
    model, ours = pair
    session = ours.session()
    session.start(photos(1, SIZE))
    row = np.zeros(1, np.int64)
    with pytest.raises(EdgecapError, match="llama.cpp .* failed with code -1"):
        session.step(np.array([VOCAB]), row)
    with pytest.raises(EdgecapError, match="at most 256 rows of 4 photos"):
        session.step(np.full(257, 5), np.zeros(257, np.int64))
    with pytest.raises(EdgecapError, match="has 256 positions for photo, prompt and caption together"):
        session.start(photos(1, SIZE), np.full(256, 5))
    (tmp_path / "x.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(EdgecapError, match=r"x.gguf cannot be loaded by llama.cpp"):
        LlamaModel(tmp_path / "x.gguf")
    wrong = GgufModel(lambda pixels: np.zeros((1, 3, 31), np.float32), ours.decoder, {"tokens": TOKENS, "decoding": {}})
    with pytest.raises(EdgecapError, match=r"the encoder's output is \[1, 3, 31\], not \[photos, positions, 32\]"):
        wrong.session().start(photos(1, SIZE))


def test_what_cannot_be_says_why() -> None:
    parts = {"encoder": "mobilenet_v2", "bridge": "linear"}
    plain, mmproj = BuildOptions(), BuildOptions(mmproj="f16")
    assert all(refuses({**parts, "decoder": kind}, plain) is None for kind in ("llama", "gpt2"))
    assert "OPT is not an architecture llama.cpp knows" in refuses({**parts, "decoder": "opt"}, plain)
    assert "llama.cpp runs language models (llama, gpt2)" in refuses({**parts, "decoder": "gru"}, plain)
    assert "leave --mmproj out" in refuses({**parts, "decoder": "llama"}, mmproj)


@pytest.mark.parametrize("precision", ["f16", "q8_0"])
def test_mmproj_gives_torch_s_prefix(precision: str, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB, siglip=True)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        pixels = photos(3, SIZE)
        theirs = model.photo(pixels=torch.from_numpy(pixels))["prefix"].numpy()  # [3, 4, 32]
    options = {"tokenizer": WORDS, "tokens": TOKENS}
    write_decoder(tmp_path / "d.gguf", model.decoder, "llama", "f16", words=True, **options)
    result, bias = write_mmproj(tmp_path / "e.gguf", model, precision)
    assert result.cost["tensors"].keys() == {"f32", precision}
    decoder = LlamaModel(tmp_path / "d.gguf", threads=1)
    ours = MtmdEncoder(tmp_path / "e.gguf", decoder, bias)(pixels)
    centre = theirs.mean((0, 1))  # what all photos have in common must not hide what they differ in
    ours, theirs = ours - centre, theirs - centre
    cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert cosine.min() > {"f16": 0.9999, "q8_0": 0.995}[precision]
    with pytest.raises(EdgecapError, match=r"d.gguf cannot be loaded by llama.cpp"):
        MtmdEncoder(tmp_path / "d.gguf", decoder, bias)
    write_decoder(tmp_path / "d.gguf", model.decoder, "llama", "f16", **options)
    with pytest.raises(EdgecapError, match="needs a decoder that names its words"):
        MtmdEncoder(tmp_path / "e.gguf", LlamaModel(tmp_path / "d.gguf"), bias)
    model.encoder.body.config.hidden_act = "relu"
    with pytest.raises(UsageError, match="no SigLIP with relu, only gelu_pytorch_tanh: leave --mmproj out"):
        write_mmproj(tmp_path / "e.gguf", model, precision)


def test_a_bundle_with_mmproj_captions_as_torch(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_run(tmp_path / "run", "llama"))
    vocab = loaded.tokens["vocab_size"]
    size = Preprocess((SIZE, SIZE), "squash", "bilinear")
    loaded = dataclasses.replace(loaded, model=tiny_model("llama", vocab_size=vocab, siglip=True), preprocess=size)
    (tmp_path / "build").mkdir()
    source = Source(
        loaded, Calibration(photos(1), [[4]], loaded.tokens), tmp_path / "build", BuildOptions(mmproj="f16")
    )
    manifest, files = assemble(
        loaded, ("gguf-f16", Target("gguf", "f16", "", "", True, 0.999)), "x", f16(source), make_golden(loaded), []
    )
    manifest["measured"] = {}
    write_bundle(tmp_path / "x.edgecap", manifest, files)
    with Captioner.load(tmp_path / "x.edgecap") as captioner:
        assert verify_golden(captioner).ok
        assert {"encoder.gguf", "decoder.gguf"} < set(captioner.bundle.manifest["files"])
    manifest["gguf"]["bias"] = manifest["gguf"]["bias"][1:]
    write_bundle(tmp_path / "y.edgecap", manifest, files)
    with pytest.raises(EdgecapError, match="gguf.bias must be 32 numbers"):
        Captioner.load(tmp_path / "y.edgecap")


def test_a_bundle_holds_both_and_captions(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_run(tmp_path / "run", "llama"))
    random = np.random.default_rng(0)
    words = [random.integers(4, loaded.tokens["vocab_size"], 5).tolist() for _ in range(4)]
    (tmp_path / "build").mkdir()
    graphs = loaded.model.graphs()
    encoder = trace(graphs.encoder, graphs.encoder_inputs, graphs.encoder_outputs, 18)
    trunk = OnnxPair(encoder, onnx.ModelProto(), graphs.session, [])  # of the trunk, the encoder alone is used
    source = Source(loaded, Calibration(photos(4), words, loaded.tokens), tmp_path / "build", _trunk=trunk)
    artifact = q8_0(source)
    assert [result.name for result in artifact.passes][-3:] == ["static_int8", "fuse_products", "gguf"]
    target = Target("gguf", "q8_0", "", "", False, 0.9)
    manifest, files = assemble(loaded, ("gguf-q8_0", target), "x", artifact, make_golden(loaded), [])
    manifest["measured"] = {}
    write_bundle(tmp_path / "x.edgecap", manifest, files)
    with Captioner.load(tmp_path / "x.edgecap") as captioner:
        assert verify_golden(captioner).ok
        one, three = (captioner.caption_arrays(photos(5), beam=beam, max_length=6) for beam in (1, 3))
        assert len(one) == len(three) == 5
    manifest["gguf"] = {"encoder": "tape"}
    write_bundle(tmp_path / "y.edgecap", manifest, files)
    with pytest.raises(EdgecapError, match='gguf must say which "encoder" there is'):
        Captioner.load(tmp_path / "y.edgecap")
