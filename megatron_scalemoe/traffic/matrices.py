"""Who sends how many rows to whom: selections, distinct rows and shares, from the tokens that each rank sends to each slot.

A selection is a (token, chosen expert) pair. A token with several chosen experts on one rank travels there once, as one row:
rows = selections x `distinct_factor` of the destination, the same for all sources.
Suffixes: G ranks, N nodes, E logical experts, P slots, X groups of experts.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from megatron_scalemoe.traffic.trace import LayerTraffic

# Beyond this the trace's file and the planner's copies of it get heavy.
COACTIVATION_BYTES = 64 * 2**20
# Numbers up to which dense products are quicker than sparse ones. (Beyond, they also wait for BLAS threads on a busy machine.)
SMALL = 2**10


def coactivation_fits(num_layers: int, num_experts: int) -> bool:
    """Whether a trace of this size has co-activation unless asked otherwise: 8 x layers x experts^2 bytes, at most 64 MiB."""
    return 8 * num_layers * num_experts**2 <= COACTIVATION_BYTES


def distinct_factor(share_EX: np.ndarray, traffic: LayerTraffic) -> np.ndarray:
    """float64 [X]: distinct rows per selection of each group of experts, from 1/topk to 1 (1 where nothing is selected).

    share_EX: float [E, X], the fraction of each expert's tokens that go to each group (a rank or a node).

    With co-activation: the sharp lower bound on a union from the sums of its single and pair probabilities (Dawson and Sankoff 1967),
    over at most topk events; exact for top-2. Without: the experts of a token are taken as independent.
    """
    load_E = traffic.counts.sum(axis=0)
    selections_X = load_E @ share_EX
    if traffic.topk == 1 or not selections_X.any():
        return np.ones(share_EX.shape[1])
    safe_X = np.where(selections_X > 0, selections_X, 1.0)
    if traffic.coactivation is None:
        tokens = load_E.sum() / traffic.topk
        missed_X = np.prod(1.0 - np.minimum(1.0, share_EX * (load_E / tokens)[:, None]), axis=0)
        factor_X = tokens * (1.0 - missed_X) / safe_X
    else:
        pairs_X = _pairs_inside(share_EX, traffic.coactivation) / safe_X
        # The bound is the largest over r = 1..topk-1; it grows with r up to this one.
        r_X = np.clip(1.0 + np.floor(2.0 * pairs_X), 1, traffic.topk - 1)
        factor_X = 2.0 / (r_X + 1.0) * (1.0 - pairs_X / r_X)
    return np.where(selections_X > 0, np.clip(factor_X, 1.0 / traffic.topk, 1.0), 1.0)


def _pairs_inside(share_EX: np.ndarray, coactivation_EE: np.ndarray) -> np.ndarray:
    """float64 [X]: tokens with two chosen experts in the group, counted once per pair."""
    if share_EX.size <= SMALL:
        return 0.5 * np.einsum("ex,ex->x", coactivation_EE @ share_EX, share_EX)
    # Large shares are nearly empty: an expert is on few ranks.
    group, expert = np.nonzero(share_EX.T)
    share = share_EX[expert, group]
    share_XE = csr_array((share, (group, expert)), shape=share_EX.shape[::-1])
    with_group = (share_XE @ coactivation_EE)[group, expert]
    return 0.5 * np.bincount(group, weights=share * with_group, minlength=share_EX.shape[1])


def share_of_slots(tokens_GP: np.ndarray, slots_P: np.ndarray, num_ranks: int, num_experts: int) -> np.ndarray:
    """float64 [E, G]: the fraction of each expert's tokens that go to each rank; 0 for experts without tokens."""
    used_P = slots_P >= 0
    rank_P = np.repeat(np.arange(num_ranks), slots_P.size // num_ranks)
    cell = slots_P[used_P] * num_ranks + rank_P[used_P]
    tokens_EG = np.bincount(cell, weights=tokens_GP.sum(axis=0)[used_P], minlength=num_experts * num_ranks).reshape(num_experts, num_ranks)
    return tokens_EG / np.maximum(tokens_EG.sum(axis=1, keepdims=True), np.finfo(float).tiny)


def selections_between_ranks(tokens_GP: np.ndarray, num_ranks: int) -> np.ndarray:
    """[G, G], of the type of `tokens_GP`: selections from rank i (row) to the slots of rank j (column). The diagonal stays on its rank."""
    return tokens_GP.reshape(tokens_GP.shape[0], num_ranks, -1).sum(axis=2)


def rows_between_ranks(
    tokens_GP: np.ndarray, slots_P: np.ndarray, num_ranks: int, traffic: LayerTraffic, deduplicate: bool = True
) -> np.ndarray:
    """float64 [G, G]: rows from rank i to rank j, one per (token, rank), or one per selection without `deduplicate`.

    tokens_GP: int or float [G, P], the tokens of each source rank that go to each slot (the output of `split.split_tokens`).
    slots_P: int [P], the expert in each slot, or EMPTY.
    """
    selections_GG = selections_between_ranks(tokens_GP, num_ranks).astype(np.float64)
    if not deduplicate:
        return selections_GG
    share_EG = share_of_slots(tokens_GP, slots_P, num_ranks, traffic.counts.shape[1])
    return selections_GG * distinct_factor(share_EG, traffic)


def rows_to_nodes(tokens_GP: np.ndarray, slots_P: np.ndarray, node_of_rank_G: np.ndarray, traffic: LayerTraffic) -> np.ndarray:
    """float64 [G, N]: rows from rank i to node n, one per (token, node) however many ranks of the node it visits."""
    num_ranks = node_of_rank_G.size
    in_node_GN = (node_of_rank_G[:, None] == np.arange(node_of_rank_G.max() + 1)).astype(np.float64)
    selections_GN = selections_between_ranks(tokens_GP, num_ranks) @ in_node_GN
    share_EN = share_of_slots(tokens_GP, slots_P, num_ranks, traffic.counts.shape[1]) @ in_node_GN
    return selections_GN * distinct_factor(share_EN, traffic)
