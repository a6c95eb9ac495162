"""Graph surgery: a SmolVLM as the hub's ONNX community exports it, three graphs, → the two graphs of a framed bundle.

Their graphs keep their nodes and weights. In front of them comes what their users compute outside: pixels are scaled,
masks and positions are made of shapes, words are embedded and set behind the photo's embeddings. Behind them, of the
logits only the last position's are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.compose
from onnx import NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_node, make_tensor_value_info, tensor_dtype_to_np_dtype

from ..runtime.errors import UsageError
from .from_onnx_nodes import SCOPE, Nodes, declare, kind_of, listed, one_opset, opened, sizes_of
from .graph import Graph, PassResult, attribute
from .tie import tie_embedding

PIXELS, PREFIX, IDS, LOGITS, FILLED = "pixels", "prefix", "ids", "logits", "filled"
WORDS = "words/"  # of what was the embedding's graph
MICROSOFT = "com.microsoft"
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
ATTENDING = "GroupQueryAttention"  # whose past and present may be one buffer
# What makes logits of hidden states, which are its first input; its result has as many dimensions as that.
PRODUCTS = {"MatMul", "MatMulNBits", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
PRODUCTS |= {"FusedMatMul", "QLinearMatMul"}
EACH = ("Cast", "Identity", "Mul", "Div", "Add", "Sub", "DequantizeLinear")  # what may lie between it and the logits


@dataclass(frozen=True)
class Decoder:
    """model: the framed decoder. session: its roles. passes: what was done."""

    model: onnx.ModelProto
    session: dict[str, Any]
    passes: list[PassResult]


def framed_vision(
    model: onnx.ModelProto, scale: np.ndarray, shift: np.ndarray, dim: int
) -> tuple[onnx.ModelProto, int]:
    """Their vision encoder → uint8 pixels [frames, S, S, 3] → prefix float32 [frames, tokens, dim]; and S where the
    graph names one, else 0. Changed in place.

    scale, shift [3]: what pixels of 0 to 255 are multiplied by and what is then added. UsageError for other graphs.
    """
    graph = opened(model, "the vision encoder")
    inputs = {value.name: value for value in model.graph.input}
    images, mask = inputs.pop("pixel_values", None), inputs.pop("pixel_attention_mask", None)
    if images is None or inputs or len(sizes_of(images)) not in (4, 5):
        raise UsageError(
            f"the vision encoder takes {listed(model.graph.input)}, where pixel_values [batch, photos, 3, height, "
            "width] and pixel_attention_mask are known"
        )
    if len(model.graph.output) != 1:
        raise UsageError(f"the vision encoder gives {listed(model.graph.output)}, where image_features is known")
    *counts, _, high, wide = sizes_of(images)
    if all(counts) or high != wide:
        raise UsageError(f"the vision encoder takes pixel_values {sizes_of(images)}: it must take squares, any number")
    nodes = Nodes(graph)
    nodes.add("Cast", [PIXELS], "real", to=TensorProto.FLOAT)
    nodes.add("Mul", ["real", nodes.constant("scale", scale.astype(np.float32))], "scaled")
    nodes.add("Add", ["scaled", nodes.constant("shift", shift.astype(np.float32))], "normal")
    last = nodes.add("Transpose", ["normal"], "channels", perm=[0, 3, 1, 2])  # [frames, 3, S, S]
    nodes.add("Shape", [PIXELS], "shape")
    sizes = ["frames", "high", "wide"]
    for axis, name in enumerate(sizes):
        nodes.add("Gather", ["shape", nodes.constant(f"axis{axis}", np.array([axis]))], name)
    if len(counts) == 2:  # the frames are one batch's photos, or where it takes one photo each, a batch of them
        axis = 0 if not counts[1] else 1
        if counts[axis] not in (0, 1):
            raise UsageError(f"the vision encoder takes {counts[axis]} batches at a time, where one is known")
        last = nodes.add("Unsqueeze", [last, nodes.constant("unit_axis", np.array([axis]))], "batch")
        sizes.insert(axis, nodes.constant("unit", np.array([1])))
    nodes.cast(last, kind_of(images), "pixel_values", source=TensorProto.FLOAT, own=True)
    if mask is not None:
        ones = nodes.constant("seen", np.array(1, tensor_dtype_to_np_dtype(kind_of(mask))))
        nodes.add("Concat", sizes, "mask_shape", axis=0)
        nodes.add("Expand", [ones, "mask_shape"], "pixel_attention_mask", own=True)
    nodes.after = True
    (result,) = model.graph.output
    features = nodes.cast(nodes.freed(result.name), TensorProto.FLOAT, "features", source=kind_of(result))
    ends = [nodes.constant(f"size{size}", np.array([size])) for size in (-1, dim)]
    nodes.add("Concat", ["frames", *ends], "prefix_shape", axis=0)
    nodes.add("Reshape", [features, "prefix_shape"], PREFIX, own=True)
    side: Any = high or "side"
    declare(
        graph,
        nodes,
        [make_tensor_value_info(PIXELS, TensorProto.UINT8, ["frames", side, side, 3])],
        [make_tensor_value_info(PREFIX, TensorProto.FLOAT, ["frames", "tokens", dim])],
    )
    return model, high


def framed_decoder(embed: onnx.ModelProto, model: onnx.ModelProto, *, dim: int, vocab: int, positions: int) -> Decoder:
    """Their embedding and merged decoder as one: ids [rows, length], prefix float32 [rows, places, dim] in front of
    them, the cache → float32 logits [rows, vocab] of the last position, the cache. `model` is changed in place.

    Where all of the cache is read by GroupQueryAttention, past and present may be one buffer that is written in place
    (`share_cache` of kv_cache.py says how); other decoders give a present that is longer than the past.
    UsageError for graphs of other inputs and outputs.
    """
    graph = opened(model, "the decoder")
    inputs = {value.name: value for value in model.graph.input}
    past = [name for name in inputs if name.startswith("past_key_values.")]
    known = {"inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep", *past}
    if "use_cache_branch" in inputs:
        raise UsageError("the decoder has a use_cache_branch: it was merged by an optimum before 1.14; export it again")
    if "inputs_embeds" not in inputs or set(inputs) - known or not past:
        raise UsageError(
            f"the decoder takes {listed(model.graph.input)}, where inputs_embeds, attention_mask, "
            "position_ids and past_key_values.N.key and .value are known"
        )
    for name, rank in (("inputs_embeds", 3), ("attention_mask", 2), ("position_ids", 2)):
        if name in inputs and len(sizes_of(inputs[name])) != rank:
            raise UsageError(f"the decoder's {name} has {len(sizes_of(inputs[name]))} dimensions, not {rank}")
    logits = next((value for value in model.graph.output if value.name == "logits"), None)
    if logits is None or len(sizes_of(logits)) != 3:
        raise UsageError(
            f"the decoder gives {listed(model.graph.output)}, where logits [rows, length, words] are known"
        )
    kv = _cache_roles(model, inputs, past)
    in_place = _in_place(graph, kv)
    tables = [_position_limit(graph, op, place) for op, place in (("RotaryEmbedding", 2), (ATTENDING, 7))]
    session = {
        "ids": {"input": IDS, "rank": 2},
        "logits": LOGITS,
        "prefix": {"input": PREFIX, "from": PREFIX, "dim": dim},
        "kv": kv,
        "positions": min([positions, *filter(None, tables)]),
        **({"cache": {"filled": FILLED}} if in_place else {}),
    }
    nodes = Nodes(graph)
    cut = _last_position(graph, nodes)
    words = _embedding(embed, model)
    nodes.made += words
    _in_front(nodes, inputs, embed.graph.output[0], "" if in_place else past[0])
    nodes.after = True
    last = nodes.freed("logits")
    if not cut:
        ends = [nodes.constant(f"last{i}", np.array([i])) for i in (-1, 2**62, 1)]
        last = nodes.add("Slice", [last, *ends], "last_logits")
    last = nodes.add("Squeeze", [last, nodes.constant("length_axis", np.array([1]))], "single")
    nodes.cast(last, TensorProto.FLOAT, LOGITS, source=kind_of(logits), own=True)
    graph.graph.initializer.extend(embed.graph.initializer)
    kept = {value.name: kind_of(value) for value in (*model.graph.input, *model.graph.output)}

    def cache(role: str, axis: str) -> list[ValueInfoProto]:
        axis = "capacity" if in_place else axis
        shape = ["rows", kv[0]["heads"], axis, kv[0]["dim"]]
        return [make_tensor_value_info(entry[role], kept[entry[role]], shape) for entry in kv]

    declare(
        graph,
        nodes,
        [
            make_tensor_value_info(IDS, TensorProto.INT64, ["rows", "length"]),
            make_tensor_value_info(PREFIX, TensorProto.FLOAT, ["rows", "places", dim]),
            *cache("input", "past"),
            *[make_tensor_value_info(FILLED, TensorProto.INT32, [])] * in_place,
        ],
        [make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["rows", vocab]), *cache("output", "all")],
    )
    return Decoder(
        model,
        session,
        [
            PassResult("inline_embedding", cost={"nodes": len(words)}),
            PassResult("last_position", cost={"in front of": cut or "nothing: of the logits"}),
            PassResult("kv_cache", cost={"in place": in_place, "layers": len(kv) // 2}),
            tie_embedding(model),
        ],
    )


def _in_front(nodes: Nodes, inputs: dict[str, ValueInfoProto], said: ValueInfoProto, past: str) -> None:
    """What the decoder's own inputs are made of: ids, prefix and what has been read.

    said: the embedding's output. past: an input whose length that is, "" where FILLED counts it and the run.
    """
    graph, kind = nodes.graph, kind_of(inputs["inputs_embeds"])
    seen = nodes.cast(PREFIX, kind, "seen", source=TensorProto.FLOAT)
    words = nodes.cast(said.name, kind, "words", source=kind_of(said))
    nodes.add("Concat", [seen, words], "inputs_embeds", own=True, axis=1)
    nodes.add("Shape", [IDS], "ids_shape")
    nodes.add("Shape", ["inputs_embeds"], "embeds_shape")
    zero, one, two = (nodes.constant(f"axis{i}", np.array([i])) for i in range(3))
    nodes.add("Gather", ["ids_shape", zero], "rows")
    nodes.add("Gather", ["embeds_shape", one], "new")
    if past:
        nodes.add("Shape", [past], "past_shape")
        nodes.add("Gather", ["past_shape", two], "before")
        nodes.add("Add", ["before", "new"], "all")
    else:
        nodes.add("Cast", [FILLED], "filled_wide", to=TensorProto.INT64)
        nodes.add("Reshape", ["filled_wide", nodes.constant("flat", np.array([-1]))], "all")
        nodes.add("Sub", ["all", "new"], "before")
    if mask := inputs.get("attention_mask"):
        ones = nodes.constant("visible", np.array(1, tensor_dtype_to_np_dtype(kind_of(mask))))
        nodes.add("Concat", ["rows", "all"], "mask_shape", axis=0)
        nodes.add("Expand", [ones, "mask_shape"], "attention_mask", own=True)
    if positions := inputs.get("position_ids"):
        scalar = nodes.constant("scalar", np.array([], np.int64))
        ends = [nodes.add("Reshape", [name, scalar], f"{name}_scalar") for name in ("before", "all")]
        nodes.add("Range", [*ends, nodes.constant("step", np.array(1))], "places")
        nodes.add("Concat", ["rows", "new"], "places_shape", axis=0)
        rows = nodes.add("Expand", ["places", "places_shape"], "places_of_rows")
        nodes.cast(rows, kind_of(positions), "position_ids", source=TensorProto.INT64, own=True)
    if kept := inputs.get("num_logits_to_keep"):
        graph.set_constant(kept.name, np.ones([1] * len(sizes_of(kept)), tensor_dtype_to_np_dtype(kind_of(kept))))


# --- reading their graphs -----------------------------------------------------------------------------


def _cache_roles(model: onnx.ModelProto, inputs: dict[str, ValueInfoProto], past: list[str]) -> list[dict[str, Any]]:
    """The roles' entries of the cache, layer by layer. UsageError where past and present do not belong together."""
    outputs = {value.name: value for value in model.graph.output}
    kv = []
    for name in past:
        present = name.replace("past_key_values.", "present.")
        if present not in outputs:
            raise UsageError(f"the decoder takes {name} and gives no {present}")
        sizes = sizes_of(inputs[name])
        if len(sizes) != 4 or not (sizes[1] and sizes[3]) or kind_of(inputs[name]) not in FLOATS:
            raise UsageError(f"the decoder's {name} is not floats [rows, heads, length, size] of known heads and size")
        kv.append({"input": name, "output": present, "heads": sizes[1], "dim": sizes[3]})
    if len({(entry["heads"], entry["dim"]) for entry in kv}) != 1:
        raise UsageError("the decoder's layers have caches of different sizes")
    return kv


