"""Popularities: caps, the recorded shape, drift and bursts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic.summary import gini, total_variation
from megatron_scalemoe.traffic.synthetic_popularity import capped, drifting, recorded_base, with_bursts, zipf


def capped_by_bisection(popularity_E: np.ndarray, topk: int) -> np.ndarray:
    """min(1, c x popularity) for the c that makes it sum to topk."""
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * popularity_E).sum() < topk else (low, middle)
    return np.minimum(1, high * popularity_E)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.floats(0, 4), st.data())
def test_the_cap_spreads_the_excess_in_proportion(experts, exponent, data):
    topk = data.draw(st.integers(1, experts))
    popularity_E = np.random.default_rng(experts).permutation(zipf(experts, exponent))
    np.testing.assert_allclose(capped(popularity_E, topk), capped_by_bisection(popularity_E, topk), rtol=1e-6)


def test_the_recorded_shape_gets_flatter_and_livelier_with_depth():
    base_LE = recorded_base(8, 32, 2)
    np.testing.assert_allclose(base_LE.sum(axis=1), 1)
    ginis = gini(base_LE)
    assert (np.diff(ginis) < 0).all()
    assert ginis[[0, -1]] == pytest.approx([0.92, 0.59], abs=0.005)
    assert (base_LE == 0).sum(axis=1).tolist() == [16, 14, 12, 11, 9, 7, 5, 3]
    assert base_LE.max() <= 0.5 + 1e-12
    assert recorded_base(1, 4, 4).shape == (1, 4)


def test_drift_starts_at_its_base_keeps_the_dead_and_is_bounded_in_the_long_run():
    base_LE = np.stack([zipf(32, 1.0), np.concatenate([zipf(16, 0.5), np.zeros(16)])])
    popularity = drifting(base_LE, 400, np.array([0.02, 0.05]), 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(popularity[0], base_LE)
    np.testing.assert_allclose(popularity.sum(axis=2), 1)
    assert (popularity[:, 1, 16:] == 0).all()
    step = total_variation(popularity[1:], popularity[:-1]).mean(axis=0)
    np.testing.assert_allclose(step, [0.02, 0.05], rtol=2e-3)
    late = total_variation(popularity[300:], popularity[:-300]).mean(axis=0)
    assert (late < 10 * step).all()
    assert (late > 3 * step).all()


def test_noise_is_forgotten_at_the_next_step():
    base_LE = zipf(64, 0.5)[None]
    popularity = drifting(base_LE, 100, np.array([0.05]), 1.0, np.random.default_rng(0))
    far = total_variation(popularity[20:], popularity[:-20]).mean()
    assert far == pytest.approx(0.05, rel=0.05)


def test_a_layer_that_cannot_drift_so_far_is_named():
    base_LE = np.stack([zipf(8, 0.5), [1 - 1e-9, 1e-9, 0, 0, 0, 0, 0, 0]])
    with pytest.raises(ScaleMoEError, match=r"total variation of 0.4 per step\n  found: at most about .* \(layer 1\)"):
        drifting(base_LE, 5, np.array([0.01, 0.4]), 0.0, np.random.default_rng(0))


def test_bursts_are_short_and_leave_a_distribution():
    quiet = np.full((200, 2, 16), 1 / 16)
    popularity = with_bursts(quiet, np.random.default_rng(0))
    np.testing.assert_allclose(popularity.sum(axis=2), 1)
    bursting = popularity[:, 0] > 2 / 16
    lengths = np.diff(np.flatnonzero(np.diff(np.pad(bursting.T, ((0, 0), (1, 1))).ravel().astype(int))))[::2]
    assert 30 <= len(lengths) <= 80
    assert np.median(lengths) == 3
