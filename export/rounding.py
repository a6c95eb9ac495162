"""Rounding weights to int8 or 4 bits so that a layer's *output* changes least and no x86 kernel can saturate.

Two things ruin 8-bit MobileNets on plain CPUs. Rounding each weight by itself shifts the outputs of depthwise layers;
here each column's error is passed on to the columns not yet rounded, weighted by the inputs' covariance (GPTQ, Frantar
et al. 2022, arXiv:2210.17323), and what is left of the mean goes into the bias (Nagel et al. 2019, arXiv:1906.04721).
And x86 without VNNI multiplies u8 by s8 two at a time into int16 (`vpmaddubsw`): 255·a + 255·b overflows once
a + b > 128. Instead of giving every layer 7 bits, only pairs of neighbours that could overflow are held back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAIR_LIMIT = 128  # 255 · 128 = 32640 < 2^15
NIBBLE = 7  # 4-bit weights are -7..7
MULTIPLIERS = 9  # 7 · 9 = 63: two neighbours stay within PAIR_LIMIT
ROWS, COLUMNS = 2048, 32  # of a layer, rounded together
DAMPING = 0.01  # of the mean variance, added to the diagonal: inputs that hardly vary stay well conditioned


@dataclass(frozen=True)
class Rounded:
    """int8 weights [G, O, K], scales [G, O], and the mean output error Σ (w - wq) E[x] for the bias to take [G, O]."""

    weights: np.ndarray
    scales: np.ndarray
    shift: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """The weights as real numbers, [G, O, K]."""
        return self.weights.astype(np.float32) * self.scales[..., None]


def channel_scales(weights: np.ndarray, *, pairs: bool, floor: np.ndarray | float = 0.0) -> np.ndarray:
    """Symmetric scale of each output channel, [G, O, K] → float32 [G, O].

    pairs: also make room so that no two neighbours along K of one sign exceed PAIR_LIMIT together.
    """
    scale = np.abs(weights).max(axis=-1) / 127
    if pairs and weights.shape[-1] > 1:
        scale = np.maximum(scale, _pair_sums(weights).max(axis=-1) / PAIR_LIMIT)
    scale = np.maximum(scale, floor)
    return np.where(scale > 0, scale, 1.0).astype(np.float32)  # a channel of zeros: any scale will do


def _pair_sums(weights: np.ndarray) -> np.ndarray:
    """Largest same-sign sum of each pair (2i, 2i+1) along K: [..., K] → [..., ceil(K/2)]."""
    if weights.shape[-1] % 2:
        weights = np.concatenate([weights, np.zeros_like(weights[..., :1])], axis=-1)
    two = weights.reshape(*weights.shape[:-1], -1, 2)
    return np.maximum(np.maximum(two, 0).sum(-1), np.maximum(-two, 0).sum(-1))


def worst_pair(quantized: np.ndarray) -> int:
    """The largest same-sign sum of two neighbours along the last axis; above PAIR_LIMIT some x86 may saturate."""
    return int(_pair_sums(quantized.astype(np.int32)).max()) if quantized.size else 0


def round_nearest(weights: np.ndarray, *, pairs: bool = True) -> Rounded:
    """Round each weight to its nearest step, [G, O, K] (no calibration data)."""
    return round_weights(weights, None, None, pairs=pairs)


def round_weights(
    weights: np.ndarray,
    covariance: np.ndarray | None,
    mean: np.ndarray | None,
    *,
    pairs: bool = True,
    floor: np.ndarray | float = 0.0,
    half: bool = False,
) -> Rounded:
    """Round float weights [G, O, K] (G groups of O outputs with K inputs each) to int8.

    covariance [G, K, K] and mean [G, K] are of the layer's inputs; None rounds to nearest. half: only scales that fp16
    holds.
    """
    scales = channel_scales(weights, pairs=pairs, floor=floor)  # [G, O]
    if half:
        scales = _half(scales).astype(np.float32)
    whole = _pass_on(weights, scales[..., None], 127, covariance, pairs=pairs).astype(np.int8)
    return Rounded(whole, scales, _shift(weights, whole * scales[..., None].astype(np.float64), mean))


def round_blocks(
    weights: np.ndarray,
    covariance: np.ndarray | None,
    mean: np.ndarray | None,
    *,
    block: int,
    floor: np.ndarray | float = 0.0,
) -> Rounded:
    """Round float weights [G, O, K] to 4 bits times a whole multiplier for each `block` inputs: int8 all the same.

    The weights returned are q · m with q in -7..7 and m in 1..9, one m for `block` neighbours along K (which it must
    divide), so they run in int8 kernels but can be stored in 4 bits. Other arguments as for `round_weights`.
    """
    groups, outputs, width = weights.shape
    power = np.ones((groups, width)) if covariance is None else np.einsum("gkk->gk", covariance)
    power = (power + DAMPING * power.mean(1, keepdims=True) + 1e-12)[:, None]  # [G, 1, K]
    blocked = weights.reshape(groups, outputs, width // block, block)
    power = power.reshape(groups, 1, width // block, block)
    largest = np.abs(weights).max(axis=-1) / (NIBBLE * MULTIPLIERS)  # [G, O]
    best = np.full(largest.shape, np.inf)
    scales, whole = np.ones_like(largest), np.ones(blocked.shape[:3])
    for share in (1.0, 0.9, 0.8, 0.7, 0.6):
        scale = _half(np.maximum(largest * share, floor))
        error, choice = np.full(blocked.shape[:3], np.inf), np.ones(blocked.shape[:3])
        for multiplier in range(1, MULTIPLIERS + 1):
            step = (scale * multiplier)[..., None, None]
            lost = (blocked - np.clip(np.rint(blocked / step), -NIBBLE, NIBBLE) * step) ** 2
            lost = (lost * power).sum(-1)  # [G, O, blocks]
            choice = np.where(lost < error, multiplier, choice)
            error = np.minimum(error, lost)
        better = error.sum(-1) < best
        best = np.where(better, error.sum(-1), best)
        scales = np.where(better, scale, scales)
        whole = np.where(better[..., None], choice, whole)
    multipliers = whole.repeat(block, axis=-1)  # [G, O, K]
    steps = scales[..., None] * multipliers
    quarters = _pass_on(weights, steps, NIBBLE, covariance)
    rounded = (quarters * multipliers).astype(np.int8)
    return Rounded(rounded, scales.astype(np.float32), _shift(weights, rounded * scales[..., None], mean))


def round_float_blocks(
    weights: np.ndarray,
    covariance: np.ndarray | None,
    *,
    block: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Round float weights [O, K] to -7..7 with an fp16 scale for each `block` inputs: int8 [O, K], [O, K / block].

    covariance: of the inputs [1, K, K], or of S stretches of them [S, K / S, K / S]; errors stay inside a stretch.
    """
    outputs, width = weights.shape
    power = np.ones(width) if covariance is None else np.einsum("skk->sk", covariance).reshape(-1)
    power = (power + DAMPING * power.mean() + 1e-12).reshape(width // block, block)
    scales = np.concatenate([_block_scales(weights[i : i + ROWS], power) for i in range(0, outputs, ROWS)])
    steps = scales.repeat(block, axis=-1)  # [O, K]
    if covariance is None:
        whole = _pass_on(weights[None], steps[None], NIBBLE, None)[0]
    else:
        shape = (outputs, len(covariance), -1)
        apart = [each.reshape(shape).transpose(1, 0, 2) for each in (weights, steps)]  # [S, O, K / S]
        whole = _pass_on(*apart, NIBBLE, covariance).transpose(1, 0, 2).reshape(outputs, width)
    return whole.astype(np.int8), scales.astype(np.float16)


def shrink(covariance: np.ndarray, rows: int) -> np.ndarray:
    """A covariance [G, K, K] of fewer rows than inputs, drawn towards its diagonal by the share of K that rows miss.

    So many combinations of inputs never varied in them, and GPTQ would put all errors there. Of K rows and more it is
    returned as it is.
    """
    kept = rows / covariance.shape[-1]
    if kept >= 1:
        return covariance
    less = covariance * covariance.dtype.type(kept)
    np.einsum("gkk->gk", less)[:] = np.einsum("gkk->gk", covariance)
    return less


def _block_scales(weights: np.ndarray, power: np.ndarray) -> np.ndarray:
    """The scale [O, blocks] of each block with the least error, weights [O, K] and power [blocks, block]."""
    blocked = weights.reshape(len(weights), *power.shape)
    largest = np.abs(blocked).max(axis=-1) / NIBBLE  # [O, blocks]
    best, scales = np.full(largest.shape, np.inf), largest
    for share in np.linspace(1.0, 0.6, 17):
        scale = _half(largest * share)
        step = scale[..., None]
        lost = (blocked - np.clip(np.rint(blocked / step), -NIBBLE, NIBBLE) * step) ** 2
        lost = (lost * power).sum(-1)
        scales = np.where(lost < best, scale, scales)
        best = np.minimum(best, lost)
    return scales


def _half(scale: np.ndarray) -> np.ndarray:
    """The nearest number that fp16 holds, 0 aside."""
    return np.maximum(scale, 2.0**-20).astype(np.float16).astype(np.float64)


def _shift(weights: np.ndarray, real: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    if mean is None:
        return np.zeros(weights.shape[:2], np.float32)
    return np.einsum("gok,gk->go", weights - real, mean).astype(np.float32)


def _pass_on(
    weights: np.ndarray,
    steps: np.ndarray,
    limit: int,
    covariance: np.ndarray | None,
    *,
    pairs: bool = False,
) -> np.ndarray:
    """Weights [G, O, K] in whole steps ([G, O, 1] or [G, O, K]) within ±limit, each column's error passed on (GPTQ)."""
    groups, outputs, width = weights.shape
    steps = np.broadcast_to(steps, weights.shape)
    if covariance is None and not pairs:
        return np.clip(np.rint(weights / steps), -limit, limit)
    if covariance is None:
        order = np.arange(width)[None].repeat(groups, 0)
        upper = None
    else:
        # The inputs that vary most come first.
        order = np.argsort(-np.einsum("gkk->gk", covariance), axis=1, kind="stable")
        ranked = np.take_along_axis(np.take_along_axis(covariance, order[:, :, None], 1), order[:, None, :], 2)
        power = np.einsum("gkk->g", ranked)[:, None, None] / width
        # In units of the mean variance; an input that never varied (a dead channel) has none.
        ranked = ranked / np.where(power > 1e-12, power, 1.0) + DAMPING * np.eye(width)
        inverse = np.linalg.inv(ranked)
        upper = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2).transpose(0, 2, 1)  # [G, K, K]
    whole = np.empty(weights.shape, np.int8)
    for start in range(0, outputs, ROWS):  # outputs know nothing of each other: a few at a time stay in the cache
        rows = slice(start, start + ROWS)
        whole[:, rows] = _pass_on_rows(weights[:, rows], steps[:, rows], limit, order, upper, pairs)
    return whole


def _pass_on_rows(
    weights: np.ndarray, steps: np.ndarray, limit: int, order: np.ndarray, upper: np.ndarray | None, pairs: bool
) -> np.ndarray:
    """Some outputs' weights [G, O, K] in whole steps, column by column in `order` [G, K]; upper: [G, K, K] or None."""
    groups, _, width = weights.shape
    group = np.arange(groups)
    left = np.take_along_axis(weights, order[:, None, :], 2).transpose(0, 2, 1).astype(np.float64)  # [G, K, O]
    whole = np.zeros(left.shape)
    errors = np.zeros((groups, min(COLUMNS, width), left.shape[2]))
    for first in range(0, width, COLUMNS):  # errors reach the columns far behind in one product for a whole block
        last = min(first + COLUMNS, width)
        for done in range(first, last):
            column, index = left[:, done], order[:, done]  # [G, O], [G]
            step = steps[group, :, index]  # [G, O]
            value = np.clip(np.rint(column / step), -limit, limit)
            partner = index ^ 1
            if pairs:
                inside = partner < width
                other = np.where(inside[:, None], whole[group, np.minimum(partner, width - 1)], 0)  # [G, O]
                room = PAIR_LIMIT - np.where(np.sign(other) == np.sign(value), np.abs(other), 0)
                value = np.clip(value, -room, room)
            whole[group, index] = value
            if upper is not None:
                error = (column - value * step) / upper[:, done, done][:, None]
                left[:, done + 1 : last] -= upper[:, done, done + 1 : last, None] * error[:, None]
                errors[:, done - first] = error
        if upper is not None and last < width:
            passed = upper[:, first:last, last:].transpose(0, 2, 1)  # [G, K - last, COLUMNS]
            left[:, last:] -= passed @ errors[:, : last - first]
    return whole.transpose(0, 2, 1)
