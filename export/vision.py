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

from .gelu import fuse_gelu
from .graph import DOMAIN, Graph, PassResult, attribute, op_counts, use_domain
from .patterns import biased, chain, last_size, unscaled

HEADS_FIRST, TURNED = [0, 2, 1, 3], [0, 2, 3, 1]  # [N, L, heads, dim] → [N, heads, L, dim] or [N, heads, dim, L]


def tidy_vision(model: onnx.ModelProto) -> PassResult:
    """Fewer standard operators: positions by Gather, the keys of an attention turned once, its scores scaled once."""
    graph = Graph(model)
    before = len(graph.graph.node)
    for kind, tidy in (("GatherND", _gather_rows), ("Softmax", _turn_keys_once)):
        for name in [node.output[0] for node in graph.graph.node if node.op_type == kind]:
            tidy(graph, graph.producer[name])  # by name: each replacement copies the nodes
    graph.prune()
    return PassResult("tidy_vision", cost={"nodes_before": before, "nodes_after": len(graph.graph.node)})


def fuse_vision(model: onnx.ModelProto) -> list[PassResult]:
    """`tidy_vision`, then ONNX Runtime's operators for attention and tanh-GELU; of these two what changed anything.

    To be run before weights are stored as anything but what the nodes read (`store_half`, `pack`).
    """
    graph, before = Graph(model), op_counts(model)
    if "Softmax" not in before and "Tanh" not in before:
        return []
    tidied = tidy_vision(model)
    done = [tidied] if op_counts(model) != before else []
    graph.refresh()
    for kind, fuse in (("Softmax", _attention), ("Tanh", fuse_gelu)):
        for name in [node.output[0] for node in graph.graph.node if node.op_type == kind]:
            fuse(graph, graph.producer[name])
        graph.prune()
    after = op_counts(model)
    fused = {kind: after.get(kind, 0) - before.get(kind, 0) for kind in ("MultiHeadAttention", "FastGelu")}
    if any(fused.values()):
        use_domain(model)
        done.append(PassResult("fuse_vision", cost=fused))
    return done


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
    query, keys = (unscaled(graph, name) for name in scores.input)
    turns = chain(graph, keys[0], ("Reshape", "Transpose", "Reshape", "Transpose"))
    if turns and attribute(turns[1], "perm") == [0, 2, 1] and attribute(turns[3], "perm") == HEADS_FIRST:
        name = f"{scores.name}_keys"
        turn = helper.make_node("Transpose", [turns[3].input[0]], [name], name=name, perm=TURNED)
        scale = graph.set_constant(f"{scores.name}_scale", np.float32(query[1] * keys[1]))
        scaled = f"{scores.name}_scaled"
        multiply = helper.make_node("Mul", [query[0], scale], [scaled], name=scaled)
        product = helper.make_node("MatMul", [scaled, name], list(scores.output), name=scores.name)
        graph.replace([scores], [turn, multiply, product])
    mixed = graph.only_reader(softmax.output[0])
    same = graph.only_reader(mixed.output[0]) if mixed is not None and mixed.op_type == "MatMul" else None
    laid_out = chain(graph, query[0], ("Transpose", "Reshape"))
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
    query, scale = unscaled(graph, scores.input[0])
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
    made = chain(graph, name, ("Transpose", "Reshape", "Add"))
    if not made or attribute(made[0], "perm") != perm:
        return None
    shape, added = last_size(graph, made[1].input[1]), biased(graph, made[2])
    return None if shape is None or added is None else _Projected(added[0], graph.constant(added[1]), shape)


def _turns(node: onnx.NodeProto, perm: list[int]) -> bool:
    return node.op_type == "Transpose" and attribute(node, "perm") == perm
