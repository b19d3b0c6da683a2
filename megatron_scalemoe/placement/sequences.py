"""Which data-parallel rank computes which sequence of a global batch, so that tokens meet their experts at home.

ScaleMoE (Choi et al., PACT'25) moves whole sequences to the device whose experts they choose, and clusters sequences and experts together
with k-modes; NetMoE (Liu et al., ICLR 2025) assigns the samples of each step by linear assignment. Here the set of sequences of an
optimizer step never changes, only who computes which, and every rank computes as many as before: loss and gradients are the same to
rounding.

Suffixes: B sequences of a global batch, D data-parallel ranks, N = B/D sequences per rank, G expert-parallel ranks, K expert-parallel ranks
that share one data-parallel rank (tensor parallelism), L layers, E experts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_scalemoe.placement.transportation import assign_to_bins

# Scores are compared in steps of one millionth.
SCORE_UNIT = 2**20
_ROUNDS = 20


def assign_sequences(score_BG: np.ndarray, ep_ranks_DK: np.ndarray) -> np.ndarray:
    """int64 [B]: the new cell of each sequence. Cell d*N + n is place n of data-parallel rank d; sequence b comes from cell b.

    score_BG: float [B, G] in [0, 1], share of a sequence's selections that expert-parallel rank g hosts.
    ep_ranks_DK: int [D, K], the expert-parallel ranks of each data-parallel rank; its score is their mean. Ranks of several expert-parallel
        groups with the same experts are equally good.

    The sum of scores is the largest possible (to a millionth per sequence); of these assignments, one in which the most sequences stay with
    the experts where they were. Those keep their cell, as long as they may stay on the very rank, so equal scores give the identity. The
    others fill the free cells in order.
    """
    ranks, sequences = ep_ranks_DK.shape[0], score_BG.shape[0]
    assert sequences % ranks == 0, "every data-parallel rank computes the same number of sequences"
    kinds_XK, kind_D = np.unique(np.sort(ep_ranks_DK, axis=1), axis=0, return_inverse=True)
    kind_D = kind_D.reshape(-1)
    score_BX = np.rint(score_BG[:, kinds_XK].mean(axis=2) * SCORE_UNIT).astype(np.int64)
    kind_of_cell_B = np.repeat(kind_D, sequences // ranks)
    kind_B = _assign_staying(score_BX, kind_of_cell_B)
    cell_B = np.arange(sequences)
    for kind in range(len(kinds_XK)):
        come = np.flatnonzero((kind_B == kind) & (kind_of_cell_B != kind))
        cell_B[come] = np.flatnonzero((kind_of_cell_B == kind) & (kind_B != kind))
    return cell_B


def _assign_staying(score_BX: np.ndarray, old_B: np.ndarray) -> np.ndarray:
    """int64 [B]: bins of the largest total score, each bin holding as many as in `old_B`; then of the fewest moves."""
    sequences, bins = score_BX.shape
    weight_BX = score_BX * (sequences + 1)
    weight_BX[np.arange(sequences), old_B] += 1
    return assign_to_bins(weight_BX, np.bincount(old_B, minlength=bins))


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceClusters:
    """Sequences and expert homes chosen for each other.

    rank_B: int64 [B], the expert-parallel rank of each sequence, B/G on each. home_rank_LE: int64 [L, E], E/G on each rank in every layer.
    local_share: the fraction of all selections whose expert's home is on the sequence's rank.
    """

    rank_B: np.ndarray
    home_rank_LE: np.ndarray
    local_share: float


def cluster_sequences(
    counts_BLE: np.ndarray, home_rank_LE: np.ndarray, num_ranks: int, *, seed: int, num_starts: int = 4
) -> SequenceClusters:
    """Clusters of equally many sequences, each with E/G experts per layer as its homes, so that many selections are local.

    counts_BLE: int [B, L, E], how often each sequence chose each expert; B a multiple of the ranks.
    home_rank_LE: int [L, E], today's homes.

    The paper's balanced clustering, its centroid the experts that the cluster chose most: sequences go to the ranks that host their
    experts, experts to the ranks whose sequences chose them, in turn. Both steps are exact assignments, so the local share rises until it
    stands still. Started from today's homes, and `num_starts` times from sequences unlike each other; the best one is returned, so never
    one with a lower local share than today's homes allow. Loads are not evened: that is for replicas, and for the planner to weigh.
    """
    sequences, _, experts = counts_BLE.shape
    assert sequences % num_ranks == 0 and experts % num_ranks == 0
    counts_BLE = counts_BLE.astype(np.int64)
    rng = np.random.default_rng(seed)
    in_order_B = np.repeat(np.arange(num_ranks), sequences // num_ranks)
    best = _alternate(counts_BLE, _assign_staying(_hosted(counts_BLE, home_rank_LE, num_ranks), in_order_B), home_rank_LE, num_ranks)
    for _ in range(num_starts):
        rank_B = _assign_staying(_likeness(counts_BLE, num_ranks, rng), in_order_B)
        clusters = _alternate(counts_BLE, rank_B, _best_homes(counts_BLE, rank_B, home_rank_LE, num_ranks), num_ranks)
        best = max(best, clusters, key=lambda c: c.local_share)
    return best


def _alternate(counts_BLE: np.ndarray, rank_B: np.ndarray, home_rank_LE: np.ndarray, num_ranks: int) -> SequenceClusters:
    """Experts follow sequences and sequences follow experts until neither gains."""
    local = _local(counts_BLE, rank_B, home_rank_LE, num_ranks)
    for _ in range(_ROUNDS):
        new_home_LE = _best_homes(counts_BLE, rank_B, home_rank_LE, num_ranks)
        new_rank_B = _assign_staying(_hosted(counts_BLE, new_home_LE, num_ranks), rank_B)
        new_local = _local(counts_BLE, new_rank_B, new_home_LE, num_ranks)
        if new_local <= local:
            break
        rank_B, home_rank_LE, local = new_rank_B, new_home_LE, new_local
    return SequenceClusters(rank_B, home_rank_LE, local / max(int(counts_BLE.sum()), 1))


def _hosted(counts_BLE: np.ndarray, home_rank_LE: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [B, G]: selections of each sequence whose expert's home is rank g."""
    home_FG = (home_rank_LE.reshape(-1, 1) == np.arange(num_ranks)).astype(np.float64)
    return (counts_BLE.reshape(len(counts_BLE), -1).astype(np.float64) @ home_FG).astype(np.int64)  # exact, and BLAS has no integers


