"""The simple placements that every other is measured against: contiguous, random, greedy by load, and EPLB's shape.

All but the last return int64 [E], the rank of each expert's home, E/G homes on every rank. `budget` is not needed: all end at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replicas.construct import eplb_shaped
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps


def solve_contiguous(
    problem: LayerProblem, *, rng: np.random.Generator, budget: Budget, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """Megatron's own: expert e on rank e // (E/G)."""
    return contiguous_homes(problem)


def contiguous_homes(problem: LayerProblem) -> np.ndarray:
    """int64 [E]: 0 0 0 1 1 1 2 2 2 ..."""
    return np.repeat(np.arange(problem.num_ranks), problem.homes_per_rank)


def solve_random(
    problem: LayerProblem, *, rng: np.random.Generator, budget: Budget, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """A uniformly random one."""
    return rng.permutation(contiguous_homes(problem))


def solve_greedy(
    problem: LayerProblem, *, rng: np.random.Generator, budget: Budget, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """Longest processing time first (Graham 1969) with E/G experts a rank: heaviest expert first, each on the least loaded rank with room;
    between equally loaded ranks, where its rows need the least time at the in-ports."""
    home_rank_E = np.empty(problem.num_experts, dtype=np.int64)
    load_G, room_G = np.zeros(problem.num_ranks), np.full(problem.num_ranks, problem.homes_per_rank)
    receive_us_EG = _receive_us(problem)
    for e in np.argsort(-problem.load, kind="stable"):
        open_G = np.where(room_G > 0, load_G, np.inf)
        least = np.flatnonzero(open_G == open_G.min())
        home_rank_E[e] = rank = least[receive_us_EG[e, least].argmin()]
        load_G[rank] += problem.load[e]
        room_G[rank] -= 1
    return home_rank_E


def solve_hierarchical(
    problem: LayerProblem, *, rng: np.random.Generator, budget: Budget, progress: Callable[[float], None] | None = None
) -> Solution:
    """EPLB's shape: homes, and replicas where `problem.replicas` asks for them."""
    return eplb_shaped(problem)


def _receive_us(problem: LayerProblem) -> np.ndarray:
    """float64 [E, G]: time of expert e's selections through the in-ports of rank g, if it lived there."""
    ports, counts_EG = problem.ports, problem.traffic.counts.T
    in_node_GN = ports.in_node_GN
    own_node_EG = (counts_EG @ in_node_GN)[:, ports.node_of_rank]
    near_EG, far_EG = own_node_EG - counts_EG, problem.load[:, None] - own_node_EG
    bytes_us = problem.cost.row_bytes / BYTES_PER_US_PER_GBps
    return bytes_us * (near_EG / ports.into.scale_up_GBps + far_EG / ports.to_other_nodes_GBps(ports.into))
