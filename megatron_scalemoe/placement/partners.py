"""How many tokens of each expert can also choose another expert of its group: a bound that holds for every grouping at once.

Expert e of a group has P = sum over its other members f of pairs[e, f]. For any prices a[f] >= 0 and any rate m >= 0,

    P <= (sum of the `others` largest positive pairs[e, f] - m load[f] - a[f]) + m (load of the group - load[e]) + (prices of the
         group - a[e]),

and, summed over the group's members, the prices of the others count `others` x a[e] for each e. So prices keep all experts from
choosing the same few partners (they are the dual of a matching in which each is chosen as often as it chooses), and rates keep the
group's load within its limit. Any prices and rates are valid; good ones are tight.
Suffixes: E logical experts, K rates, A price vectors.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Rates tried for each expert, as parts of (most pairs / mean load), beside 0.
_RATES = (0.03, 0.1, 0.25, 0.6)
_PRICE_STEPS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Partners:
    """rate_K: float64 [K]. gain_AKE: float64 [A, K, E], the bracket above. price_AE: float64 [A, E], what is added for the prices.
    own_E: float64 [E], load that an expert itself takes of its group's limit."""

    rate_K: np.ndarray
    gain_AKE: np.ndarray
    price_AE: np.ndarray
    own_E: np.ndarray

    def most(self, largest_load: float) -> np.ndarray:
        """float64 [E], y: the sum of y over the members of any group with at most this load is no less than the sum of their P."""
        if np.isinf(largest_load):
            bound_AE = self.gain_AKE[:, 0] + self.price_AE
        else:
            room_KE = self.rate_K[:, None] * (largest_load - self.own_E)
            bound_AE = (self.gain_AKE + room_KE).min(axis=1) + self.price_AE
        return np.maximum(bound_AE[bound_AE.sum(axis=1).argmin()], 0.0)


def find_partners(pairs_EE: np.ndarray, load_E: np.ndarray, slots: int, *, fractional: bool, priced: bool) -> Partners:
    """For groups of at most `slots` (> 1) experts. fractional: shares of experts count, so none surely takes a whole place or its load.
    pairs_EE: float [E, E], 0 or more; its diagonal does not count. priced: try prices too, which are good for symmetric pairs."""
    others = min(slots, load_E.size) - 1
    largest, mean_load = pairs_EE.max(), max(load_E.mean(), 1e-300)
    pairs_EE = pairs_EE.copy()
    np.fill_diagonal(pairs_EE, -np.inf)
    rate_K = np.array([0.0, *_RATES]) * (largest / mean_load)
    prices = [np.zeros_like(load_E), *([_matching_prices(pairs_EE, others)] if priced else [])]
    gains = [[_largest_sum(pairs_EE - (a_E + rate * load_E), others) for rate in rate_K] for a_E in prices]
    counted = others + 1 if fractional else others
    return Partners(rate_K, np.array(gains), counted * np.array(prices), np.zeros_like(load_E) if fractional else load_E)


def _matching_prices(pairs_EE: np.ndarray, others: int) -> np.ndarray:
    """float64 [E]: prices near which every expert is chosen `others` times: each moves half way to what it itself would pay for its last
    partner. If `pairs_EE` is symmetric, the fixed point is the optimum; half a dozen steps come within 1 % of it."""
    price_E = np.zeros(pairs_EE.shape[0])
    if others >= pairs_EE.shape[0] - 1:
        return price_E
    for _ in range(_PRICE_STEPS):
        last_two = np.partition(pairs_EE - price_E, -others - 1, axis=1)[:, -others - 1 :]
        last_E = np.partition(last_two[:, 1:], 0, axis=1)[:, 0]
        price_E = 0.5 * (price_E + np.maximum(0.5 * (last_two[:, 0] + last_E), 0.0))
    return price_E


def _largest_sum(values_EE: np.ndarray, count: int) -> np.ndarray:
    """float64 [E]: sum of the positive ones among the `count` largest values of each row."""
    return np.maximum(np.partition(values_EE, -count, axis=1)[:, -count:], 0.0).sum(axis=1)
