"""Rounding weights to int8 so that a layer's *output* changes least, and so that no x86 kernel can saturate.

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
    damping: float = 0.01,
) -> Rounded:
    """Round float weights [G, O, K] (G groups of O outputs with K inputs each) to int8.

    covariance [G, K, K] and mean [G, K] are of the layer's inputs; None rounds to nearest. damping: share of the mean
    variance added to the diagonal, so that inputs that hardly vary stay well conditioned.
    """
    groups, _, width = weights.shape
    scales = channel_scales(weights, pairs=pairs, floor=floor)  # [G, O]
    left = weights.astype(np.float64).copy()
    whole = np.zeros(weights.shape, np.int8)
    if covariance is None:
        order = np.arange(width)[None].repeat(groups, 0)
        upper = np.eye(width)[None].repeat(groups, 0)
    else:
        order = np.argsort(
            -np.einsum("gkk->gk", covariance), axis=1, kind="stable"
        )  # the inputs that vary most come first
        ranked = np.take_along_axis(np.take_along_axis(covariance, order[:, :, None], 1), order[:, None, :], 2)
        power = np.einsum("gkk->g", ranked)[:, None, None] / width
        # In units of the mean variance; an input that never varied (a dead channel) has none.
        ranked = ranked / np.where(power > 1e-12, power, 1.0) + damping * np.eye(width)
        inverse = np.linalg.inv(ranked)
        upper = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2).transpose(0, 2, 1)  # [G, K, K]
    group = np.arange(groups)
    left = np.take_along_axis(left, order[:, None, :], 2)
    for step in range(width):
        column = left[:, :, step]  # [G, O]
        index = order[:, step]
        value = np.clip(np.rint(column / scales), -127, 127)
        partner = index ^ 1
        if pairs:
            inside = partner < width
            other = np.where(inside[:, None], whole[group, :, np.minimum(partner, width - 1)], 0).astype(
                np.float64
            )  # [G, O]
            room = PAIR_LIMIT - np.where(np.sign(other) == np.sign(value), np.abs(other), 0)
            value = np.clip(value, -room, room)
        whole[group, :, index] = value
        error = (column - value * scales) / upper[:, step, step][:, None]
        left[:, :, step + 1 :] -= error[:, :, None] * upper[:, step, None, step + 1 :]
    real = whole.astype(np.float64) * scales[..., None]
    shift = np.zeros(scales.shape) if mean is None else np.einsum("gok,gk->go", weights - real, mean)
    return Rounded(whole, scales, shift.astype(np.float32))
