"""Passes over the vision graph of a SmolVLM, each exact to rounding: what torch's exporter spells out becomes the
operators that have a kernel of their own.

`tidy_vision` leaves standard ONNX; `fuse_vision` asks for ONNX Runtime's own operators (com.microsoft), which take the
biases of the layers before along: attention that never writes its scores to memory, and tanh-GELU. (Not LayerNorm
behind a residual: SkipLayerNormalization takes twice the time of the operators it stands for on a CPU.) Both find what
they look for in a quantized graph, too: there the products are quantized and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from .graph import Graph, PassResult, attribute, op_counts

DOMAIN = "com.microsoft"
HEADS_FIRST, TURNED = [0, 2, 1, 3], [0, 2, 3, 1]  # [N, L, heads, dim] → [N, heads, L, dim] or [N, heads, dim, L]


def tidy_vision(model: onnx.ModelProto) -> PassResult:
    """Fewer standard operators: positions by Gather, the keys of an attention turned once, its scores scaled once."""
    graph = Graph(model)
    before = len(graph.graph.node)
    for kind, tidy in (("GatherND", _gather_rows), ("Softmax", _turn_keys_once)):
        for name in [node.output[0] for node in graph.graph.node if node.op_type == kind]:
            tidy(graph, graph.producer[name])  # by name: each replacement copies the nodes
    graph.prune()
    return PassResult("tidy_vision", cost={"nodes": len(graph.graph.node) - before})


def fuse_vision(model: onnx.ModelProto) -> list[PassResult]:
    """`tidy_vision`, then ONNX Runtime's operators for attention and tanh-GELU; [] where there are none to put in.

    To be run before weights are stored as anything but what the nodes read (`store_half`, `pack`).
    """
    graph = Graph(model)
    if not any(node.op_type in ("Softmax", "Tanh") for node in graph.graph.node):
        return []
    done = tidy_vision(model)
    graph.refresh()
    for kind, fuse in (("Softmax", _attention), ("Tanh", _gelu)):
        for name in [node.output[0] for node in graph.graph.node if node.op_type == kind]:
            fuse(graph, graph.producer[name])
        graph.prune()
    counts = op_counts(model)
    fused = {kind: counts.get(kind, 0) for kind in ("MultiHeadAttention", "FastGelu")}
    if not any(fused.values()):
        return []
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return [done, PassResult("fuse_vision", cost=fused)]


def _gather_rows(graph: Graph, node: onnx.NodeProto) -> None:
    """GatherND of a table's rows by indices [..., 1] → Gather, which copies whole rows."""
    column = graph.producer.get(node.input[1])
    table = graph.constant(node.input[0])
    if table is None or attribute(node, "batch_dims", 0) or column is None or column.op_type != "Unsqueeze":
        return
    axes = graph.constant(column.input[1])
    if axes is None or axes.tolist() != [-1]:
        return
    gather = helper.make_node("Gather", [node.input[0], column.input[0]], [node.output[0]], name=f"{node.name}_rows")
    graph.replace([node], [gather])


