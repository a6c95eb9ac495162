"""Rounding: never saturates, never worse than nearest, and exact where int8 can be exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecap.export.rounding import PAIR_LIMIT, round_float_blocks, round_nearest, round_weights, shrink, worst_pair


def inputs(seed: int, groups: int, width: int, count: int = 400) -> np.ndarray:
    """Correlated, mostly positive layer inputs [G, P, K]."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(groups, width, width))
    return np.maximum(random.normal(size=(groups, count, width)) @ mix + 0.5, 0)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = rows.mean(axis=1)
    centred = rows - mean[:, None]
    return centred.transpose(0, 2, 1) @ centred / rows.shape[1], mean


def output_error(weights: np.ndarray, rounded, rows: np.ndarray, *, shift: bool) -> float:
    wanted = np.einsum("gok,gpk->gpo", weights, rows)
    found = np.einsum("gok,gpk->gpo", rounded.real, rows) + (rounded.shift[:, None] if shift else 0)
    return float(((wanted - found) ** 2).mean())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), outputs=st.integers(1, 6), width=st.integers(1, 13), calibrated=st.booleans())
def test_no_pair_of_neighbours_can_saturate_int16(seed: int, outputs: int, width: int, calibrated: bool) -> None:
    random = np.random.default_rng(seed)
    weights = random.standard_t(2, (1, outputs, width))
    statistics = moments(inputs(seed, 1, width)) if calibrated else (None, None)
    rounded = round_weights(weights, *statistics)
    assert worst_pair(rounded.weights) <= PAIR_LIMIT
    assert np.abs(rounded.weights.astype(int)).max() <= 127
    two = rounded.weights[..., : width // 2 * 2].astype(int).reshape(-1, 2)
    for activation in ((255, 255), (255, 0), (0, 255)):  # what vpmaddubsw adds up in int16
        assert np.abs((two * activation).sum(1)).max(initial=0) < 2**15


@pytest.mark.parametrize(("groups", "outputs", "width"), [(1, 24, 32), (16, 1, 9)])
def test_rounding_by_covariance_keeps_outputs_better_than_nearest(groups: int, outputs: int, width: int) -> None:
    weights = np.random.default_rng(1).normal(size=(groups, outputs, width))
    rows = inputs(2, groups, width)
    pairs = groups == 1
    nearest = output_error(weights, round_nearest(weights, pairs=pairs), rows, shift=False)
    clever = output_error(weights, round_weights(weights, *moments(rows), pairs=pairs), rows, shift=True)
    assert clever < 0.6 * nearest


def test_the_shift_takes_the_mean_error_out() -> None:
    weights = np.random.default_rng(1).normal(size=(1, 8, 20))
    rows = inputs(3, 1, 20) + 4
    rounded = round_weights(weights, *moments(rows))
    left = np.einsum("gok,gpk->gpo", weights - rounded.real, rows).mean(axis=1) - rounded.shift
    assert np.abs(left).max() < 1e-5


def test_weights_that_are_int8_already_stay_exact() -> None:
    whole = np.random.default_rng(0).integers(-60, 61, (1, 5, 12))
    whole[:, :, 0] = 127  # the channel's largest: its scale is the grid
    whole[:, :, 1] = 0
    rounded = round_nearest(whole * 0.03125)
    np.testing.assert_array_equal(rounded.weights, whole)
    np.testing.assert_allclose(rounded.real, whole * 0.03125, rtol=1e-6)


def test_dead_inputs_and_channels_of_zeros_do_no_harm() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 2, 9))
    weights[1] = 0
    rows = inputs(0, 3, 9)
    rows[2] = 0.7  # never varies
    rounded = round_weights(weights, *moments(rows))
    assert np.isfinite(rounded.real).all() and np.isfinite(rounded.shift).all()
    assert not rounded.weights[1].any()


def test_a_covariance_of_few_rows_is_drawn_towards_its_diagonal() -> None:
    random = np.random.default_rng(0)
    mix = random.normal(size=(64, 64)) * (0.97 ** np.arange(64))[:, None]
    few, many, other = (random.normal(size=(count, 64)) @ mix for count in (32, 256, 4000))
    weights = random.normal(size=(48, 64))

    def error(covariance: np.ndarray | None) -> float:
        whole, scales = round_float_blocks(weights, covariance, block=16)
        left = weights - whole * scales.repeat(16, axis=1).astype(np.float64)
        return float(((left @ other.T) ** 2).mean())

    raw, enough = moments(few[None])[0], moments(many[None])[0]
    drawn = shrink(raw, 32)
    np.testing.assert_allclose(np.einsum("gkk->gk", drawn), np.einsum("gkk->gk", raw))
    np.testing.assert_allclose(drawn[0, 0, 1:], raw[0, 0, 1:] / 2)
    assert error(drawn) < 0.8 * error(raw) and error(drawn) < 0.95 * error(None)
    assert shrink(raw.astype(np.float32), 32).dtype == np.float32
    assert shrink(enough, 256) is enough and error(enough) < 0.6 * error(None)
