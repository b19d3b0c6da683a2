"""The alpha-beta fit: exact on exact times, fair to small messages, against a brute-force twin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.alpha_beta import fit_alpha_beta

SIZES = np.array([1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24])


@given(st.floats(0, 1e4), st.floats(1e-3, 1e4))
def test_exact_times_give_their_model_back(alpha_us, bandwidth_GBps):
    fit = fit_alpha_beta(SIZES, alpha_us + SIZES / (bandwidth_GBps * 1e3))
    smallest_us = SIZES[0] / (bandwidth_GBps * 1e3)
    assert fit.alpha_us == pytest.approx(alpha_us, rel=1e-6, abs=1e-6 * smallest_us)
    if alpha_us < 1e3 * SIZES[-1] / (bandwidth_GBps * 1e3):  # else the bytes hardly show
        assert fit.bandwidth_GBps == pytest.approx(bandwidth_GBps, rel=1e-6)
        assert fit.r2 == pytest.approx(1)
    np.testing.assert_allclose(fit.residuals, 0, atol=1e-9)


def relative_error(alpha_us: float, us_per_byte: float, times: np.ndarray) -> float:
    return float((((alpha_us + us_per_byte * SIZES) / times - 1) ** 2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_no_other_line_has_smaller_relative_errors(seed):
    rng = np.random.default_rng(seed)
    times = (rng.uniform(0, 30) + SIZES / (rng.uniform(1, 400) * 1e3)) * rng.uniform(0.7, 1.4, SIZES.size)
    fit = fit_alpha_beta(SIZES, times)
    us_per_byte = 1 / (fit.bandwidth_GBps * 1e3)
    best = relative_error(fit.alpha_us, us_per_byte, times)
    assert best == pytest.approx(sum(r**2 for r in fit.residuals))
    for _ in range(2000):
        alpha, slope = fit.alpha_us * rng.lognormal(0, 0.3) + rng.choice([0, 1e-3]), us_per_byte * rng.lognormal(0, 0.3)
        assert relative_error(alpha, slope, times) >= best - 1e-12


def test_small_messages_count_as_much_as_large_ones():
    """Noise of 5 % on the largest message is more than all of the latency: an unweighted fit would lose it."""
    times = 20 + SIZES / 50e3
    times[-1] *= 1.05
    fit = fit_alpha_beta(SIZES, times)
    assert fit.alpha_us == pytest.approx(20, rel=0.02)
    unweighted = np.polyfit(SIZES, times, 1)
    assert abs(unweighted[1] - 20) > 1


def test_latency_is_never_negative():
    fit = fit_alpha_beta([1000, 2000, 4000], [1.0, 4.0, 16.0])
    assert fit.alpha_us == 0
    assert fit.bandwidth_GBps > 0


def test_times_are_what_the_fit_says():
    fit = fit_alpha_beta([0, 10**6], [5.0, 25.0])
    assert fit.alpha_us == pytest.approx(5)
    assert fit.bandwidth_GBps == pytest.approx(50)


@pytest.mark.parametrize(
    ("sizes", "times", "message"),
    [
        ([8, 16], [1.0, 0.0], "above 0"),
        ([8, 16], [1.0, -2.0], "above 0"),
        ([8, 16], [1.0, np.nan], "above 0"),
        ([8], [1.0], "two different sizes"),
        ([8, 8], [1.0, 2.0], "two different sizes"),
        ([], [], "two different sizes"),
        ([-8, 8], [1.0, 2.0], "two different sizes"),
        ([8, 16], [2.0, 2.0], "did not take longer"),
        ([8, 16], [2.0, 1.0], "did not take longer"),
    ],
)
def test_what_tells_no_bandwidth_is_refused(sizes, times, message):
    with pytest.raises(ScaleMoEError, match=message):
        fit_alpha_beta(np.array(sizes), np.array(times))
