"""The statistics of the bench, on distributions whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgecap.benchmarks.latency import speedup, stats
from edgecap.runtime.errors import UsageError


def test_percentiles_of_a_known_sample() -> None:
    found = stats([k / 1000 for k in range(101)])
    assert found.runs == 101
    assert (found.min, found.p50, found.p90, found.p99) == pytest.approx((0.0, 0.050, 0.090, 0.099))
    assert found.mean == pytest.approx(0.05)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(UsageError, match="no times"):
        stats([])


@pytest.mark.parametrize("rounds", [10, 20])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(rounds: int, noise: float) -> None:
    """Drift that both share must not matter, and 95% must mean about 95%: over 300 experiments, 91 to 99%."""
    random = np.random.default_rng(rounds)
    covered = 0
    for _ in range(300):
        drift = np.exp(np.cumsum(random.normal(0, 0.2, rounds)))  # the machine gets slower and faster
        a = 0.008 * drift * np.exp(random.normal(0, noise, rounds))
        b = 0.005 * drift * np.exp(random.normal(0, noise, rounds))
        found = speedup(a, b, resamples=800)
        covered += found.low <= 1.6 <= found.high
    assert 0.91 <= covered / 300 <= 0.99


def test_pairing_takes_drift_out() -> None:
    drift = np.linspace(1, 10, 20)
    found = speedup(2e-3 * drift, 1e-3 * drift)
    assert (found.low, found.ratio, found.high) == pytest.approx((2, 2, 2))
    assert found.rounds == 20


def test_one_wild_round_widens_the_interval() -> None:
    random = np.random.default_rng(0)
    a, b = 1 + random.normal(0, 0.01, 20), 1 + random.normal(0, 0.01, 20)
    calm = speedup(a, b)
    a[7] = 5.0
    wild = speedup(a, b)
    assert wild.high - wild.low > 3 * (calm.high - calm.low)


def test_too_few_rounds_give_bounds_that_json_can_hold() -> None:
    """Draws of nearly equal rounds divide by almost nothing: the bounds run away, but not to infinity."""
    found = speedup([5.0, 1.0, 1.0 + 1e-9], [1.0, 1.0, 1.0])
    assert 1e-6 <= found.low * (1 + 1e-9) and found.high <= 1e6 * (1 + 1e-9)
    assert found.low < 1e-3 or found.high > 1e3
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_ratios_are_reciprocal() -> None:
    random = np.random.default_rng(1)
    a, b = random.uniform(1, 2, 15), random.uniform(2, 3, 15)
    one, other = speedup(a, b), speedup(b, a)
    assert one.ratio * other.ratio == pytest.approx(1)
    assert one.low < one.ratio < one.high


@pytest.mark.parametrize(
    ("a", "b"), [([1.0], [1.0]), ([1, 2], [1]), ([1, 0], [1, 1]), ([1, np.nan], [1, 1]), ([1, 1], [1, -1])]
)
def test_times_that_make_no_ratio(a: list[float], b: list[float]) -> None:
    with pytest.raises(UsageError, match="a ratio needs"):
        speedup(a, b)
