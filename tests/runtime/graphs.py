"""A small attention GRU captioner written straight as ONNX, and a whole bundle around it: no torch needed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgecap.runtime import Bundle, write_bundle

SIZE, PATCH, DIM, HIDDEN = 16, 8, 6, 10
WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "on",
    "the",
    "left",
    "of",
    ".",
]
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, "vocab_size": len(WORDS)}
TYPES = {"uint8": TensorProto.UINT8, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}


def tensor(dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


class GraphBuilder:
    """Nodes and constants appended one by one."""

    def __init__(self, microsoft: bool = False) -> None:
        self.microsoft = microsoft  # ONNX Runtime's own operators, too, which onnx cannot check
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def attention(self, inputs: list[str], outputs: list[str], heads: int) -> str:
        """GroupQueryAttention with rotary positions, which may write its cache in place; the first output's name."""
        node = helper.make_node("GroupQueryAttention", inputs, outputs, domain="com.microsoft", num_heads=heads)
        node.attribute.extend(helper.make_attribute(*pair) for pair in (("kv_num_heads", heads), ("do_rotary", 1)))
        self.nodes.append(node)
        return outputs[0]

    def build(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> bytes:
        def infos(specs: dict[str, Any]) -> list[Any]:
            return [helper.make_tensor_value_info(n, TYPES[s["dtype"]], s["shape"]) for n, s in specs.items()]

        graph = helper.make_graph(self.nodes, "captioner", infos(inputs), infos(outputs), self.constants)
        domains = [("", 18), *([("com.microsoft", 1)] if self.microsoft else [])]
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*each) for each in domains], ir_version=10)
        if not self.microsoft:
            onnx.checker.check_model(model)
        return model.SerializeToString()


def gru_graphs(seed: int = 0, vocab: int = TOKENS["vocab_size"], scale: float = 1.5) -> tuple[dict[str, bytes], dict]:
    """ONNX files of an attention GRU with random weights, and the manifest's "graphs" and "session"."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * scale / np.sqrt(shape[0])).astype(np.float32)

    cells = (SIZE // PATCH) ** 2
    encoder = GraphBuilder()
    pixels = encoder.add("Cast", "pixels", to=TensorProto.FLOAT)
    pixels = encoder.add("Div", pixels, encoder.constant(np.float32(64)))
    pixels = encoder.add("Transpose", pixels, perm=[0, 3, 1, 2])  # [N, 3, H, W]
    kernel = (rng.normal(size=(DIM, 3, PATCH, PATCH)) * 0.3).astype(np.float32)
    grid = encoder.add("Conv", pixels, encoder.constant(kernel), strides=[PATCH, PATCH])
    grid = encoder.add("Reshape", grid, encoder.constant(np.array([0, DIM, cells])))
    encoder.add("Transpose", grid, perm=[0, 2, 1], out="grid")  # [N, cells, DIM]
    mean = encoder.add("ReduceMean", "grid", encoder.constant(np.array([1])), keepdims=0)  # [N, DIM]
    encoder.add("Tanh", encoder.add("MatMul", mean, encoder.constant(weight(DIM, HIDDEN))), out="h0")

    decoder = GraphBuilder()
    word = decoder.add("Gather", decoder.constant(weight(vocab, DIM) * 3), "ids", axis=0)  # [rows, DIM]
    seen = decoder.add("Gather", "grid", "photo", axis=0)  # [rows, cells, DIM]
    query = decoder.add("MatMul", "h", decoder.constant(weight(HIDDEN, DIM)))  # [rows, DIM]
    query = decoder.add("Unsqueeze", query, decoder.constant(np.array([2])))  # [rows, DIM, 1]
    attention = decoder.add("Softmax", decoder.add("MatMul", seen, query), axis=1)  # [rows, cells, 1]
    context = decoder.add("ReduceSum", decoder.add("Mul", seen, attention), decoder.constant(np.array([1])), keepdims=0)
    x = decoder.add("Concat", word, context, axis=1)  # [rows, 2·DIM]

    def gate(hidden: str, activation: str) -> str:
        a = decoder.add("MatMul", x, decoder.constant(weight(2 * DIM, HIDDEN)))
        b = decoder.add("MatMul", hidden, decoder.constant(weight(HIDDEN, HIDDEN)))
        return decoder.add(activation, decoder.add("Add", a, b))

    reset, update = gate("h", "Sigmoid"), gate("h", "Sigmoid")
    new = gate(decoder.add("Mul", reset, "h"), "Tanh")
    kept = decoder.add("Mul", update, "h")
    fresh = decoder.add("Mul", decoder.add("Sub", decoder.constant(np.float32(1)), update), new)
    decoder.add("Add", kept, fresh, out="h_next")
    decoder.add("MatMul", "h_next", decoder.constant(weight(HIDDEN, vocab) * 2), out="logits")

    graphs = {
        "encoder": {
            "file": "encoder.onnx",
            "inputs": {"pixels": tensor("uint8", "batch", SIZE, SIZE, 3)},
            "outputs": {
                "grid": tensor("float32", "batch", cells, DIM),
                "h0": tensor("float32", "batch", HIDDEN),
            },
        },
        "decoder": {
            "file": "decoder.onnx",
            "inputs": {
                "ids": tensor("int64", "rows"),
                "photo": tensor("int64", "rows"),
                "grid": tensor("float32", "photos", cells, DIM),
                "h": tensor("float32", "rows", HIDDEN),
            },
            "outputs": {
                "logits": tensor("float32", "rows", vocab),
                "h_next": tensor("float32", "rows", HIDDEN),
            },
        },
    }
    session = {
        "ids": {"input": "ids", "rank": 1},
        "logits": "logits",
        "photo_index": "photo",
        "photo": {"grid": "grid"},
        "state": [{"input": "h", "output": "h_next", "init": "h0"}],
    }
    files = {
        f"{name}.onnx": builder.build(graphs[name]["inputs"], graphs[name]["outputs"])
        for name, builder in (("encoder", encoder), ("decoder", decoder))
    }
    return files, {"graphs": graphs, "session": session}


def tokenizer_json() -> bytes:
    """A word-level tokenizer over WORDS."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:4]])
    return inner.to_str().encode()