def _in_place(graph: Graph, kv: list[dict[str, Any]]) -> bool:
    """Whether all of the cache is read by GroupQueryAttention alone, which can write where it reads."""
    for entry in kv:
        readers = graph.consumers.get(entry["input"], [])
        if len(readers) != 1 or readers[0].op_type != ATTENDING or readers[0].domain != MICROSOFT:
            return False
        if entry["output"] not in readers[0].output[1:3] or attribute(readers[0], "local_window_size", -1) > 0:
            return False
    return True


def _position_limit(graph: Graph, op: str, place: int) -> int:
    """Positions in the smallest table of cosines that nodes take as input `place`; 0 where none has a stored one."""
    found = []
    for node in graph.graph.node:
        table = graph.initializers.get(node.input[place]) if node.op_type == op and len(node.input) > place else None
        if table is not None and len(table.dims) == 2:
            found.append(table.dims[0])
    return min(found, default=0)


def _embedding(embed: onnx.ModelProto, decoder: onnx.ModelProto) -> list[NodeProto]:
    """The embedding's nodes, renamed, reading IDS; both models are brought to one opset."""
    opened(embed, "the embedding")
    if [value.name for value in embed.graph.input] != ["input_ids"] or len(embed.graph.output) != 1:
        raise UsageError(f"the embedding takes {listed(embed.graph.input)}, where input_ids is known")
    kind, opsets = kind_of(embed.graph.input[0]), one_opset(embed, decoder)
    del decoder.opset_import[:]
    decoder.opset_import.extend(opsets)
    decoder.ir_version = max(embed.ir_version, decoder.ir_version)
    onnx.compose.add_prefix_graph(embed.graph, WORDS, inplace=True)
    ids = make_node("Cast", [IDS], [f"{WORDS}input_ids"], name=f"{WORDS}cast", to=kind)
    return [ids, *embed.graph.node]


