"""Two real decoders on ONNX Runtime, an attention GRU and a llama with KV cache, under the same search."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgecap.runtime import Bundle, DecodeOptions, EdgecapError, UsageError, load_model, write_bundle
from edgecap.runtime.decode import decode

from .graphs import (
    DIM,
    HIDDEN,
    PATCH,
    SIZE,
    TOKENS,
    GraphBuilder,
    gru_graphs,
    manifest,
    photo,
    tensor,
    tokenizer_json,
)
from .models import Uncached, next_logits, slow_search

EOS, SUPPRESS = TOKENS["eos"], (TOKENS["bos"], TOKENS["pad"], TOKENS["unk"])
SEARCHES = [
    DecodeOptions(max_length=10),
    DecodeOptions(beam=3, max_length=10),
    DecodeOptions(beam=4, max_length=8, length_penalty=1.0, no_repeat_ngram=2, min_length=2),
]
LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 2, 4, 2, 32, 24


def write(out: Any, files: dict[str, bytes], parts: dict[str, Any], **changes: Any) -> Bundle:
    files = {**files, "tokenizer.json": tokenizer_json(), "golden.png": b"x", "golden.npy": b"x"}
    return write_bundle(out, manifest(parts, **changes), files)


@pytest.fixture(scope="module")
def gru(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(write(tmp_path_factory.mktemp("gru") / "gru.edgecap", *gru_graphs(3)), threads=1)


@pytest.fixture(scope="module")
def llama_parts() -> Any:
    """A random llama, both graphs, and the manifest's parts; the encoder turns a photo into a prefix."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=48,
        initializer_range=0.35,  # large, so that captions differ between photos
        bos_token_id=None,
        eos_token_id=None,
    )
    lm = transformers.LlamaForCausalLM(config).eval()
    size = WIDTH // HEADS

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = lm

        def forward(self, ids: Any, prefix: Any, *past: Any) -> Any:
            embeds = torch.cat((prefix, self.lm.model.embed_tokens(ids)), dim=1)  # [rows, prefix + length, WIDTH]
            pairs = list(zip(past[::2], past[1::2], strict=True))
            start = pairs[0][0].shape[2]
            out = self.lm(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[0], start + embeds.shape[1], dtype=torch.long),
                # ONNX Runtime's RotaryEmbedding does not broadcast positions over the rows.
                position_ids=(torch.arange(embeds.shape[1])[None] + start).expand(embeds.shape[0], -1),
                past_key_values=transformers.DynamicCache(ddp_cache_data=pairs),
                use_cache=True,
                logits_to_keep=1,
            )
            present = [half for layer in out.past_key_values.layers for half in (layer.keys, layer.values)]
            return out.logits[:, -1], *present

    names = [f"{part}_{layer}" for layer in range(LAYERS) for part in "kv"]
    axes = torch.export.Dim.DYNAMIC
    examples = (torch.ones(2, 5, dtype=torch.long), torch.randn(2, 3, WIDTH))
    examples += tuple(torch.randn(2, KV_HEADS, 7, size) for _ in names)
    shapes = ({0: axes, 1: axes}, {0: axes, 1: axes}, tuple({0: axes, 2: axes} for _ in names))
    program = torch.onnx.export(
        Graph().eval(),
        examples,
        dynamo=True,
        opset_version=23,
        dynamic_shapes=shapes,
        input_names=["ids", "prefix", *(f"past_{name}" for name in names)],
        output_names=["logits", *(f"present_{name}" for name in names)],
        verbose=False,
    )

    rng = np.random.default_rng(1)
    cells = (SIZE // PATCH) ** 2
    encoder = GraphBuilder()
    pixels = encoder.add("Cast", "pixels", to=onnx.TensorProto.FLOAT)
    pixels = encoder.add("Div", pixels, encoder.constant(np.float32(64)))
    pixels = encoder.add("Transpose", pixels, perm=[0, 3, 1, 2])  # [N, 3, H, W]
    kernel = (rng.normal(size=(WIDTH, 3, PATCH, PATCH)) * 0.2).astype(np.float32)
    grid = encoder.add("Conv", pixels, encoder.constant(kernel), strides=[PATCH, PATCH])
    grid = encoder.add("Reshape", grid, encoder.constant(np.array([0, WIDTH, cells])))
    encoder.add("Transpose", grid, perm=[0, 2, 1], out="prefix")  # [N, cells, WIDTH]

    kv = tensor("float32", "rows", KV_HEADS, "past", size)
    inputs = {"ids": tensor("int64", "rows", "length"), "prefix": tensor("float32", "rows", "prefix", WIDTH)}
    outputs = {"logits": tensor("float32", "rows", VOCAB)}
    graphs = {
        "encoder": {
            "file": "encoder.onnx",
            "inputs": {"pixels": tensor("uint8", "batch", SIZE, SIZE, 3)},
            "outputs": {"prefix": tensor("float32", "batch", cells, WIDTH)},
        },
        "decoder": {
            "file": "decoder.onnx",
            "inputs": inputs | {f"past_{name}": kv for name in names},
            "outputs": outputs | {f"present_{name}": kv for name in names},
        },
    }
    session = {
        "ids": {"input": "ids", "rank": 2},
        "logits": "logits",
        "prefix": {"input": "prefix", "from": "prefix", "dim": WIDTH},
        "kv": [
            {"input": f"past_{name}", "output": f"present_{name}", "heads": KV_HEADS, "dim": size} for name in names
        ],
    }
    files = {
        "encoder.onnx": encoder.build(graphs["encoder"]["inputs"], graphs["encoder"]["outputs"]),
        "decoder.onnx": program.model_proto.SerializeToString(),
    }
    return lm, files, {"graphs": graphs, "session": session}


@pytest.fixture(scope="module")
def llama(llama_parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    _, files, parts = llama_parts
    tokens = {**TOKENS, "vocab_size": VOCAB}
    bundle = write(tmp_path_factory.mktemp("llama") / "llama.edgecap", files, parts, tokens=tokens)
    return load_model(bundle, threads=1)


@pytest.fixture(params=["gru", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(photo(seed)) for seed in range(6)])  # [6, SIZE, SIZE, 3]


def run(session: Any, pixels: np.ndarray, options: DecodeOptions, **more: Any) -> Any:
    return decode(session, pixels, options, eos_id=EOS, suppress=SUPPRESS, **more)


def same(left: Any, right: Any) -> None:
    assert [[each.token_ids for each in found] for found in left] == [
        [each.token_ids for each in found] for found in right
    ]
    scores = [[each.score for found in side for each in found] for side in (left, right)]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beam", "rules"])
def test_fast_is_slow(model, pixels, options):
    fast = run(model.session(), pixels, options)
    same(fast, [slow_search(next_logits(model.session, each), options, SUPPRESS) for each in pixels])
    assert len({found[0].token_ids for found in fast}) > 2  # the photos matter


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beam", "rules"])
def test_batch_is_one_by_one(model, pixels, options):
    together = run(model.session(), pixels, options)
    same(together, [run(model.session(), each[None], options)[0] for each in pixels])


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beam", "rules"])
def test_cached_is_uncached(model, pixels, options):
    same(run(model.session(), pixels[:3], options), run(Uncached(model.session), pixels[:3], options))


def test_prompt_is_tokens_fed_in_advance(model, pixels):
    prompt = np.array([5, 8, 4])
    together = model.session().start(pixels, prompt)
    session, rows = model.session(), np.arange(len(pixels))
    session.start(pixels)
    for token in prompt:
        logits = session.step(np.full(len(pixels), token), rows)
    np.testing.assert_allclose(together, logits, atol=1e-4)
    assert together.dtype == np.float32


def test_parents_pick_rows(model, pixels):
    picks = np.array([4, 0, 0, 2, 5, 5, 5])
    ids = np.array([4, 5, 6, 7, 8, 9, 4])
    session = model.session()
    session.start(pixels)
    rows = session.step(ids, picks)
    for row, token, pick in zip(rows, ids, picks, strict=True):
        alone = model.session()
        alone.start(pixels[pick : pick + 1])
        np.testing.assert_allclose(alone.step(np.array([token]), np.array([0]))[0], row, atol=1e-4)


def test_sessions_share_a_model_across_threads(model, pixels):
    options = SEARCHES[1]
    expected = run(model.session(), pixels, options)
    found: list[Any] = []
    work = [
        threading.Thread(target=lambda: found.extend(run(model.session(), pixels, options) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 20
    for each in found:
        same(each, expected)


def test_gru_against_numpy(gru, pixels):
    """The graph against the formulas: the test model itself is right, the gather by photo included."""
    files, _ = gru_graphs(3)
    weights = [
        {each.name: numpy_helper.to_array(each) for each in onnx.load_from_string(files[name]).graph.initializer}
        for name in ("encoder.onnx", "decoder.onnx")
    ]
    kernel, w_start = weights[0]["c1"], weights[0]["c4"]
    words, w_query = weights[1]["c0"], weights[1]["c1"]
    w_r, u_r, w_z, u_z, w_n, u_n = (weights[1][f"c{i}"] for i in range(4, 10))
    w_out = weights[1]["c11"]

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    side = SIZE // PATCH
    patches = pixels.astype(np.float32).reshape(-1, side, PATCH, side, PATCH, 3) / 64
    grid = np.einsum("nhpwqc,dcpq->nhwd", patches, kernel).reshape(len(pixels), -1, DIM)
    h = np.tanh(grid.mean(1) @ w_start)  # [N, HIDDEN]
    assert h.shape == (len(pixels), HIDDEN)
    for token in (TOKENS["bos"], 7):
        scores = (grid @ (h @ w_query)[:, :, None])[:, :, 0]
        attention = np.exp(scores - scores.max(1, keepdims=True))
        attention /= attention.sum(1, keepdims=True)
        x = np.concatenate([np.tile(words[token], (len(h), 1)), (grid * attention[:, :, None]).sum(1)], 1)
        reset, update = sigmoid(x @ w_r + h @ u_r), sigmoid(x @ w_z + h @ u_z)
        h = update * h + (1 - update) * np.tanh(x @ w_n + (reset * h) @ u_n)
    session = gru.session()
    session.start(pixels)
    logits = session.step(np.full(len(pixels), 7), np.arange(len(pixels)))
    np.testing.assert_allclose(logits, h @ w_out, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_length=12),
        DecodeOptions(beam=3, max_length=12),
        DecodeOptions(beam=3, max_length=12, length_penalty=1.0),
        DecodeOptions(beam=4, max_length=12, length_penalty=0.6, min_length=3),
    ],
    ids=["greedy", "beam", "length penalty", "min length"],
)
def test_llama_against_generate(llama, llama_parts, pixels, options):
    """transformers' own search over the torch module: tokens and scores."""
    torch = pytest.importorskip("torch")
    lm = llama_parts[0]
    found = run(llama.session(), pixels, options)
    prefix = torch.from_numpy(llama.encode(pixels)["prefix"])
    with torch.no_grad():
        bos = lm.model.embed_tokens(torch.full((len(pixels), 1), TOKENS["bos"]))
        for i, ours in enumerate(found):
            theirs = lm.generate(
                inputs_embeds=torch.cat((prefix, bos), dim=1)[i : i + 1],
                do_sample=False,
                num_beams=options.beam,
                num_return_sequences=options.beam,
                length_penalty=options.length_penalty,
                early_stopping=False if options.beam > 1 else None,
                max_new_tokens=options.max_length,
                min_new_tokens=options.min_length or None,
                eos_token_id=EOS,
                pad_token_id=TOKENS["pad"],
                suppress_tokens=list(SUPPRESS),
                return_dict_in_generate=True,
                output_scores=True,
            )
            ids = [tuple(t for t in row.tolist() if t not in (EOS, TOKENS["pad"])) for row in theirs.sequences]
            assert [each.token_ids for each in ours] == ids
            if options.beam > 1:
                scores = theirs.sequences_scores.numpy()
                np.testing.assert_allclose([each.score for each in ours], scores, atol=1e-4)


# --- graphs that are not what the manifest says -----------------------------------------------------


def broken(tmp_path: Any, change: Any) -> str:
    files, parts = gru_graphs()
    files, parts = change(files, parts) or (files, parts)
    with pytest.raises(EdgecapError) as caught:
        load_model(write(tmp_path / "x.edgecap", files, parts))
    assert "\n" not in caught.value.message
    return caught.value.message


def edit(data: bytes, change: Any) -> bytes:
    model = onnx.load_from_string(data)
    change(model)
    return model.SerializeToString()


def test_renamed_input(tmp_path):
    def change(files, parts):
        def rename(model):
            model.graph.input[3].name = model.graph.node[2].input[0] = "state"
            for node in model.graph.node:
                node.input[:] = ["state" if name == "h" else name for name in node.input]

        files["decoder.onnx"] = edit(files["decoder.onnx"], rename)

    message = broken(tmp_path, change)
    assert "decoder.onnx" in message and "inputs" in message and "h, state" in message


def test_other_type(tmp_path):
    def change(files, parts):
        parts["graphs"]["encoder"]["outputs"]["grid"]["dtype"] = "float16"

    assert "encoder.onnx cannot be loaded: its outputs" in broken(tmp_path, change)


def test_other_shape(tmp_path):
    def change(files, parts):
        parts["graphs"]["decoder"]["inputs"]["h"]["shape"][1] = HIDDEN + 1

    assert "decoder.onnx cannot be loaded: its inputs" in broken(tmp_path, change)


def test_fixed_batch(tmp_path):
    def change(files, parts):
        def fix(model):
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

        files["encoder.onnx"] = edit(files["encoder.onnx"], fix)

    assert "pixels" in broken(tmp_path, change)


def test_not_a_graph(tmp_path):
    def change(files, parts):
        files["decoder.onnx"] = b"not a graph"

    assert "decoder.onnx cannot be loaded" in broken(tmp_path, change)


def test_external_data(tmp_path, monkeypatch):
    """Weights in another file would be read from wherever the graph says, past the bundle's checks."""
    (tmp_path / "secret").write_bytes(np.ones(WIDTH, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)

    def change(files, parts):
        def move_out(model):
            big = model.graph.initializer[0]
            big.ClearField("raw_data")
            big.data_location = onnx.TensorProto.EXTERNAL
            big.external_data.add(key="location", value="secret")

        files["decoder.onnx"] = edit(files["decoder.onnx"], move_out)

    assert "external data" in broken(tmp_path, change)


def test_engine_too_old(tmp_path):
    bundle = write(tmp_path / "x.edgecap", *gru_graphs(), requires={"onnxruntime": "99.1"})
    with pytest.raises(EdgecapError, match="needs onnxruntime 99.1 or newer"):
        load_model(bundle)


def test_unknown_backend(tmp_path):
    bundle = write(tmp_path / "x.edgecap", *gru_graphs(), backend="abacus")
    with pytest.raises(EdgecapError, match="abacus"):
        load_model(bundle)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_bad_threads(tmp_path, threads):
    bundle = write(tmp_path / "x.edgecap", *gru_graphs())
    with pytest.raises(UsageError, match="threads"):
        load_model(bundle, threads=threads)