def photo(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """A random photo: a coloured rectangle on a coloured ground."""
    rng = np.random.default_rng(seed)
    height, width = size
    array = np.empty((height, width, 3), np.uint8)
    array[:] = rng.integers(0, 256, 3)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    array[top : top + height // 2, left : left + width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(array)


def manifest(parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A complete manifest but for "files" and a golden pair that was computed."""
    return {
        "format": "edgecap",
        "version": 1,
        "name": "tiny",
        "created_with": {"edgecap": "0.1.0"},
        "backend": "onnx",
        "target": "onnx-fp32",
        "precision": "fp32",
        "requires": {"onnxruntime": "1.17"},
        "preprocess": {"size": [SIZE, SIZE], "mode": "squash", "resample": "bilinear"},
        "tokens": TOKENS,
        "decoding": {
            "beam": 1,
            "max_length": 12,
            "min_length": 0,
            "length_penalty": 0.0,
            "no_repeat_ngram": 0,
        },
        **parts,
        "golden": {
            "image": "golden.png",
            "token_ids": [],
            "logits": "golden.npy",
            "tolerance": {"same_tokens": True, "min_cosine": 0.999},
        },
        "lineage": {
            "checkpoint": {"sha256": "0" * 64, "recipe": {}, "metrics": {"cider": 0.9}},
            "data": "scenes",
            "passes": [{"name": "export", "params": {"opset": 18}, "cost": {"cosine": 1.0}}],
        },
        "measured": {
            "bytes": 1234,
            "identical_captions": 1.0,
            "data": "scenes",
            "split": "val",
            "photos": 10,
        },
        **changes,
    }


def write_gru_bundle(out: Path, seed: int = 0, **changes: Any) -> Bundle:
    """A bundle of the random GRU whose golden pair is what it computes itself."""
    import dataclasses

    from edgecap.runtime import DecodeOptions, load_model
    from edgecap.runtime.decode import decode

    files, parts = gru_graphs(seed)
    image = photo(99)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    files |= {"tokenizer.json": tokenizer_json(), "golden.png": buffer.getvalue(), "golden.npy": b""}
    complete = manifest(parts, **changes)
    draft = write_bundle(out, complete, files)

    pixels = np.asarray(image)[None]
    session = load_model(draft).session()
    suppress = (TOKENS["bos"], TOKENS["pad"], TOKENS["unk"])
    options = dataclasses.replace(DecodeOptions.from_dict(complete["decoding"]), beam=1)
    ((best,),) = decode(session, pixels, options, eos_id=TOKENS["eos"], suppress=suppress)
    rows = [session.start(pixels)]
    rows += [session.step(np.array([token]), np.array([0])) for token in best.token_ids]
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(rows))
    files["golden.npy"] = buffer.getvalue()
    golden = {**complete["golden"], "token_ids": list(best.token_ids)}
    return write_bundle(out, {**complete, "golden": golden}, files)


def write_fused_bundle(path: Path, seed: int = 0, **changes: Any) -> Bundle:
    """The same with the whole captioner as one more graph, which `edgecap export --fused` makes."""
    from edgecap.export.fused import describe, fuse
    from edgecap.export.trunk import OnnxPair
    from edgecap.runtime import Preprocess
    from edgecap.runtime.tokenizer import Tokenizer

    bundle = write_gru_bundle(path, seed, **changes)
    found = bundle.manifest
    files = {name: bundle.read(name) for name in found["files"]}
    encoder, decoder = (onnx.load_from_string(files[f"{part}.onnx"]) for part in ("encoder", "decoder"))
    model = fuse(
        OnnxPair(encoder, decoder, found["session"], []),
        tokens=found["tokens"],
        preprocess=Preprocess(**found["preprocess"]),
        tokenizer=Tokenizer.load(files["tokenizer.json"]),
        decoding=found["decoding"],
    )
    files["fused.onnx"] = model.SerializeToString()
    return write_bundle(path, found | {"graphs": found["graphs"] | {"fused": describe(model)}}, files)
