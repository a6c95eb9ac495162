"""A CoreML program read back from its package and computed op by op in torch, because only a Mac runs Core ML.

Every op is computed in fp32 and what it yields is rounded to the type the program declares, so fp16 overflow and
rounding between ops show; what the device's engine does inside an op does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.errors import EdgecapError

WEIGHTS_FOLDER = Path("Data") / "com.apple.CoreML" / "weights"


class Program:
    """The `main` function of an .mlpackage folder, with the two methods of coremltools' MLModel that a session uses.

    weights: (op that reads it, its input's name, value float32 as the engine sees it, the op that stores it) for every
    floating-point constant of 2 or more values, compressed ones widened.
    """

    def __init__(self, package: Path) -> None:
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load_mil_proto

        self.spec = ct.utils.load_spec(str(package))
        weights = str(package / WEIGHTS_FOLDER)
        program = load_mil_proto(self.spec.mlProgram, self.spec.specificationVersion, weights)
        self.main = program.functions["main"]
        self.outputs = [var.name for var in self.main.outputs]
        self.states = {name: var for name, var in self.main.inputs.items() if _is_state(var)}
        self.ops = Counter(op.op_type for op in self.main.operations if not _is_constant(op))
        self._constants: dict[str, Any] = {}
        for op in self.main.operations:
            if _is_constant(op):
                self._constants[op.outputs[0].name] = _torch(_constant(op))
        self._steps = [_step(op) for op in self.main.operations if not _is_constant(op)]

    def weights(self) -> Iterator[tuple[Any, str, np.ndarray, Any]]:
        for op in self.main.operations:
            if _is_constant(op):
                continue
            for name, var in op.inputs.items():
                source = None if var is None or isinstance(var, list | tuple) else var.op
                if source is not None and _is_constant(source):
                    value = _constant(source)
                    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size > 1:
                        yield op, name, value.astype(np.float32), source

    def make_state(self) -> dict[str, Tensor]:
        return {name: torch.zeros(*_state_shape(var)) for name, var in self.states.items()}

    @torch.inference_mode()
    def predict(self, data: dict[str, Any], state: dict[str, Tensor] | None = None) -> dict[str, np.ndarray]:
        """As MLModel.predict: arrays (or a PIL image) by input name → arrays by output name; changes `state`."""
        values = dict(self._constants)
        for name, var in self.main.inputs.items():
            if name in self.states:
                values[name] = _State(state or {}, name)
                continue
            value = np.asarray(data[name])
            if value.dtype == np.uint8:  # an image [H, W, 3] comes to the program as [1, 3, H, W]
                value = value.transpose(2, 0, 1)[None].astype(np.float32)
            if len(value.shape) != len(var.shape):
                raise EdgecapError(f"input {name} has {len(value.shape)} axes, the program wants {len(var.shape)}")
            values[name] = _torch(value)
        for kernel, arguments, results, rounds in self._steps:
            found = kernel(**{key: _pick(values, source) for key, source in arguments.items()})
            for name, value, half in zip(results, found if isinstance(found, tuple) else (found,), rounds, strict=True):
                values[name] = value.half().float() if half else value
        return {name: values[name].numpy() for name in self.outputs}


class _State:
    """One named entry of the state that the caller holds."""

    def __init__(self, held: dict[str, Tensor], name: str) -> None:
        self.held, self.name = held, name


def _is_state(var: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return types.is_state(var._sym_type)


def _state_shape(var: Any) -> tuple[int, ...]:
    return tuple(var._sym_type.wrapped_type().get_shape())


def _is_constant(op: Any) -> bool:
    return op.op_type == "const" or op.op_type.startswith("constexpr_")


def _constant(op: Any) -> Any:
    return op.val.val if op.op_type == "const" else op.materialized_val_inference()


def _torch(value: Any) -> Any:
    """Float arrays as float32 tensors, whole numbers as int64, scalars and texts as Python's own."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    if value.ndim == 0 and value.dtype.kind not in "fiub":
        return value.item()
    kind = {"f": np.float32, "b": np.bool_}.get(value.dtype.kind, np.int64)
    return value.item() if value.ndim == 0 else torch.from_numpy(np.ascontiguousarray(value.astype(kind)))


def _step(op: Any) -> tuple[Callable[..., Any], dict[str, Any], list[str], list[bool]]:
    from coremltools.converters.mil.mil import types

    kernel = KERNELS.get(op.op_type)
    if kernel is None:
        raise EdgecapError(f"the CoreML program has the op {op.op_type}, which edgecap cannot compute on this system")
    arguments = {}
    for name, var in op.inputs.items():
        if var is not None:
            arguments[name] = [v.name for v in var] if isinstance(var, list | tuple) else var.name
    rounds = [not _is_state(var) and var.dtype == types.fp16 for var in op.outputs]
    return kernel, arguments, [var.name for var in op.outputs], rounds


def _pick(values: dict[str, Any], source: Any) -> Any:
    return [values[name] for name in source] if isinstance(source, list) else values[source]


# --- the ops: parameters are named as in the MIL reference ------------------------------------------------------


def _ints(value: Any) -> list[int]:
    return [int(v) for v in (value.reshape(-1) if isinstance(value, Tensor) else np.atleast_1d(np.asarray(value)))]


def _divide(x: Any, y: Any) -> Any:
    whole = not any(v.is_floating_point() if isinstance(v, Tensor) else isinstance(v, float) for v in (x, y))
    return torch.div(torch.as_tensor(x), torch.as_tensor(y), rounding_mode="trunc" if whole else None)


def _cast(x: Any, dtype: str) -> Tensor:
    x = torch.as_tensor(x)
    if dtype in ("fp16", "fp32"):
        return x.float()
    return x.bool() if dtype == "bool" else x.long()


def _conv(x, weight, strides=(1,), pad_type="valid", pad=None, dilations=(1,), groups=1, bias=None):
    if pad_type == "custom":
        before_after = np.reshape(_ints(pad), (-1, 2))
        x = F.pad(x, [int(n) for pair in before_after[::-1] for n in pair])
    elif pad_type != "valid":
        raise EdgecapError(f"the CoreML program pads a convolution by {pad_type!r}, which edgecap cannot compute")
    function = F.conv1d if x.ndim == 3 else F.conv2d
    return function(x, weight, bias, _ints(strides), 0, _ints(dilations), int(groups))


def _batch_norm(x, mean, variance, gamma=None, beta=None, epsilon=1e-5):
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon)


