"""Clustering: experts that the same tokens choose, or the same sources, live together; then loads are evened by swaps.

ScaleMoE (Choi et al., PACT'25, section on dynamic expert clustering) clusters sequences by the experts that they chose, k-modes with a
cluster for each device. A trace has no sequences, only what they leave behind: co-activation and source counts. So here experts are
clustered, by k-means on their co-activation beyond chance (modularity, so that popular experts do not attract everybody), in clusters of
fixed size: each step is a linear assignment of experts to places. First experts to groups of a rank's size, then groups to nodes, then
each node's groups to its ranks.
Suffixes: G ranks, and groups; N nodes, E logical experts, X the items and B the bins of one clustering.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solvers.baselines import solve_greedy
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

_STEPS = 8
# Source counts differ more than a draw of the tokens would make them differ.
_LOCALITY = 2.0
_SWAPS_PER_RANK = 6


def solve_clustering(
    problem: LayerProblem, *, rng: np.random.Generator, deadline: float, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """int64 [E] home ranks. Without co-activation (or deduplication) and without locality of the sources: the greedy balance.

    deadline: a `time.monotonic()` value; clustering stops improving there.
    """
    deduplicated = problem.cost.deduplicate and problem.traffic.topk > 1 and problem.traffic.coactivation is not None
    local = _has_locality(problem)
    if not deduplicated and not local:
        return solve_greedy(problem, rng=rng, deadline=deadline)
    if problem.num_ranks == 1:
        return np.zeros(problem.num_experts, dtype=np.int64)
    counts_GE, ports = problem.traffic.counts, problem.ports
    pairs_EE = _beyond_chance(problem.traffic.coactivation) if deduplicated else np.zeros((problem.num_experts,) * 2)
    counts_EG = counts_GE.T - counts_GE.mean(axis=0)[:, None] if local else np.zeros((problem.num_experts, problem.num_ranks))
    in_node_GN = ports.in_node_GN
    # What comes from the own rank stays there; what comes from the own node at least stays inside it.
    near_EG = counts_EG + (counts_EG @ in_node_GN)[:, ports.node_of_rank]
    group_E = _cluster(pairs_EE, near_EG, np.full(problem.num_ranks, problem.homes_per_rank), rng, deadline)
    in_group_EG = (group_E[:, None] == np.arange(problem.num_ranks)).astype(np.float64)
    pairs_GG, group_counts_GG = in_group_EG.T @ pairs_EE @ in_group_EG, in_group_EG.T @ counts_EG
    np.fill_diagonal(pairs_GG, 0.0)
    node_of_group = _cluster(pairs_GG, group_counts_GG @ in_node_GN, in_node_GN.sum(axis=0).astype(np.int64), rng, deadline)
    rank_of_group = np.empty(problem.num_ranks, dtype=np.int64)
    for node in range(ports.num_nodes):
        groups, ranks = np.flatnonzero(node_of_group == node), np.flatnonzero(ports.node_of_rank == node)
        rank_of_group[groups] = ranks[linear_sum_assignment(group_counts_GG[np.ix_(groups, ranks)], maximize=True)[1]]
    return _even_out(problem, rank_of_group[group_E], deduplicated, deadline)


def _has_locality(problem: LayerProblem) -> bool:
    """Whether source ranks differ in what they choose, by chi-square per degree of freedom of their counts."""
    counts_GE, steps = problem.traffic.counts, problem.traffic.loads.shape[0]
    expected_GE = counts_GE.sum(axis=1, keepdims=True) * problem.load / max(problem.load.sum(), 1e-300)
    square = ((counts_GE - expected_GE) ** 2 / np.maximum(expected_GE, 1e-300)).sum() * steps
    return bool(square > _LOCALITY * counts_GE.size)


def _beyond_chance(coactivation_EE: np.ndarray) -> np.ndarray:
    """float64 [E, E]: co-activation less what two experts with that many partners would have by chance (Newman's modularity)."""
    degree_E = coactivation_EE.sum(axis=1)
    beyond_EE = coactivation_EE - np.outer(degree_E, degree_E) / max(degree_E.sum(), 1e-300)
    np.fill_diagonal(beyond_EE, 0.0)
    return beyond_EE


def _cluster(pairs_XX: np.ndarray, local_XB: np.ndarray, capacity_B: np.ndarray, rng: np.random.Generator, deadline: float) -> np.ndarray:
    """int64 [X]: a bin for each item, capacity_B[b] items in bin b, by k-means whose distance is the affinity to a bin's members."""
    if capacity_B.size == 1:
        return np.zeros(local_XB.shape[0], dtype=np.int64)
    place_bin = np.repeat(np.arange(capacity_B.size), capacity_B)
    affinity_XB, best_X, best = pairs_XX[:, _seeds(pairs_XX, capacity_B.size, rng)] + local_XB, None, -np.inf
    for _ in range(_STEPS):
        expert, place = linear_sum_assignment(affinity_XB[:, place_bin], maximize=True)
        bin_X = np.empty(expert.size, dtype=np.int64)
        bin_X[expert] = place_bin[place]
        member_XB = (bin_X[:, None] == np.arange(capacity_B.size)).astype(np.float64)
        with_bin_XB = pairs_XX @ member_XB
        score = float((member_XB * (0.5 * with_bin_XB + local_XB)).sum())
        if score <= best:
            break
        best_X, best = bin_X, score
        affinity_XB = with_bin_XB + local_XB
        if time.monotonic() > deadline:
            break
    return best_X


def _seeds(pairs_XX: np.ndarray, bins: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [B]: items with strong partners, each the least attached to the seeds before it; the first is drawn at random."""
    strength_X = np.maximum(pairs_XX, 0.0).sum(axis=1)
    seeds = [int(rng.choice(np.argsort(-strength_X, kind="stable")[:bins]))]
    attached_X = np.maximum(pairs_XX[seeds[0]], 0.0)
    for _ in range(bins - 1):
        free_X = strength_X - 2.0 * attached_X
        free_X[seeds] = -np.inf
        seeds.append(int(free_X.argmax()))
        attached_X = attached_X + np.maximum(pairs_XX[seeds[-1]], 0.0)
    return np.array(seeds)


def _even_out(problem: LayerProblem, home_rank_E: np.ndarray, deduplicated: bool, deadline: float) -> np.ndarray:
    """Swaps an expert of the slowest rank with one elsewhere while the slower of the two ranks gets faster. A rank's time: its compute, and
    its rows through its own ports. A swap that loses more by spoiling clusters than it gains in balance is not taken."""
    home_rank_E, ranks = home_rank_E.copy(), problem.num_ranks
    time_EG, pair_us_G = _expert_times(problem, deduplicated)
    pairs_EE = problem.traffic.coactivation if deduplicated else np.zeros((problem.num_experts,) * 2)
    member_EG = (home_rank_E[:, None] == np.arange(ranks)).astype(np.float64)
    with_rank_EG = pairs_EE @ member_EG
    time_G = (member_EG * (time_EG - 0.5 * pair_us_G * with_rank_EG)).sum(axis=0)
    for _ in range(_SWAPS_PER_RANK * ranks):
        slow = int(time_G.argmax())
        e, f = np.flatnonzero(home_rank_E == slow)[:, None], np.flatnonzero(home_rank_E != slow)[None, :]
        to = home_rank_E[f]
        slow_us = time_G[slow] + time_EG[f, slow] - time_EG[e, slow]
        slow_us = slow_us - pair_us_G[slow] * (with_rank_EG[f, slow] - with_rank_EG[e, slow] - pairs_EE[e, f])
        other_us = time_G[to] + time_EG[e, to] - time_EG[f, to]
        other_us = other_us - pair_us_G[to] * (with_rank_EG[e, to] - with_rank_EG[f, to] - pairs_EE[e, f])
        slower = np.maximum(slow_us, other_us)
        i, k = np.unravel_index(slower.argmin(), slower.shape)
        if slower[i, k] >= time_G[slow] * (1 - 1e-9) or time.monotonic() > deadline:
            break
        gone, come, rank = int(e[i, 0]), int(f[0, k]), int(to[0, k])
        time_G[slow], time_G[rank] = slow_us[i, k], other_us[i, k]
        change_E = pairs_EE[come] - pairs_EE[gone]
        with_rank_EG[:, slow] += change_E
        with_rank_EG[:, rank] -= change_E
        home_rank_E[gone], home_rank_E[come] = rank, slow
    return home_rank_E


def _expert_times(problem: LayerProblem, deduplicated: bool) -> tuple[np.ndarray, np.ndarray]:
    """float64 [E, G]: us that expert e adds to rank g on its own; float64 [G]: us that a token saves there which two experts share."""
    ports, counts_EG, cost = problem.ports, problem.traffic.counts.T, problem.cost
    in_node_GN = ports.in_node_GN
    own_node_EG = (counts_EG @ in_node_GN)[:, ports.node_of_rank]
    near, far = own_node_EG - counts_EG, problem.load[:, None] - own_node_EG
    inside = 1 / ports.into.scale_up_GBps + 1 / ports.out.scale_up_GBps
    outside = 1 / ports.into.scale_out_GBps + 1 / ports.out.scale_out_GBps
    is_far_G = (far.sum(axis=0) * outside >= near.sum(axis=0) * inside)[None]
    drawn_EG = np.where(is_far_G, far, near)
    us_G = 2 * cost.row_bytes / BYTES_PER_US_PER_GBps * np.where(is_far_G[0], outside, inside)
    single, pair = 1.0, 0.0
    if deduplicated:
        pairs = 0.5 * problem.traffic.coactivation.sum() / problem.num_ranks / max(problem.load.sum() / problem.num_ranks, 1e-300)
        r = min(1 + int(2 * pairs / problem.num_ranks), problem.traffic.topk - 1)
        single, pair = 2 / (r + 1), 2 / (r * (r + 1))
    part_G = drawn_EG.sum(axis=0) / max(problem.load.sum(), 1e-300)
    return problem.load[:, None] * cost.compute_us_per_row + single * us_G * drawn_EG, pair * us_G * part_G