def _local(counts_BLE: np.ndarray, rank_B: np.ndarray, home_rank_LE: np.ndarray, num_ranks: int) -> int:
    return int(_hosted(counts_BLE, home_rank_LE, num_ranks)[np.arange(len(rank_B)), rank_B].sum())


def _best_homes(counts_BLE: np.ndarray, rank_B: np.ndarray, home_rank_LE: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [L, E]: homes with the most local selections for the sequences' ranks; of these, the fewest moves."""
    experts = counts_BLE.shape[2]
    place_rank_E = np.repeat(np.arange(num_ranks), experts // num_ranks)
    counts_GLE = np.stack([counts_BLE[rank_B == rank].sum(axis=0) for rank in range(num_ranks)])
    new_home_LE = np.empty_like(home_rank_LE)
    for layer, old_E in enumerate(home_rank_LE):
        weight_EG = counts_GLE[:, layer].T * (experts + 1) + (old_E[:, None] == np.arange(num_ranks))
        new_home_LE[layer] = place_rank_E[linear_sum_assignment(weight_EG[:, place_rank_E], maximize=True)[1]]
    return new_home_LE


def _likeness(counts_BLE: np.ndarray, num_ranks: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [B, G]: how alike each sequence is to G of them that are unlike each other: the first at random, each next one the farthest."""
    profile_BF = counts_BLE.reshape(len(counts_BLE), -1).astype(np.float64)
    profile_BF = profile_BF - profile_BF.mean(axis=0)
    profile_BF /= np.maximum(np.linalg.norm(profile_BF, axis=1, keepdims=True), 1e-300)
    like_BG = np.empty((len(profile_BF), num_ranks))
    seed = int(rng.integers(len(profile_BF)))
    for rank in range(num_ranks):
        like_BG[:, rank] = profile_BF @ profile_BF[seed]
        seed = int(like_BG[:, : rank + 1].max(axis=1).argmin())
    return np.rint(like_BG * SCORE_UNIT).astype(np.int64)