def _layer_norm(x, axes=(-1,), gamma=None, beta=None, epsilon=1e-5):
    return F.layer_norm(x, [x.shape[axis] for axis in _ints(axes)], gamma, beta, epsilon)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _pool(average: bool) -> Callable[..., Tensor]:
    def pool(x, kernel_sizes, strides=None, pad_type="valid", pad=None, exclude_padding_from_average=False, **_):
        sizes = _ints(kernel_sizes)
        before_after = np.reshape(_ints(pad) if pad_type == "custom" else [0] * (2 * len(sizes)), (-1, 2))
        step = _ints(strides) if strides is not None else [1] * len(sizes)
        if (before_after[:, 0] != before_after[:, 1]).any() or pad_type not in ("valid", "custom"):
            raise EdgecapError("the CoreML program pads a pooling unevenly, which edgecap cannot compute")
        padding = before_after[:, 0].tolist()
        if average:
            return F.avg_pool2d(x, sizes, step, padding, count_include_pad=not exclude_padding_from_average)
        return F.max_pool2d(x, sizes, step, padding)

    return pool


def _pad(x, pad, mode="constant", constant_val=0.0):
    pairs = np.reshape(_ints(pad), (-1, 2))
    return F.pad(x, [int(n) for pair in pairs[::-1] for n in pair], mode, constant_val if mode == "constant" else None)


def _gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    if batch_dims:
        raise EdgecapError("the CoreML program gathers within batches, which edgecap cannot compute")
    indices = torch.as_tensor(indices)
    picked = x.index_select(axis, indices.reshape(-1).long())
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis % x.ndim + 1 :]))


