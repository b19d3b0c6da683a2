"""Drawn counts and expected pairs against enumeration and against tokens drawn one by one."""

import itertools

import numpy as np
import pytest

from megatron_scalemoe.traffic.synthetic_draw import draw_counts, expected_coactivation
from megatron_scalemoe.traffic.synthetic_popularity import capped, zipf


def test_counts_have_the_mean_and_spread_of_drawn_tokens():
    chosen_E = capped(zipf(8, 1.0), 2)
    counts = draw_counts(np.tile(chosen_E, (4000, 1)), 50, 2, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 100).all()
    assert counts.max() <= 50
    np.testing.assert_allclose(counts.mean(axis=0), 50 * chosen_E, rtol=0.02)
    # A fixed sum takes some of the binomial spread away, never all of it.
    ratio = counts.std(axis=0) / np.sqrt(50 * chosen_E * (1 - chosen_E))
    assert (ratio < 1.05).all()
    assert (ratio > 0.7).all()


def test_certain_and_impossible_experts_are_respected():
    chosen = np.array([[1.0, 0.0, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0]])
    counts = draw_counts(chosen, 1000, 2, np.random.default_rng(0))
    assert counts[0, :2].tolist() == [1000, 0]
    assert counts[0, 2] + counts[0, 3] == 1000
    assert counts[1].tolist() == [1000, 1000, 0, 0]


def pairs_by_enumeration(chosen_E: np.ndarray, topk: int) -> np.ndarray:
    """Pair probabilities of independent choices given that there are `topk`: all sets, weights fitted to the single probabilities."""
    sets = np.array(list(itertools.combinations(range(chosen_E.size), topk)))
    member = np.zeros((len(sets), chosen_E.size))
    member[np.arange(len(sets))[:, None], sets] = 1
    weight_E = chosen_E.copy()
    for _ in range(3000):
        chance = weight_E[sets].prod(axis=1)
        chance /= chance.sum()
        weight_E *= chosen_E / (chance @ member)
    return (member * chance[:, None]).T @ member


@pytest.mark.parametrize(
    ("experts", "topk", "exponent", "within"), [(8, 2, 0.8, 0.05), (8, 3, 0.8, 0.02), (12, 4, 0.5, 0.01), (10, 5, 0.7, 0.02)]
)
@pytest.mark.parametrize("kinds", [1, 3])
def test_expected_pairs_are_near_those_of_enumeration(experts, topk, exponent, within, kinds):
    rng = np.random.default_rng(experts)
    chosen_XE = np.stack([rng.permutation(capped(zipf(experts, exponent), topk)) for _ in range(kinds)])
    weight_X = rng.uniform(1, 2, kinds)
    load_E = weight_X @ chosen_XE
    ours = expected_coactivation(chosen_XE, weight_X, load_E, topk)
    true = sum(w * pairs_by_enumeration(chosen_E, topk) for w, chosen_E in zip(weight_X, chosen_XE, strict=True))
    assert np.abs(ours - true).sum() <= within * true.sum()
    np.testing.assert_array_equal(ours, ours.T)
    np.testing.assert_array_equal(ours.diagonal(), load_E)
    np.testing.assert_allclose(ours.sum(axis=1), topk * load_E, rtol=1e-3)


def test_experts_without_tokens_have_no_pairs():
    load_E = np.array([10.0, 10.0, 10.0, 0.0])
    pairs = expected_coactivation(np.array([[2 / 3, 2 / 3, 2 / 3, 0.0]]), np.array([15.0]), load_E, 2)
    assert pairs[3].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(pairs[0, 1:3], 5, rtol=1e-3)