def _last_position(graph: Graph, nodes: Nodes) -> str:
    """Let the output layer see the last position only: its operator; "" where it is not known."""
    name = "logits"
    for _ in range(8):
        node = graph.producer.get(name)
        if node is None or len(graph.consumers.get(name, [])) > (name != "logits"):
            return ""
        if node.op_type in PRODUCTS:
            break
        # Of a quantized layer's factors one is its product, the other a scale.
        ahead = [each for each in node.input if _is_product(graph, each)]
        if node.op_type not in EACH or len(ahead) != 1:
            return ""
        name = ahead[0]
    else:
        return ""
    if node.op_type in ("MatMul", "FusedMatMul") and not _is_constant(graph, node.input[1]):
        return ""
    ends = [nodes.constant(f"last{i}", np.array([i])) for i in (-1, 2**62, 1)]
    cut = make_node("Slice", [node.input[0], *ends], [f"{SCOPE}last_hidden"], name=f"{SCOPE}last_hidden")
    node.input[0] = cut.output[0]
    place = next(i for i, each in enumerate(graph.graph.node) if each.output[0] == node.output[0])
    graph.set_nodes([*graph.graph.node[:place], cut, *graph.graph.node[place:]])
    return node.op_type


def _is_product(graph: Graph, name: str) -> bool:
    """Whether a tensor is what one of PRODUCTS gives, but for what is done to each number."""
    for _ in range(8):
        node = graph.producer.get(name)
        if node is None or node.op_type in PRODUCTS:
            return node is not None
        if node.op_type not in EACH:
            return False
        name = next((each for each in node.input if not _is_constant(graph, each)), "")
    return False


def _is_constant(graph: Graph, name: str, depth: int = 8) -> bool:
    """Whether a tensor is stored, or made of what is."""
    node = graph.producer.get(name)
    if node is None:
        return name in graph.initializers or not name
    return depth > 0 and all(_is_constant(graph, each, depth - 1) for each in node.input)
