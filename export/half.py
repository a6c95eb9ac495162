"""Pass: store weights as fp16. They are widened once when the graph is loaded, so that no CPU runs slower for it.

ONNX Runtime has next to no fp16 arithmetic on x86: an fp16 graph there is the fp32 graph with a cast around every node.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from .graph import Graph, PassResult

NAME = "fp16_weights"
MIN_SIZE = 64  # smaller constants are scalars and shapes: nothing to gain


def store_half(model: onnx.ModelProto) -> PassResult:
    """Round float32 constants of at least MIN_SIZE values to fp16 and put a Cast behind each.

    A tensor with values beyond fp16's 65504 stays float32.
    """
    graph = Graph(model)
    casts, kept, error = [], 0, 0.0
    for name in sorted(graph.initializers):
        value = graph.constant(name)
        if value.dtype != np.float32 or value.size < MIN_SIZE:
            continue
        half = value.astype(np.float16, casting="same_kind") if np.abs(value).max() <= 65504 else None
        if half is None:
            kept += 1
            continue
        spread = float(np.sqrt(np.mean(value.astype(np.float64) ** 2))) or 1.0
        error = max(error, float(np.sqrt(np.mean((value - half.astype(np.float32)) ** 2.0))) / spread)
        graph.set_constant(f"{name}_fp16", half)
        graph.reroute(name, f"{name}_fp32")
        casts.append(
            helper.make_node("Cast", [f"{name}_fp16"], [f"{name}_fp32"], name=f"{name}_widen", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *model.graph.node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    graph.refresh()
    graph.prune()
    return PassResult(
        NAME, {"min_size": MIN_SIZE}, {"tensors": len(casts), "kept_fp32": kept, "worst_relative_rms": error}
    )
