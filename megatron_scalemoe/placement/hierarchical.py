"""Placement after the shape of DeepSeek's EPLB: experts to nodes, copies of the hottest within each node, copies to ranks.

It looks at loads only and thinks of each expert's tokens as split evenly over its copies. It differs from EPLB where our plans are
stricter: a rank never holds an expert twice, and each has E/G homes. Traces do not name expert groups: every expert is its own group.
Source: DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB), README, "The Algorithm".
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.problem import LayerProblem, Solution


def solve_hierarchical(
    problem: LayerProblem, *, rng: np.random.Generator, deadline: float, progress: Callable[[float], None] | None = None
) -> Solution:
    """Homes, and replicas where `problem.replicas` asks for them (fewer where no rank has room for a further copy).

    Node by node where all nodes have as many ranks, and as many replicas each; otherwise the cluster counts as one node.
    """
    load_E, node_of_rank_G = problem.load, problem.ports.node_of_rank
    ranks_per_node = np.bincount(node_of_rank_G, minlength=problem.ports.num_nodes)
    nodes = problem.ports.num_nodes
    if np.ptp(ranks_per_node) or problem.replicas % nodes:
        nodes, node_of_rank_G = 1, np.zeros_like(node_of_rank_G)
    node_of_E = _pack(load_E, np.arange(load_E.size), nodes, load_E.size // nodes)
    home_rank_E = np.empty(load_E.size, dtype=np.int64)
    hosts_EG = np.zeros((load_E.size, problem.num_ranks), dtype=bool)
    for node in range(nodes):
        experts, ranks = np.flatnonzero(node_of_E == node), np.flatnonzero(node_of_rank_G == node)
        copies = _replicate(load_E[experts], problem.replicas // nodes, most=ranks.size)
        home, hosts = _pack_copies(load_E[experts], copies, ranks.size, problem.homes_per_rank, problem.replica_slots_per_rank)
        home_rank_E[experts] = ranks[home]
        hosts_EG[np.ix_(experts, ranks)] = hosts
    return Solution(home_rank_E, hosts_EG)


def hierarchical_homes(
    problem: LayerProblem, *, rng: np.random.Generator, deadline: float, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """int64 [E]: the homes of `solve_hierarchical`, where another solver starts."""
    return solve_hierarchical(problem, rng=rng, deadline=deadline).home_rank


def _pack(load_X: np.ndarray, items: np.ndarray, bins: int, capacity: int) -> np.ndarray:
    """int64: a bin for each of `items`, heaviest first into the lightest bin with room for one more."""
    bin_of = np.empty(items.size, dtype=np.int64)
    heap = [(0.0, b, 0) for b in range(bins)]
    for i in np.argsort(-load_X[items], kind="stable"):
        weight, b, count = heapq.heappop(heap)
        bin_of[i] = b
        if count + 1 < capacity:
            heapq.heappush(heap, (weight + load_X[items[i]], b, count + 1))
    return bin_of


def _replicate(load_X: np.ndarray, replicas: int, most: int) -> np.ndarray:
    """int64: copies of each expert: one each, then one more of whichever has the largest load a copy (at most `most` copies)."""
    copies_X = np.ones(load_X.size, dtype=np.int64)
    for _ in range(replicas):
        per_copy_X = np.where(copies_X < most, load_X / copies_X, -1.0)
        hottest = per_copy_X.argmax()
        if per_copy_X[hottest] < 0:
            break
        copies_X[hottest] += 1
    return copies_X


def _pack_copies(load_X: np.ndarray, copies_X: np.ndarray, ranks: int, homes: int, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [X] home and bool [X, ranks] hosts: the heaviest copy first, on the lightest rank with room for it and without the expert."""
    expert_of = np.repeat(np.arange(load_X.size), copies_X)
    is_home = np.diff(expert_of, prepend=-1) > 0
    per_copy = (load_X / copies_X)[expert_of]
    home_X, hosts = np.full(load_X.size, -1), np.zeros((load_X.size, ranks), dtype=bool)
    weight_R, home_room_R, replica_room_R = np.zeros(ranks), np.full(ranks, homes), np.full(ranks, replicas)
    # Homes before replicas of the same load: each must find a rank.
    for i in np.lexsort((~is_home, -per_copy)):
        expert, room_R = expert_of[i], home_room_R if is_home[i] else replica_room_R
        free_R = (room_R > 0) & ~hosts[expert]
        if not free_R.any():
            assert not is_home[i]
            continue
        rank = np.where(free_R, weight_R, np.inf).argmin()
        hosts[expert, rank] = True
        weight_R[rank] += per_copy[i]
        room_R[rank] -= 1
        if is_home[i]:
            home_X[expert] = rank
    return home_X, hosts
