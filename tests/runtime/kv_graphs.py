"""A small random language model with a KV cache, written straight as ONNX: concatenated, in place, or behind frames."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgecap.runtime import Bundle, Preprocess, write_bundle
from edgecap.runtime.backends import load_model
from edgecap.runtime.decode import DecodeOptions, decode, never_said

from .graphs import SIZE, TOKENS, GraphBuilder, manifest, photo, tensor, tokenizer_json

PATCH, WIDTH, HEADS, DIM, POSITIONS = 8, 16, 2, 16, 200


def _encoder(rng: np.random.Generator, batch: str, side: int | str) -> tuple[bytes, dict[str, Any]]:
    """Photos or frames uint8 [N, side, side, 3] → prefix [N, cells, WIDTH]; side: a number, or a name: any."""
    cells = "cells" if isinstance(side, str) else (side // PATCH) ** 2
    builder = GraphBuilder()
    scaled = builder.add("Div", builder.add("Cast", "pixels", to=1), builder.constant(np.float32(64)))
    kernel = builder.constant((rng.normal(size=(WIDTH, 3, PATCH, PATCH)) * 0.5).astype(np.float32))
    grid = builder.add("Conv", builder.add("Transpose", scaled, perm=[0, 3, 1, 2]), kernel, strides=[PATCH, PATCH])
    grid = builder.add("Reshape", grid, builder.constant(np.array([0, WIDTH, -1])))
    builder.add("Transpose", grid, perm=[0, 2, 1], out="prefix")
    graph = {
        "file": "encoder.onnx",
        "inputs": {"pixels": tensor("uint8", batch, side, side, 3)},
        "outputs": {"prefix": tensor("float32", batch, cells, WIDTH)},
    }
    return builder.build(graph["inputs"], graph["outputs"]), graph


def _decoder(rng: np.random.Generator, in_place: bool, vocab: int) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """One layer of attention over prefix, past and ids; in place through GroupQueryAttention, else concatenated."""

    def weight(*shape: int, scale: float = 1.0) -> str:
        return builder.constant((rng.normal(size=shape) * scale / np.sqrt(shape[0])).astype(np.float32))

    builder = GraphBuilder(microsoft=in_place)
    words = builder.add("Gather", weight(vocab, WIDTH, scale=8), "ids", axis=0)
    x = builder.add("Concat", "prefix", words, axis=1)  # [rows, t, WIDTH]
    query, key, value = (builder.add("MatMul", x, weight(WIDTH, HEADS * DIM, scale=2)) for _ in range(3))
    if in_place:
        one = builder.constant(np.int64(1))
        last = builder.add("Cast", builder.add("Sub", "filled", one), to=6)
        rows = builder.add("Shape", "ids", start=0, end=1)
        lengths = builder.add("Expand", last, rows)  # [rows]
        total = builder.add("Cast", "filled", to=6)
        angles = np.arange(POSITIONS)[:, None] / 10.0 ** np.arange(DIM // 2)
        turns = [builder.constant(turn(angles).astype(np.float32)) for turn in (np.cos, np.sin)]
        inputs = [query, key, value, "past_k", "past_v", lengths, total, *turns]
        seen = builder.attention(inputs, ["seen", "present_k", "present_v"], HEADS)
    else:

        def heads(tensor: str) -> str:
            split = builder.add("Reshape", tensor, builder.constant(np.array([0, 0, HEADS, DIM])))
            return builder.add("Transpose", split, perm=[0, 2, 1, 3])  # [rows, HEADS, t, DIM]

        keys = builder.add("Concat", "past_k", heads(key), axis=2, out="present_k")
        values = builder.add("Concat", "past_v", heads(value), axis=2, out="present_v")
        scores = builder.add("MatMul", heads(query), builder.add("Transpose", keys, perm=[0, 1, 3, 2]))
        mixed = builder.add("MatMul", builder.add("Softmax", scores, axis=-1), values)
        mixed = builder.add("Transpose", mixed, perm=[0, 2, 1, 3])
        seen = builder.add("Reshape", mixed, builder.constant(np.array([0, 0, HEADS * DIM])))
    x = builder.add("Add", x, builder.add("MatMul", seen, weight(HEADS * DIM, WIDTH, scale=2)))
    x = builder.add("Gather", builder.add("Tanh", x), builder.constant(np.int64(-1)), axis=1)  # [rows, WIDTH]
    builder.add("MatMul", x, weight(WIDTH, vocab, scale=6), out="logits")

    def cache(length: str) -> dict[str, Any]:
        return tensor("float32", "rows", HEADS, length, DIM)

    past, present = ("capacity", "capacity") if in_place else ("past", "present")
    graph = {
        "file": "decoder.onnx",
        "inputs": {
            "ids": tensor("int64", "rows", "length"),
            "prefix": tensor("float32", "rows", "places", WIDTH),
            "past_k": cache(past),
            "past_v": cache(past),
            **({"filled": tensor("int64")} if in_place else {}),
        },
        "outputs": {
            "logits": tensor("float32", "rows", vocab),
            "present_k": cache(present),
            "present_v": cache(present),
        },
    }
    session = {
        "ids": {"input": "ids", "rank": 2},
        "logits": "logits",
        "prefix": {"input": "prefix", "from": "prefix", "dim": WIDTH},
        "kv": [{"input": f"past_{x}", "output": f"present_{x}", "heads": HEADS, "dim": DIM} for x in "kv"],
        **({"positions": POSITIONS, "cache": {"filled": "filled"}} if in_place else {}),
    }
    return builder.build(graph["inputs"], graph["outputs"]), graph, session


def write_kv_bundle(
    out: Path,
    *,
    in_place: bool,
    framed: bool = False,
    side: int | str = SIZE,
    squashed: int = 0,
    seed: int = 0,
    **changes: Any,
) -> Bundle:
    """A bundle of it whose golden pair is what it computes itself.

    framed: photos are cut into tiles of SIZE pixels; side: what the encoder takes, a name for any; squashed: photos are
    first brought to so many pixels a side.
    """
    rng = np.random.default_rng(seed)
    encoder, seeing = _encoder(rng, "frames" if framed else "batch", side)
    decoder, saying, session = _decoder(rng, in_place, TOKENS["vocab_size"])
    image = photo(99)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    files = {"encoder.onnx": encoder, "decoder.onnx": decoder, "tokenizer.json": tokenizer_json()}
    files |= {"golden.png": buffer.getvalue(), "golden.npy": b""}
    complete = manifest({"graphs": {"encoder": seeing, "decoder": saying}, "session": session}, **changes)
    if framed:
        mode = "squash" if squashed else "keep"
        complete["preprocess"] = {"size": [squashed or SIZE] * 2, "mode": mode, "resample": "bilinear"}
        complete["frames"] = {
            **{"side": SIZE, "native": SIZE, "patch": PATCH, "scale": 1, "split": True},
            "longest_edge": 0 if squashed else 40,
            "prompt": {
                **{"before": [4], "after": [5, 1], "whole": [6], "end": [7], "row": [8], "rows": [9]},
                "tiles": [[[10 + (row + column) % 3] for column in range(4)] for row in range(4)],
            },
        }
    draft = write_bundle(out, complete, files)
    session_of = load_model(draft).session
    pixels = Preprocess.from_dict(complete["preprocess"])(image)[None]
    options = DecodeOptions.from_dict({**complete["decoding"], "beam": 1})
    suppress = never_said(TOKENS)
    ((best,),) = decode(session_of(), pixels, options, eos_id=TOKENS["eos"], suppress=suppress)
    again = session_of()
    rows = [again.start(pixels)]
    rows += [again.step(np.array([token]), np.array([0])) for token in best.token_ids]
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(rows))
    files["golden.npy"] = buffer.getvalue()
    golden = {**complete["golden"], "token_ids": list(best.token_ids)}
    return write_bundle(out, {**complete, "golden": golden}, files)


def drawn(seed: int, width: int, height: int) -> Image.Image:
    """Noise over a slope of colour: every pixel is unlike its neighbours, and no two rows are the same."""
    rng = np.random.default_rng(seed)
    slope = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 90, width))[..., None] * rng.uniform(0.2, 1, 3)
    return Image.fromarray(np.clip(slope + rng.integers(0, 60, (height, width, 3)), 0, 255).astype(np.uint8))
