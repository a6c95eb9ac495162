"""What samples of time say: percentiles, and ratios between systems with an interval that noise cannot
shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..runtime.errors import UsageError

# What is timed for each photo. preprocess, encode, first_token and next_token × (tokens − 1) make up end_to_end.
STAGES = {
    "preprocess": "JPEG file → uint8 pixels: read, decode, resize",
    "encode": "everything done once per photo before the first token's step: the encoder graph",
    "first_token": "the decoder's first step (BOS and prompt), after encode",
    "ttft": "time to first token: file → logits of the first, which is preprocess, encode and first_token",
    "next_token": "each further token: the decoder's step and the search around it",
    "decode": "everything after encode: first token, further tokens, search",
    "picture_to_text": "a decoded picture of its own size → text: resize, encode, decode",
    "end_to_end": "JPEG file → text, through the same call an app makes",
}


@dataclass(frozen=True)
class Stats:
    """Percentiles of one figure over `runs` samples, in seconds."""

    runs: int
    p50: float
    p90: float
    p99: float
    min: float
    mean: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def stats(samples: Sequence[float]) -> Stats:
    """Summarise times in seconds. Raises UsageError when there are none."""
    if not len(samples):
        raise UsageError("there are no times to summarise")
    values = np.asarray(samples, dtype=np.float64)  # [runs]
    p50, p90, p99 = (float(q) for q in np.percentile(values, (50, 90, 99)))
    return Stats(len(values), p50, p90, p99, float(values.min()), float(values.mean()))


@dataclass(frozen=True)
class Speedup:
    """How many times faster than the baseline (> 1 is faster), with the bounds of its interval."""

    ratio: float
    low: float
    high: float
    rounds: int
    level: float = 0.95

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def speedup(
    baseline: Sequence[float],
    times: Sequence[float],
    *,
    resamples: int = 4000,
    seed: int = 0,
    level: float = 0.95,
) -> Speedup:
    """Baseline's time over this one's, from one time per round each, paired by round.

    The ratio is the geometric mean over rounds. The interval is a bootstrap-t over rounds on the logarithms
    (Efron and Tibshirani 1993, section 12.5): with ten or twenty rounds the plain percentile bootstrap is too
    narrow. Raises UsageError for fewer than two rounds or a time that is not above 0.
    """
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(times, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise UsageError(f"a ratio needs the same rounds, two or more, on both sides, got {a.size} and {b.size}")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        raise UsageError("a ratio needs times above 0")
    logs = np.log(a) - np.log(b)  # [rounds]
    n, mean, error = logs.size, logs.mean(), logs.std(ddof=1) / np.sqrt(logs.size)
    low = high = mean
    if error > 1e-12:
        draws = logs[np.random.default_rng(seed).integers(0, n, (resamples, n))]  # [resamples, rounds]
        errors = draws.std(axis=1, ddof=1) / np.sqrt(n)
        usable = errors > 1e-12  # a draw of one round n times over has no spread to divide by
        t = (draws.mean(axis=1)[usable] - mean) / errors[usable]
        t_low, t_high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
        low, high = mean - t_high * error, mean - t_low * error
    # A handful of very different rounds bounds nothing: say 10⁶ rather than infinity, which JSON cannot hold.
    mean, low, high = np.exp(np.clip([mean, low, high], -np.log(1e6), np.log(1e6)))
    return Speedup(float(mean), float(low), float(high), n, level)
