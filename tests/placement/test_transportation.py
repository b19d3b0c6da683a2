"""Exact transportation against linear assignment with a column per place."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from megatron_scalemoe.placement.transportation import assign_to_bins


def scores(kind: str, items: int, bins: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "ties":
        return rng.integers(0, 3, (items, bins))
    if kind == "one bin wanted":
        return np.rint(1e6 * np.eye(bins)[np.zeros(items, int)] + rng.integers(0, 10, (items, bins))).astype(np.int64)
    if kind == "rank one":
        return np.rint(1e4 * np.outer(rng.random(items), rng.random(bins))).astype(np.int64)
    return rng.integers(-(10**6), 10**6, (items, bins))


@pytest.mark.parametrize("kind", ["ties", "one bin wanted", "rank one", "random"])
def test_as_good_as_linear_assignment(kind):
    rng = np.random.default_rng(0)
    for _ in range(40):
        items, bins = int(rng.integers(1, 60)), int(rng.integers(1, 9))
        capacity_K = rng.multinomial(items, rng.dirichlet(np.ones(bins)))  # some bins have no room at all
        score_BK = scores(kind, items, bins, rng).astype(np.int64)
        bin_B = assign_to_bins(score_BK, capacity_K)
        assert (np.bincount(bin_B, minlength=bins) == capacity_K).all()
        places = np.repeat(np.arange(bins), capacity_K)
        item, place = linear_sum_assignment(score_BK[:, places], maximize=True)
        assert score_BK[np.arange(items), bin_B].sum() == score_BK[item, places[place]].sum()


def test_nothing_to_assign():
    assert assign_to_bins(np.zeros((0, 3), dtype=np.int64), np.zeros(3, dtype=np.int64)).size == 0
