"""Percentile bootstrap intervals (Efron 1979) over photos: how far a mean, or a difference of two, can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...runtime.errors import UsageError

CHUNK = 1 << 21  # indices drawn at a time: 16 MB


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds between which `level` of the resampled means fall."""

    mean: float
    low: float
    high: float
    level: float = 0.95

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "level": self.level}


def bootstrap_mean(a: np.ndarray, *, rounds: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Interval of the mean of `a` [photos], resampling photos with replacement `rounds` times. The same seed gives the
    same interval. Raises UsageError for an empty or non-finite array."""
    values = np.asarray(a, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise UsageError(f"a bootstrap needs a non-empty list of finite numbers, got shape {values.shape}")
    if rounds < 1 or not 0 < level < 1:
        raise UsageError(f"a bootstrap needs rounds ≥ 1 and 0 < level < 1, got {rounds} and {level}")
    size = values.size
    random = np.random.default_rng(seed)
    means = np.empty(rounds)
    step = max(1, CHUNK // size)
    for start in range(0, rounds, step):
        stop = min(start + step, rounds)
        means[start:stop] = values[random.integers(0, size, (stop - start, size))].mean(axis=1)  # [rounds, photos]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), level)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, rounds: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of mean(a − b), where a[i] and b[i] are two systems' scores of the same photo: pairing takes out how
    hard the photos are. Raises UsageError when the lengths differ."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise UsageError(f"a paired bootstrap needs scores of the same photos, got shapes {a.shape} and {b.shape}")
    return bootstrap_mean(a - b, rounds=rounds, seed=seed, level=level)