def _turn_keys_once(graph: Graph, softmax: onnx.NodeProto) -> None:
    """q·c @ turned(k)·c → q·c² @ Transpose(k), for keys that were turned by way of three dimensions.

    Also drops the Reshape of the mixed values to the shape that they have.
    """
    scores = graph.producer.get(softmax.input[0])
    if scores is None or scores.op_type != "MatMul":
        return
    query, keys = (_unscaled(graph, name) for name in scores.input)
    chain = _chain(graph, keys[0], ("Reshape", "Transpose", "Reshape", "Transpose"))
    if chain and attribute(chain[1], "perm") == [0, 2, 1] and attribute(chain[3], "perm") == HEADS_FIRST:
        name = f"{scores.name}_keys"
        turn = helper.make_node("Transpose", [chain[3].input[0]], [name], name=name, perm=TURNED)
        scale = graph.set_constant(f"{scores.name}_scale", np.float32(query[1] * keys[1]))
        scaled = f"{scores.name}_scaled"
        multiply = helper.make_node("Mul", [query[0], scale], [scaled], name=scaled)
        product = helper.make_node("MatMul", [scaled, name], list(scores.output), name=scores.name)
        graph.replace([scores], [turn, multiply, product])
    mixed = graph.only_reader(softmax.output[0])
    same = graph.only_reader(mixed.output[0]) if mixed is not None and mixed.op_type == "MatMul" else None
    laid_out = _chain(graph, query[0], ("Transpose", "Reshape"))
    if same is not None and same.op_type == "Reshape" and laid_out:
        shapes = [graph.producer.get(node.input[1]) for node in (same, laid_out[1])]
        new, old = (list(node.input) if node is not None and node.op_type == "Concat" else [] for node in shapes)
        if len(new) == len(old) == 4 and [new[0], new[2]] == old[:2]:  # [N, heads, L, dim] and [N, L, heads, dim]
            graph.reroute(same.output[0], same.input[0])
            graph.refresh()


def _attention(graph: Graph, softmax: onnx.NodeProto) -> None:
    """softmax(q·c @ kᵀ) @ v of heads laid out first, and back → MultiHeadAttention of the products without biases."""
    scores, mixed = graph.producer.get(softmax.input[0]), graph.only_reader(softmax.output[0])
    if scores is None or mixed is None or (scores.op_type, mixed.op_type) != ("MatMul", "MatMul"):
        return
    back = graph.only_reader(mixed.output[0])
    flat = graph.only_reader(back.output[0]) if back is not None and _turns(back, HEADS_FIRST) else None
    if mixed.input[0] != softmax.output[0] or flat is None or flat.op_type != "Reshape":
        return
    query, scale = _unscaled(graph, scores.input[0])
    ends = [
        _projected(graph, query, HEADS_FIRST),
        _projected(graph, scores.input[1], TURNED),
        _projected(graph, mixed.input[1], HEADS_FIRST),
    ]
    found = [end for end in ends if end is not None]
    if len(found) < 3 or len({(end.bias.size, end.dim) for end in found}) > 1 or found[0].bias.size % found[0].dim:
        return
    bias = graph.set_constant(f"{softmax.name}_biases", np.concatenate([end.bias for end in found]))
    node = helper.make_node(
        "MultiHeadAttention",
        [*(end.product for end in found), bias],
        [flat.output[0]],
        name=f"{softmax.name}_attention",
        domain=DOMAIN,
        num_heads=found[0].bias.size // found[0].dim,
        scale=float(scale),
    )
    graph.replace([flat], [node])


@dataclass
class _Projected:
    """A projection of an attention: `product` [N, L, width], to which `bias` [width] was added; heads of `dim`."""

    product: str
    bias: np.ndarray
    dim: int


def _projected(graph: Graph, name: str, perm: list[int]) -> _Projected | None:
    chain = _chain(graph, name, ("Transpose", "Reshape", "Add"))
    if not chain or attribute(chain[0], "perm") != perm:
        return None
    shape, added = _last_size(graph, chain[1].input[1]), _biased(graph, chain[2])
    return None if shape is None or added is None else _Projected(added[0], graph.constant(added[1]), shape)


def _gelu(graph: Graph, tanh: onnx.NodeProto) -> None:
    """A tanh-GELU → FastGelu, which adds the bias of the layer before, too."""
    found = _tanh_gelu(graph, tanh)
    if found is not None:
        x, end = found
        added = _biased(graph, graph.producer.get(x))
        inputs = [x] if added is None else list(added)
        node = helper.make_node("FastGelu", inputs, [end.output[0]], name=f"{tanh.name}_gelu", domain=DOMAIN)
        graph.replace([end], [node])


