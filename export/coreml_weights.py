"""That a Core ML program holds the torch module's weights: each one found, and as near as its precision allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.errors import EdgecapError

if TYPE_CHECKING:
    from .coreml_program import Program

SMALL = 16  # constants of fewer values are shapes, scales and tiny biases
HALF = 2.0**-11  # what rounding to fp16 may change, relative
TINY = 2.0**-24  # the smallest step of fp16, near 0


def compare_weights(program: Program, module: nn.Module) -> dict[str, Any]:
    """Match every constant of SMALL or more values with a tensor of the traced module and bound the difference.

    exact: torch's value rounded to fp16; rounded: but for its last bit, where the converter folded a BatchNorm; linear:
    8 or 4 bits, within half a step. Returns how many there were of each, and the largest differences.
    Raises EdgecapError for a weight that no tensor explains.
    """
    known = list(_candidates(module))
    seen: dict[str, str] = {}
    figures: dict[str, Any] = {"weights": 0, "exact": 0, "rounded": 0, "linear": 0}
    figures |= {"worst_steps": 0.0, "worst_relative_rms": 0.0}
    for op, name, value, stored in program.weights():
        key = stored.outputs[0].name
        if value.size < SMALL or key in seen or not value.any():  # zeros: a layer without a bias
            continue
        same = (each for each in known if _sizes(each[1]) == _sizes(value))
        near = [(label, known_value.reshape(value.shape)) for label, known_value in same]
        if not near:
            raise _unexplained(op, name, value)
        errors = [float(np.abs(known_value - value).mean()) for _, known_value in near]
        label, expected = near[int(np.argmin(errors))]
        seen[key] = label
        kind, steps = _distance(stored, value, expected)
        if kind is None:
            raise _unexplained(op, name, value)
        figures["weights"] += 1
        figures[kind] += 1
        figures["worst_steps"] = max(figures["worst_steps"], steps)
        spread = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2))) or 1.0
        rms = float(np.sqrt(np.mean((value - expected).astype(np.float64) ** 2))) / spread
        figures["worst_relative_rms"] = max(figures["worst_relative_rms"], rms)
    return figures


def _sizes(value: np.ndarray) -> list[int]:
    """The shape without axes of one."""
    return [size for size in value.shape if size > 1]


def _unexplained(op: Any, name: str, value: np.ndarray) -> EdgecapError:
    return EdgecapError(
        f"the CoreML program's {op.op_type} {op.name} has a {name} {list(value.shape)} that is no weight of the "
        "checkpoint: coremltools changed the model; use another target"
    )


def _distance(stored: Any, value: np.ndarray, expected: np.ndarray) -> tuple[str | None, float]:
    """How a constant differs from torch's tensor: (kind or None where it is another tensor, quantization steps)."""
    off = np.abs(value - expected)
    if stored.op_type == "const":
        half = expected.astype(np.float16).astype(np.float32)
        if np.array_equal(value, half) or np.array_equal(value, expected):
            return "exact", 0.0
        folded = (off <= np.abs(expected) * 2 * HALF + 2 * TINY).all()  # BatchNorm folded in another order of sums
        return ("rounded" if folded else None), 0.0
    scale = _scale(stored, expected.shape)
    # The weight, the scale and their product are each rounded to fp16.
    fits = (off <= scale / 2 + 3 * HALF * np.abs(expected) + 2 * TINY).all()
    return ("linear" if fits else None), float((off / np.maximum(scale, TINY)).max())


def _scale(stored: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The quantization step of each value."""
    scale = stored.scale.val.astype(np.float32)
    if stored.op_type == "constexpr_affine_dequantize":
        axes = [1] * len(shape)
        axes[int(stored.axis.val) if scale.ndim else 0] = scale.size
        return np.broadcast_to(scale.reshape(axes), shape)
    return _spread(scale, shape)


def _spread(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One value a block → one value a weight."""
    for axis, size in enumerate(shape):
        values = values.repeat(size // values.shape[axis], axis=axis)
    return values


def _candidates(module: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the module, matrices also transposed, and convolutions with the BatchNorm behind them folded."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            yield name, _array(tensor)
            if tensor.ndim == 2:
                yield f"{name} transposed", _array(tensor.t())
    before: tuple[str, nn.Module] | None = None
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and before is not None:
            weight, bias = _folded(before[1], layer)
            yield f"{before[0]} folded", _array(weight)
            yield f"{before[0]} folded bias", _array(bias)
        if not list(layer.children()):
            before = (name, layer) if isinstance(layer, nn.Conv2d) else None


def _folded(conv: Any, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        bias = 0 if conv.bias is None else conv.bias.double()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        return weight, (bias - norm.running_mean.double()) * scale + norm.bias.double()


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
