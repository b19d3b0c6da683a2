"""Placement after the shape of DeepSeek's EPLB: experts to nodes, copies of the hottest within each node, copies to ranks.

It looks at loads only and thinks of each expert's tokens as split evenly over its copies. It differs from EPLB where our plans are
stricter: a rank never holds an expert twice, and each has E/G homes. Traces do not name expert groups: every expert is its own group.
Source: DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB), README, "The Algorithm".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replicas.replicate_start import balanced_homes, packed_replicas


def solve_hierarchical(
    problem: LayerProblem, *, rng: np.random.Generator, deadline: float, progress: Callable[[float], None] | None = None
) -> Solution:
    """Homes, and replicas where `problem.replicas` asks for them. See `eplb_shaped`."""
    return eplb_shaped(problem)


def hierarchical_homes(
    problem: LayerProblem, *, rng: np.random.Generator, deadline: float, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """int64 [E]: the homes of `solve_hierarchical`, where another solver starts."""
    return eplb_shaped(problem).home_rank


def eplb_shaped(problem: LayerProblem) -> Solution:
    """Homes and replicas (fewer than asked for, where no rank has room for a further copy).

    Node by node where all nodes have as many ranks, and as many replicas each; otherwise the cluster counts as one node.
    """
    load_E, node_of_rank_G = problem.load, problem.ports.node_of_rank
    ranks_per_node = problem.ports.node_sizes
    nodes = problem.ports.num_nodes
    if np.ptp(ranks_per_node) or problem.replicas % nodes:
        nodes, node_of_rank_G = 1, np.zeros_like(node_of_rank_G)
    node_of_E = balanced_homes(load_E, nodes)
    home_rank_E = np.empty(load_E.size, dtype=np.int64)
    hosts_EG = np.zeros((load_E.size, problem.num_ranks), dtype=bool)
    for node in range(nodes):
        experts, ranks = np.flatnonzero(node_of_E == node), np.flatnonzero(node_of_rank_G == node)
        inside = packed_replicas(
            load_E[experts], ranks=ranks.size, replicas=problem.replicas // nodes, per_rank=problem.replica_slots_per_rank
        )
        home_rank_E[experts] = ranks[inside.home_rank]
        hosts_EG[np.ix_(experts, ranks)] = inside.hosts
    return Solution(home_rank_E, hosts_EG)