def is_gelu(graph: Graph, name: str) -> bool:
    """Whether a tensor is what a GELU gives, which is nowhere below -0.17."""
    node = graph.producer.get(name)
    if node is None or node.op_type in ("Gelu", "FastGelu"):
        return node is not None
    halves = [_chain(graph, source, ("Mul", "Add", "Tanh")) for source in node.input] if node.op_type == "Mul" else []
    found = [_tanh_gelu(graph, chain[-1]) for chain in halves if chain]
    return any(each is not None and each[1].output[0] == name for each in found)


def _tanh_gelu(graph: Graph, tanh: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
    """x and the last node of x · (0.5 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))), of which `tanh` is part."""
    one = graph.only_reader(tanh.output[0])
    half = graph.only_reader(one.output[0]) if one is not None and one.op_type == "Add" else None
    end = graph.only_reader(half.output[0]) if half is not None and half.op_type == "Mul" else None
    chain = _chain(graph, tanh.input[0], ("Mul", "Add", "Mul", "Pow"))
    if one is None or half is None or end is None or end.op_type != "Mul" or not chain:
        return None
    outer, inner, cubed, power = chain
    x = power.input[0]
    constants = [_scalar(graph, node) for node in (outer, cubed, power, one, half)]
    wanted = (np.sqrt(2 / np.pi), 0.044715, 3.0, 1.0, 0.5)
    if any(value is None or abs(value - right) > 1e-6 for value, right in zip(constants, wanted, strict=True)):
        return None
    if set(inner.input) != {x, cubed.output[0]} or set(end.input) != {x, half.output[0]}:
        return None
    return x, end


def _chain(graph: Graph, name: str, kinds: tuple[str, ...]) -> list[onnx.NodeProto]:
    """The nodes behind `name`, last first, if they are of these kinds along their computed operands; else []."""
    nodes = []
    for kind in kinds:
        node = graph.producer.get(name)
        if node is None or node.op_type != kind:
            return []
        nodes.append(node)
        # Where both operands are computed, as in x + 0.044715·x³, the chain goes on by the one that fits.
        following = [source for source in node.input if source not in graph.initializers]
        wanted = kinds[len(nodes)] if len(nodes) < len(kinds) else None
        fitting = [s for s in following if (p := graph.producer.get(s)) is not None and p.op_type == wanted]
        name = node.input[0] if kind in ("Reshape", "Transpose") else (fitting or following or [""])[0]
    return nodes


def _turns(node: onnx.NodeProto, perm: list[int]) -> bool:
    return node.op_type == "Transpose" and attribute(node, "perm") == perm


def _scalar(graph: Graph, node: onnx.NodeProto) -> float | None:
    """The only constant operand, one number."""
    values = [value for name in node.input if (value := graph.constant(name)) is not None]
    return float(values[0].reshape(())) if len(values) == 1 and values[0].size == 1 else None


def _unscaled(graph: Graph, name: str) -> tuple[str, float]:
    """What a Mul by one number multiplies, and the number; else the tensor itself and 1."""
    node = graph.producer.get(name)
    if node is not None and node.op_type == "Mul" and (value := _scalar(graph, node)) is not None:
        return next(source for source in node.input if graph.constant(source) is None), value
    return name, 1.0


def _biased(graph: Graph, node: onnx.NodeProto | None) -> tuple[str, str] | None:
    """The two operands of an Add of a computed tensor and a bias [width]."""
    if node is None or node.op_type != "Add":
        return None
    for x, bias in (node.input, reversed(node.input)):
        value = graph.constant(bias)
        if value is not None and value.ndim == 1 and graph.constant(x) is None:
            return x, bias
    return None


def _last_size(graph: Graph, shape: str) -> int | None:
    """The last entry of a Reshape's shape, where that is a constant."""
    value = graph.constant(shape)
    node = graph.producer.get(shape)
    if value is None and node is not None and node.op_type == "Concat":
        value = graph.constant(node.input[-1])
    return int(value[-1]) if value is not None and value.size and value[-1] > 0 else None
