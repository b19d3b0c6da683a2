"""Drawing of counts and co-activation from the probabilities that a token chooses each expert, without drawing the tokens."""

from __future__ import annotations

import numpy as np


def draw_counts(chosen: np.ndarray, tokens: int, topk: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [..., E]: how many of `tokens` tokens choose each expert.

    chosen: float64 [..., E], the probability that one token chooses each expert; rows sum to `topk`.
    Each count is binomial; then the few tokens by which a row misses `tokens` x `topk` are spread over it in proportion to variance, so
    that rows are exact and no expert has more than `tokens`.
    """
    counts = rng.binomial(tokens, np.clip(chosen, 0.0, 1.0)).reshape(-1, chosen.shape[-1])
    spread = (chosen * (1.0 - chosen) * tokens).reshape(counts.shape)
    wrong = np.arange(len(counts))
    while wrong.size:
        rows = counts[wrong]
        missing = tokens * topk - rows.sum(axis=1)
        wrong, rows, missing = wrong[missing != 0], rows[missing != 0], missing[missing != 0]
        room = np.where(missing[:, None] > 0, rows < tokens, rows > 0)
        # The small number lets experts that are certain, or never chosen, give way when no other can.
        weights = room * (spread[wrong] + 1e-9)
        steps = np.cumsum(weights, axis=1) * (missing / np.maximum(weights.sum(axis=1), 1e-300))[:, None]
        steps[:, -1] = missing
        cuts = np.floor(steps + rng.random((len(rows), 1)))
        cuts[:, -1] = missing
        counts[wrong] = np.clip(rows + np.diff(cuts, axis=1, prepend=0).astype(np.int64), 0, tokens)
    return counts.reshape(chosen.shape)


def expected_coactivation(chosen_XE: np.ndarray, weight_X: np.ndarray, load_E: np.ndarray, topk: int) -> np.ndarray:
    """float64 [E, E]: tokens expected to choose both experts, symmetric; the diagonal is `load_E`.

    chosen_XE: the probability that a token of each kind X chooses each expert; weight_X: how many tokens of the kind there are.
    load_E: the tokens that did choose each expert. Without its diagonal, each row sums to (topk - 1) x load, as it does in any trace
    (to 1e-4 of the largest load; less exactly where an expert takes nearly every token).

    Experts of one token are as independent as their fixed number lets them be: the pair probabilities of conditional Poisson sampling, in
    the approximation of Hajek (1964), p_i p_j (1 - (1 - p_i)(1 - p_j) / sum p (1 - p)), scaled to the row sums.
    """
    variance_XE = chosen_XE * (1.0 - chosen_XE)
    less_X = weight_X / np.maximum(variance_XE.sum(axis=1), 1e-9)
    independent = chosen_XE.T @ (chosen_XE * weight_X[:, None])
    pairs = np.maximum(independent - variance_XE.T @ (variance_XE * less_X[:, None]), 0.02 * independent)
    pairs += pairs.T.copy()
    np.fill_diagonal(pairs, 0.0)
    wanted_E = (topk - 1.0) * load_E
    scale_E = np.sqrt(wanted_E)
    for _ in range(300):
        sums_E = scale_E * (pairs @ scale_E)
        off_E = np.divide(wanted_E, sums_E, out=np.zeros_like(wanted_E), where=sums_E > 0)
        scale_E = scale_E * np.sqrt(off_E)
        if np.abs(sums_E - wanted_E).max() <= 1e-6 * wanted_E.max():
            break
    pairs *= np.outer(scale_E, scale_E)
    # Twelve bits are more than the model is worth, and compress well.
    mantissa, exponent = np.frexp(pairs)
    pairs = np.ldexp(np.round(mantissa * 4096.0) / 4096.0, exponent)
    np.fill_diagonal(pairs, load_E)
    return pairs
