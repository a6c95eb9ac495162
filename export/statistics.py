"""What calibration says about a graph: the range of each tensor, how loud its rows are, and the covariance of each
layer's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime as ort

from .external import Maker, external_of
from .graph import Graph, attribute, loadable

SEED = 0  # of what is looked at: the same photos give the same graphs
SAMPLES_PER_RUN = 1500  # of each tensor, for its range
POSITIONS_PER_RUN = 96  # of each layer, for its covariance
HELD = 256  # positions that are multiplied together: a decoder's step alone has a few, and large layers much to add to
# Bytes of all covariances. Above, wide layers' inputs are taken in stretches that know nothing of each other, in fp32.
MOST, STRETCH, WHOLE = 4_000_000_000, 2048, 256

Feeds: TypeAlias = Mapping[str, np.ndarray]


@dataclass
class Layer:
    """A Conv, MatMul or Gemm with constant weights, seen as groups of outputs: weights [G, O, K].

    shape: of these; read: makes them of the graph's tensor, each time where that lies outside.
    """

    node: onnx.NodeProto
    shape: tuple[int, int, int]
    read: Maker
    depthwise: bool
    pointwise: bool

    @property
    def weights(self) -> np.ndarray:
        return self.read()

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def input(self) -> str:
        return self.node.input[0]

    def to_tensor(self, weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """[G, O, K] back into the layout of the node's own weight tensor."""
        if self.node.op_type == "Conv":
            return weights.reshape(shape)
        matrix = weights[0] if attribute(self.node, "transB", 0) else weights[0].T
        return matrix.reshape(shape)


def layers_of(graph: Graph) -> list[Layer]:
    """The layers whose weights are constants, in graph order."""
    return [layer for node in graph.graph.node if (layer := layer_of(graph, node)) is not None]


