"""Pass: a decoder whose KV cache is written in place, by ONNX Runtime's GroupQueryAttention.

torch exports a past that every run concatenates with the new keys and values, and repeats for grouped queries: all of
the cache is copied twice at each step. GroupQueryAttention takes one buffer as past and as present and writes what is
new alone (docs/ContribOperators.md of ONNX Runtime). The pass comes last, behind quantization, which leaves what lies
between the projections as it is: calibration, OpenVINO and the others keep reading the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info

from ..runtime.errors import EdgecapError
from .graph import DOMAIN, Graph, PassResult, attribute, use_domain

NAME = "kv_cache_in_place"
FILLED = "filled"  # the graph's new input, int32 []: the positions that hold keys and values when the run is done
BEFORE, ROWS, LAST = "cache/before", "cache/rows", "cache/last"
COS, SIN = "cache/cos", "cache/sin"
WHOLE = 8  # what the operator asks of a head's size
WHOLE_ROTARY = 16  # and where it turns queries and keys itself
COMPARISONS = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal")
SAME_RANK = {"MatMul", "MatMulNBits", "QuantizeLinear", "DequantizeLinear", "Add", "Sub", "Mul", "Div", "Cast", "Clip"}
SAME_RANK |= {"Split", "LayerNormalization", "RMSNormalization", "Identity", "Concat"}
SAME_RANK |= {"SkipSimplifiedLayerNormalization"}


@dataclass(frozen=True)
class _Layer:
    """One attention over the cache. query, key, value: [rows, heads, length, size], what is new of them.

    keys, values: the roles' entries. groups: query heads to one of keys. merged: the Reshape that ends in
    [rows, length, heads · size], or in two dimensions.
    """

    attention: NodeProto
    keys: dict[str, Any]
    values: dict[str, Any]
    query: str
    key: str
    value: str
    groups: int
    merged: NodeProto


def share_cache(model: onnx.ModelProto, session: dict[str, Any]) -> tuple[dict[str, Any], list[PassResult]]:
    """Rewrite a traced decoder in place; returns its session roles and what was done.

    Each pair of past and present becomes one buffer [rows, heads, capacity, dim], to be bound as both. The new input
    `filled`, which the role "cache" names, counts positions, those of the run included; more than one position behind
    others can be read in one row at a time only. A decoder without a cache stays as it is, and so does one whose heads
    are of a size that the operator does not take. Raises EdgecapError for attention other than torch exports it.
    """
    if not session.get("kv"):
        return session, []
    size = session["kv"][0]["dim"]
    if size % WHOLE:
        left = f"heads of size {size}, which are no multiple of {WHOLE}"
        return session, [PassResult(NAME, cost={"left as it is": left})]
    graph = Graph(model)
    layers = _layers(graph, session["kv"])
    front = _counting(graph, session)
    table = _table(graph, layers, size, session["positions"])
    gone = {entry["output"] for layer in layers for entry in (layer.keys, layer.values)}
    new = {layer.attention.output[0]: _attend(graph, layer, inside=bool(table)) for layer in layers}
    gone |= {layer.merged.output[0] for layer in layers if _is_flat(graph, layer.merged)}
    nodes = [*front, *table]
    for node in model.graph.node:
        name = node.output[0]
        nodes += new.get(name, [] if name in gone else [node])
    graph.set_nodes(nodes)
    _free(graph, session["kv"])
    _declare(model, session)
    return {**session, "cache": {"filled": FILLED}}, [
        PassResult(NAME, {"positions": session["positions"]}, {"layers": len(layers), "rotary inside": bool(table)})
    ]


def _unknown(what: str) -> EdgecapError:
    return EdgecapError(f"{NAME}: {what}; it knows attention over a cache as torch exports it at opset 23")


# --- finding ----------------------------------------------------------------------------------------


def _layers(graph: Graph, entries: list[dict[str, Any]]) -> list[_Layer]:
    """The attentions that read the cache, in the order of the roles."""
    # An attention's output → which of its inputs is read → the role's entry, what is new, how often heads are repeated.
    found: dict[str, dict[int, tuple[dict[str, Any], str, int]]] = {}
    for entry in entries:
        concat = graph.producer.get(entry["output"])
        if concat is None or concat.op_type != "Concat" or concat.input[0] != entry["input"] or len(concat.input) != 2:
            raise _unknown(f"{entry['output']} is not {entry['input']} with what is new behind it")
        attention, place, groups = _reader(graph, entry["output"])
        found.setdefault(attention.output[0], {})[place] = (entry, concat.input[1], groups)
    layers = []
    for output, read in found.items():
        attention = graph.producer[output]
        if set(read) != {1, 2} or read[1][2] != read[2][2] or any(attention.input[4:]):
            raise _unknown(f"{output} does not come of the keys and values of one cache")
        _check_causal(graph, attention)
        (keys, key, groups), (values, value, _) = read[1], read[2]
        merged = _merged(graph, output)
        layers.append(_Layer(attention, keys, values, attention.input[0], key, value, groups, merged))
    return layers


def _reader(graph: Graph, present: str) -> tuple[NodeProto, int, int]:
    """The Attention that reads a present, as which input, and how often it repeats each head."""
    name, groups = present, 1
    readers = graph.consumers.get(present, [])
    if len(readers) == 1 and readers[0].op_type == "Unsqueeze":  # [rows, heads, 1, length, size], repeated, flattened
        expand = graph.only_reader(readers[0].output[0])
        shape = graph.producer.get(expand.input[1]) if expand is not None and expand.op_type == "Expand" else None
        repeats = graph.constant(shape.input[2]) if shape is not None and len(shape.input) == 5 else None
        flat = graph.only_reader(expand.output[0]) if expand is not None else None
        if repeats is None or repeats.size != 1 or flat is None or flat.op_type != "Reshape":
            raise _unknown(f"{present} is repeated for its query heads in another way")
        name, groups = flat.output[0], int(repeats.reshape(()))
        readers = graph.consumers.get(name, [])
    if len(readers) != 1 or readers[0].op_type != "Attention":
        kinds = ", ".join(sorted({each.op_type for each in readers})) or "nothing"
        raise _unknown(f"{present} is read by {kinds} instead of one Attention")
    return readers[0], list(readers[0].input).index(name), groups


def _check_causal(graph: Graph, attention: NodeProto) -> None:
    """The mask hides what comes later and nothing else: it compares positions once."""
    compared, seen = [], set()
    stack = [name for name in attention.input[3:4] if name]
    while stack:
        node = graph.producer.get(stack.pop())
        if node is not None and node.output[0] not in seen:
            seen.add(node.output[0])
            stack += node.input
            compared += [node.op_type] if node.op_type in COMPARISONS else []
    if attribute(attention, "is_causal", 0) or compared not in (["LessOrEqual"], ["GreaterOrEqual"]):
        raise _unknown(f"the mask of {attention.output[0]} is not that of causal attention")


def _merged(graph: Graph, name: str) -> NodeProto:
    """The Reshape behind an attention that puts its heads side by side."""
    kinds = []
    node = graph.only_reader(name)
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        kinds.append(node.op_type)
        if kinds[-2:] == ["Transpose", "Reshape"]:
            return node
        node = graph.only_reader(node.output[0])
    raise _unknown(f"the heads of {name} are not put side by side")


def _is_flat(graph: Graph, merged: NodeProto) -> bool:
    """Whether a Reshape ends in [rows, length, heads · size], which the operator gives by itself."""
    return _length(graph, merged.input[1]) == 3


def _length(graph: Graph, shape: str) -> int | None:
    """How many dimensions the second input of a Reshape has."""
    fixed, parts = graph.constant(shape), graph.producer.get(shape)
    if fixed is not None:
        return int(fixed.size)
    return len(parts.input) if parts is not None and parts.op_type == "Concat" else None


def _projection(graph: Graph, heads: str) -> tuple[str, list[NodeProto]]:
    """[rows, heads, length, size] → the name of the [rows, length, heads · size] it was cut from, and what makes it."""
    turn = graph.producer.get(heads)
    turned = turn is not None and turn.op_type == "Transpose" and attribute(turn, "perm") == [0, 2, 1, 3]
    view = graph.producer.get(turn.input[0]) if turn is not None and turned else None
    if view is None or view.op_type != "Reshape":
        raise _unknown(f"{heads} was not cut into heads from a projection")
    if _rank(graph, view.input[0]) == 3:
        return view.input[0], []
    shape = graph.set_constant("cache/side_by_side", np.array([0, 0, -1]))
    rows = f"{view.output[0]}_rows"
    return rows, [make_node("Reshape", [view.output[0], shape], [rows], name=rows)]


def _rank(graph: Graph, name: str) -> int | None:
    """The rank of a tensor of the decoder, where what it was made of tells it."""
    while True:
        node = graph.producer.get(name)
        if node is None:
            declared = [value for value in graph.graph.input if value.name == name]
            return len(declared[0].type.tensor_type.shape.dim) if declared else None
        if node.op_type in SAME_RANK:  # that of the first input that is computed: constants are a layer's weights
            name = next((each for each in node.input if each not in graph.initializers), "")
        elif node.op_type == "Reshape":
            return _length(graph, node.input[1])
        else:
            return 2 if node.op_type == "Gemm" else None


def _turned(graph: Graph, heads: str) -> NodeProto | None:
    """The RotaryEmbedding that made the heads, if one did."""
    node = graph.producer.get(heads)
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


# --- changing ---------------------------------------------------------------------------------------


def _counting(graph: Graph, session: dict[str, Any]) -> list[NodeProto]:
    """What makes of `filled` and the shapes of ids and prefix: the positions before the run [1], the number of rows
    [1], and for the operator the last position of each row [rows]."""
    one = graph.set_constant("cache/one", np.array([1], np.int32))
    flat = graph.set_constant("cache/flat", np.array([-1]))
    ids, new = session["ids"]["input"], "cache/new"
    nodes = [make_node("Shape", [ids], [new], name=new, start=1, end=2)]
    if "prefix" in session:
        seen, new = session["prefix"]["input"], "cache/all_new"
        nodes.append(make_node("Shape", [seen], ["cache/seen"], name="cache/seen", start=1, end=2))
        nodes.append(make_node("Add", ["cache/new", "cache/seen"], [new], name=new))
    return [
        *nodes,
        make_node("Cast", [FILLED], ["cache/wide"], name="cache/wide", to=TensorProto.INT64),
        make_node("Reshape", ["cache/wide", flat], ["cache/filled"], name="cache/filled"),
        make_node("Sub", ["cache/filled", new], [BEFORE], name=BEFORE),
        make_node("Shape", [ids], [ROWS], name=ROWS, start=0, end=1),
        make_node("Sub", [FILLED, one], ["cache/end"], name="cache/end"),
        make_node("Expand", ["cache/end", ROWS], [LAST], name=LAST),
    ]


def _table(graph: Graph, layers: list[_Layer], size: int, positions: int) -> list[NodeProto]:
    """What makes the cosines and sines [positions, size / 2] by which the operator turns queries and keys: once, when
    the graph is loaded. Nothing where nothing is turned, or by nodes that it cannot take the place of."""
    found = {_frequencies(graph, _turned(graph, name)) for layer in layers for name in (layer.query, layer.key)}
    name = found.pop() if len(found) == 1 else None
    if not name or size % WHOLE_ROTARY or any(_turned(graph, layer.value) for layer in layers):
        return []
    frequencies = graph.constant(name)
    if frequencies is None or frequencies.size * 2 != size:
        return []
    ends = {"cache/first": 0, "cache/positions": positions, "cache/step": 1}
    shape = graph.set_constant("cache/column", np.array([-1, 1]))
    row = graph.set_constant("cache/frequencies", frequencies.reshape(-1))
    return [
        *(make_node("Constant", [], [name], name=name, value_int=value) for name, value in ends.items()),
        make_node("Range", list(ends), ["cache/range"], name="cache/range"),
        make_node("Cast", ["cache/range"], ["cache/real"], name="cache/real", to=TensorProto.FLOAT),
        make_node("Reshape", ["cache/real", shape], ["cache/places"], name="cache/places"),
        make_node("Mul", ["cache/places", row], ["cache/angles"], name="cache/angles"),
        make_node("Cos", ["cache/angles"], [COS], name=COS),
        make_node("Sin", ["cache/angles"], [SIN], name=SIN),
    ]


def _frequencies(graph: Graph, rotary: NodeProto | None) -> str | None:
    """The constant by which a RotaryEmbedding's positions are multiplied, if that is all that makes its angles and the
    positions are those of the sequence."""
    if rotary is None or len(rotary.input) != 3:
        return None
    if attribute(rotary, "interleaved", 0) or attribute(rotary, "rotary_embedding_dim", 0):
        return None
    cos, sin = (graph.producer.get(name) for name in rotary.input[1:])
    if cos is None or sin is None or (cos.op_type, sin.op_type) != ("Cos", "Sin") or cos.input[0] != sin.input[0]:
        return None
    angles = graph.producer.get(cos.input[0])
    if angles is None or angles.op_type != "Mul" or angles.input[1] not in graph.initializers:
        return None
    node = graph.producer.get(angles.input[0])
    while node is not None and node.op_type in ("Unsqueeze", "Cast", "Expand"):
        node = graph.producer.get(node.input[0])
    kinds = {each.op_type for name in node.input if (each := graph.producer.get(name))} if node is not None else set()
    counted = node is not None and node.op_type == "Add" and kinds in ({"Range", "Squeeze"}, {"Range", "Reshape"})
    return angles.input[1] if counted else None


def _attend(graph: Graph, layer: _Layer, *, inside: bool) -> list[NodeProto]:
    """The operator in the place of an Attention and its two Concats. inside: it turns queries and keys itself."""
    nodes: list[NodeProto] = []
    heads = (layer.groups * layer.keys["heads"], layer.keys["heads"])
    names = []
    for name, count in ((layer.query, heads[0]), (layer.key, heads[1]), (layer.value, heads[1])):
        rotary = _turned(graph, name)
        rows, made = _projection(graph, rotary.input[0] if rotary is not None else name)
        nodes += made
        if rotary is not None and not inside:
            turned = f"{name}_rows"
            known = {"interleaved": attribute(rotary, "interleaved", 0), "num_heads": count}
            if partial := attribute(rotary, "rotary_embedding_dim", 0):
                known["rotary_embedding_dim"] = partial
            nodes.append(make_node("RotaryEmbedding", [rows, *rotary.input[1:]], [turned], name=turned, **known))
            rows = turned
        names.append(rows)
    split = graph.producer.get(names[0])
    if split is not None and split.op_type == "Split" and list(split.output) == names:  # it reads the three as one
        names = [split.input[0], "", ""]
    merged = layer.merged
    flat = _is_flat(graph, merged)
    result = merged.output[0] if flat else f"{merged.output[0]}_rows"
    if not flat:
        merged.input[0] = result
    settings = {name: attribute(layer.attention, name, 0.0) for name in ("scale", "softcap")}
    nodes.append(
        make_node(
            "GroupQueryAttention",
            [*names, layer.keys["input"], layer.values["input"], LAST, FILLED, *([COS, SIN] if inside else [])],
            [result, layer.keys["output"], layer.values["output"]],
            name=layer.attention.name,
            domain=DOMAIN,
            num_heads=heads[0],
            kv_num_heads=heads[1],
            do_rotary=int(inside),
            **{name: value for name, value in settings.items() if value},
        )
    )
    return nodes


def _free(graph: Graph, entries: list[dict[str, Any]]) -> None:
    """Let nothing but the operator read the buffers: what counted them reads what has been counted instead."""
    for entry in entries:
        for node in graph.consumers.get(entry["input"], []):
            if node.op_type == "Shape":
                start, end = (attribute(node, name) for name in ("start", "end"))
                counted = {(0, 1): ROWS, (2, 3): BEFORE}.get((start, end))
                if counted is not None:
                    graph.reroute(node.output[0], counted)
    graph.refresh()
    graph.prune()
    for entry in entries:
        others = {node.op_type for node in graph.consumers[entry["input"]]} - {"GroupQueryAttention"}
        if others:
            raise _unknown(f"{entry['input']} is read by {', '.join(sorted(others))}, too")


def _declare(model: onnx.ModelProto, session: dict[str, Any]) -> None:
    """The new input, and that past and present have one shape."""
    model.graph.input.append(make_tensor_value_info(FILLED, TensorProto.INT32, []))
    names = {name for entry in session["kv"] for name in (entry["input"], entry["output"])}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in names:
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"
    use_domain(model)