def _spans(shape, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    count = len(shape)
    begins, ends = _ints(begin), _ints(end)
    steps = _ints(stride) if stride is not None else [1] * count
    open_begin, open_end, single = (
        _ints(mask) if mask is not None else [0] * count for mask in (begin_mask, end_mask, squeeze_mask)
    )
    return tuple(
        begins[i]
        if single[i]
        else slice(None if open_begin[i] else begins[i], None if open_end[i] else ends[i], steps[i])
        for i in range(count)
    )


def _slice_update(x, update, **spans):
    out = x.clone()
    out[_spans(x.shape, **spans)] = update
    return out


def _split(x, axis, split_sizes=None, num_splits=None):
    if split_sizes is not None:
        return tuple(x.split(_ints(split_sizes), dim=axis))
    return tuple(x.chunk(int(num_splits), dim=axis))


def _concat(values, axis, interleave=False):
    return torch.cat([torch.as_tensor(v).reshape(1) if not getattr(v, "ndim", 0) else v for v in values], dim=axis)


def _reshape(x, shape):
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(_ints(shape))]
    return x.reshape(sizes)


def _squeeze(x, axes=None):
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def _expand_dims(x, axes):
    x = torch.as_tensor(x)
    rank = x.ndim + len(_ints(axes))
    for axis in sorted(a % rank for a in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _matmul(x, y, transpose_x=False, transpose_y=False):
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _attention(query, key, value, attn_mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def _write_state(state: _State, value: Tensor) -> Tensor:
    state.held[state.name] = value
    return value


def _reduce(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def reduce(x, axes=None, keep_dims=False):
        dims = _ints(axes) if axes is not None else list(range(x.ndim))
        return function(x, dim=dims, keepdim=bool(keep_dims))

    return reduce


def _binary(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda x, y: function(torch.as_tensor(x), torch.as_tensor(y))


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(torch.as_tensor(x))


KERNELS: dict[str, Callable[..., Any]] = {
    **{name: _binary(getattr(torch, name)) for name in ("add", "sub", "mul", "pow", "maximum", "minimum")},
    **{name: _binary(getattr(torch, name)) for name in ("less", "less_equal", "greater", "greater_equal", "not_equal")},
    **{name: _binary(getattr(torch, name)) for name in ("logical_and", "logical_or")},
    **{name: _unary(getattr(torch, name)) for name in ("relu", "tanh", "sigmoid", "exp", "sqrt", "square", "abs")},
    "equal": _binary(torch.eq),
    "floor_div": _binary(torch.floor_divide),
    "real_div": _divide,
    "logical_not": _unary(torch.logical_not),
    "relu6": _unary(F.relu6),
    "silu": _unary(F.silu),
    "erf": _unary(torch.erf),
    "rsqrt": lambda x, epsilon=1e-12: torch.rsqrt(x + epsilon),
    "sigmoid_hard": lambda x, alpha=0.2, beta=0.5: torch.clamp(x * alpha + beta, 0, 1),
    "clip": lambda x, alpha, beta: torch.clamp(x, alpha, beta),
    "softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "gelu": _gelu,
    "cast": _cast,
    "identity": lambda x: x,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": _matmul,
    "conv": _conv,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "avg_pool": _pool(average=True),
    "max_pool": _pool(average=False),
    "pad": _pad,
    "gather": _gather,
    "reshape": _reshape,
    "transpose": lambda x, perm: x.permute(_ints(perm)),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "concat": _concat,
    "stack": lambda values, axis: torch.stack([torch.as_tensor(v) for v in values], dim=axis),
    "split": _split,
    "slice_by_index": lambda x, **spans: x[_spans(x.shape, **spans)],
    "slice_update": _slice_update,
    "shape": lambda x: torch.tensor(x.shape),
    "select": lambda cond, a, b: torch.where(torch.as_tensor(cond), a, b),
    "tile": lambda x, reps: x.repeat(_ints(reps)),
    "fill": lambda shape, value=0.0: torch.full(_ints(shape), value),
    "scaled_dot_product_attention": _attention,
    "read_state": lambda input: input.held[input.name],
    "coreml_update_state": _write_state,
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "reduce_max": _reduce(torch.amax),
}