def layer_of(graph: Graph, node: onnx.NodeProto) -> Layer | None:
    """A node as a layer, if it is one whose weights are constants."""
    if node.op_type not in ("Conv", "MatMul", "Gemm") or attribute(node, "transA", 0):
        return None
    name = node.input[1]
    shape = graph.shape(name)
    if shape is None or graph.dtype(name) != np.float32:
        return None
    read = graph.reader(name)
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        seen = (groups, shape[0] // groups, prod(shape[1:]))
        pointwise = prod(shape[2:]) == 1 and groups == 1
        return Layer(node, seen, lambda: read().reshape(seen), groups > 1 and shape[1] == 1, pointwise)
    if len(shape) != 2:
        return None
    if attribute(node, "transB", 0):
        return Layer(node, (1, *shape), lambda: read()[None], False, True)
    return Layer(node, (1, *shape[::-1]), lambda: read().T[None], False, True)


class Statistics:
    """Runs a graph on real inputs and collects, deterministically, what quantization needs.

    tensors: get a range; layers: a covariance of their inputs; peaks: of these tensors, also each row's largest value.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        tensors: Iterable[str],
        layers: list[Layer],
        *,
        peaks: Sequence[str] = (),
    ) -> None:
        self.layers = layers
        self.tensors = list(dict.fromkeys([*tensors, *peaks]))
        wanted = list(dict.fromkeys([*self.tensors, *(layer.input for layer in self.layers)]))
        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        present = {value.name for value in [*probe.graph.output, *probe.graph.input]}
        for name in wanted:
            if name not in present:
                probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        # Optimizing would fuse away the tensors asked for.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session: ort.InferenceSession | None = load(probe, options)
        self.wanted = wanted
        self.random = np.random.default_rng(SEED)
        self.samples: dict[str, list[np.ndarray]] = {name: [] for name in self.tensors}
        self.lows = dict.fromkeys(self.tensors, np.inf)
        self.highs = dict.fromkeys(self.tensors, -np.inf)
        self.peaks: dict[str, list[np.ndarray]] = {name: [] for name in peaks}
        self.moments: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}
        self.held: dict[str, list[np.ndarray]] = {layer.node.output[0]: [] for layer in layers}
        self.offsets: dict[str, np.ndarray] = {}
        self.ranges: dict[tuple[str, str], tuple[float, float]] = {}
        self.runs = 0
        self.stretched = sum(8 * layer.shape[0] * layer.shape[2] ** 2 for layer in layers) > MOST

    def add(self, feeds: Feeds) -> None:
        """One more run of the graph: input name → array. Conv inputs must have batch size 1."""
        self.run([], feeds)

    def run(self, names: list[str], feeds: Feeds) -> list[np.ndarray]:
        """The same, for the graph's outputs of these names; not behind `close`."""
        assert self.session is not None
        asked = list(dict.fromkeys([*(name for name in self.wanted if name not in feeds), *names]))
        values = dict(zip(asked, self.session.run(asked, feeds), strict=True)) | feeds
        for name in self.tensors:
            flat = values[name].reshape(-1)
            self.lows[name] = min(self.lows[name], float(flat.min()))
            self.highs[name] = max(self.highs[name], float(flat.max()))
            self.samples[name].append(flat[self.random.integers(0, flat.size, min(SAMPLES_PER_RUN, flat.size))])
            if name in self.peaks:
                self.peaks[name].append(np.abs(values[name]).max(-1).reshape(-1))
        for layer in self.layers:
            rows = self._rows(layer, values[layer.input])  # [G, P, K]
            key = layer.node.output[0]
            if key not in self.offsets:  # about zero mean: the covariance is no small difference of large sums
                self.offsets[key] = rows.mean(axis=1, keepdims=True)
            self.held[key].append(rows - self.offsets[key])
            if sum(each.shape[1] for each in self.held[key]) >= HELD:
                self._sum(key)
        self.runs += 1
        return [values[name] for name in names]

    def close(self) -> None:
        """No more runs: let go of the engine, which holds the graph's weights. What was seen stays."""
        self.session = None

    def _sum(self, key: str) -> None:
        """Add what is held of a layer's inputs to its moments."""
        rows = np.concatenate(self.held[key], axis=1)
        self.held[key] = []
        count, total, outer = self.moments.get(key, (0, 0.0, 0.0))
        total = total + rows.sum(axis=1, dtype=np.float64)
        product = np.matmul(rows.transpose(0, 2, 1), rows)
        if not self.stretched:
            product = product.astype(np.float64)
        self.moments[key] = (count + rows.shape[1], total, outer + product)

    def _rows(self, layer: Layer, value: np.ndarray) -> np.ndarray:
        """Inputs of the layer at some positions: float32 [G, P, K]."""
        if layer.node.op_type != "Conv":
            rows = value.reshape(-1, value.shape[-1])
            rows = rows[self.random.permutation(len(rows))[:POSITIONS_PER_RUN]]
            if not self.stretched:
                return rows[None]
            return rows.reshape(len(rows), -1, stretch(rows.shape[1])).transpose(1, 0, 2)
        _, channels, height, width = value.shape
        groups = layer.shape[0]
        kernel = attribute(layer.node, "kernel_shape")
        strides = attribute(layer.node, "strides", [1, 1])
        dilations = attribute(layer.node, "dilations", [1, 1])
        pads = attribute(layer.node, "pads", [0, 0, 0, 0])
        if layer.pointwise:
            flat = value[0, :, :: strides[0], :: strides[1]].reshape(channels, -1)
            return flat[:, self.random.permutation(flat.shape[1])[:POSITIONS_PER_RUN]].T[None]
        padded = np.pad(value[0], ((0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        tall = (padded.shape[1] - reach[0]) // strides[0] + 1
        wide = (padded.shape[2] - reach[1]) // strides[1] + 1
        picks = self.random.permutation(tall * wide)[:POSITIONS_PER_RUN]
        top, left = picks // wide * strides[0], picks % wide * strides[1]  # [P]
        ys = top[:, None, None] + np.arange(kernel[0])[None, :, None] * dilations[0]
        xs = left[:, None, None] + np.arange(kernel[1])[None, None, :] * dilations[1]
        patches = padded[:, ys, xs]  # [C, P, kh, kw]
        patches = patches.reshape(groups, channels // groups, len(picks), -1).transpose(0, 2, 1, 3)
        return patches.reshape(groups, len(picks), -1)

    def covariance(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        """Covariance [G, K, K] and mean [G, K] of the layer's inputs; `stretched`, of G stretches of K / G inputs."""
        key = layer.node.output[0]
        if self.held[key]:
            self._sum(key)
        count, total, outer = self.moments[key]
        mean = total / count
        covariance = outer / count - (mean[:, :, None] * mean[:, None, :]).astype(outer.dtype)
        return covariance, mean + self.offsets[key][:, 0]

    def rows(self, layer: Layer) -> int:
        """How many rows of inputs that covariance is of."""
        key = layer.node.output[0]
        return self.moments.get(key, (0,))[0] + sum(each.shape[1] for each in self.held[key])

    def range(self, name: str, *, method: str = "mse") -> tuple[float, float]:
        """The range [low, high] that 256 steps cover with the least squared error (or "minmax"); always includes 0."""
        if (name, method) not in self.ranges:
            self.ranges[name, method] = self._range(name, method)
        return self.ranges[name, method]

    def quietest(self, name: str, share: float = 0.1) -> float:
        """The largest value that this share of a tensor's rows (of `peaks`) does not go beyond; rows of zeros aside."""
        peaks = np.concatenate(self.peaks[name])
        return float(np.quantile(peaks[peaks > 0], share)) if peaks.any() else 0.0

    def _range(self, name: str, method: str) -> tuple[float, float]:
        low, high = min(self.lows[name], 0.0), max(self.highs[name], 0.0)
        if method == "minmax" or high - low == 0:
            return low, high
        values = np.concatenate(self.samples[name])
        if len(values) > 40_000:
            values = values[:: len(values) // 40_000 + 1]
        # Rare extremes the sample missed still count once.
        values = np.concatenate([values, [low, high]]).astype(np.float32)
        best = (np.inf, low, high)
        grid = np.linspace(0.3, 1.0, 29)
        for share in grid:
            best = min(best, (_error(values, low * share, high * share), low * share, high * share))
        for _ in range(2):
            for share in np.linspace(0.85, 1.15, 13):
                low_, high_ = max(best[1] * share, low), best[2]
                best = min(best, (_error(values, low_, high_), low_, high_))
            for share in np.linspace(0.85, 1.15, 13):
                low_, high_ = best[1], min(best[2] * share, high)
                best = min(best, (_error(values, low_, high_), low_, high_))
        return float(best[1]), float(best[2])


def _error(values: np.ndarray, low: float, high: float) -> float:
    """Mean squared error of values rounded to 256 steps between low and high (zero exactly on a step)."""
    scale = max((high - low) / 255, 1e-12)
    zero = round(-low / scale)
    steps = np.clip(np.rint(values / scale), -zero, 255 - zero)
    return float(np.mean((values - steps * scale) ** 2))


def stretch(width: int) -> int:
    """Of so many inputs the most that are taken together: a divisor of the width, whole blocks of weights."""
    sizes = (size for size in range(WHOLE, min(width, STRETCH) + 1, WHOLE) if width % size == 0)
    return max(sizes, default=width)


def load(model: onnx.ModelProto, options: ort.SessionOptions) -> ort.InferenceSession:
    """A graph in ONNX Runtime; one whose weights lie outside is read from files that it maps, and not packed: packed
    weights would be there a second time."""
    if external_of(model) is not None:
        options.add_session_config_entry("session.disable_prepacking", "1")
    with loadable(model) as source:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
