"""What a placement costs, at the ports: the one objective of all solvers, here evaluated in full.

Ports stand for links (see `topology/ports.py`): their time never exceeds the time of the links for a flat exchange, and only they
depend on a placement alone. The other exchanges are searched with the same objective; links have the final word on all of them.
Suffixes: G ranks, N nodes, E logical experts.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.cost.layer import whole_counts
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.plan.split import split_tokens
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.traffic.matrices import distinct_factor, rows_between_ranks


@dataclasses.dataclass(frozen=True, slots=True)
class PortCost:
    """Cost of one layer in one micro-batch, forward and backward, in microseconds."""

    dispatch_us: float
    combine_us: float
    compute_us: float
    replica_us: float
    total_us: float


def placement_cost(problem: LayerProblem, share_EG: np.ndarray) -> PortCost:
    """Cost of sending the fraction `share_EG[e, g]` (float, rows sum to 1) of each expert's tokens, from every source alike, to rank g."""
    selections_GG = problem.traffic.counts @ share_EG
    rows_GG = selections_GG * distinct_factor(share_EG, problem.traffic) if problem.cost.deduplicate else selections_GG
    return _port_cost(problem, rows_GG, float(selections_GG.sum(axis=0).max()), 0.0)


def _port_cost(problem: LayerProblem, rows_GG: np.ndarray, largest_load: float, price_us: float) -> PortCost:
    cost, bytes_GG = problem.cost, rows_GG * problem.cost.row_bytes
    dispatch_us = 2 * exchange_us(bytes_GG, problem.ports, cost.exchange_overhead_us)
    combine_us = 2 * exchange_us(bytes_GG.T, problem.ports, cost.exchange_overhead_us)
    compute_us = largest_load * cost.compute_us_per_row
    total_us = cost.layer_us(dispatch_us + combine_us, compute_us) + price_us
    return PortCost(dispatch_us, combine_us, compute_us, price_us, total_us)


def solution_cost(problem: LayerProblem, solution: Solution) -> PortCost:
    """Cost of homes and replicas with the tokens split over them as the runtime does (`split.split_tokens`), sources by sources.

    A source prefers near copies, so the exchange is cheaper than `placement_cost` of the shares alone, which treats all sources alike.
    """
    if (solution.hosts.sum(axis=1) == 1).all():
        return placement_cost(problem, solution.hosts.astype(np.float64))
    ports, slots_P = problem.ports, slots_of_hosts(solution.hosts)
    tokens_GP = split_tokens(whole_counts(problem.traffic.counts), slots_P, problem.num_ranks, ports.node_of_rank)
    rows_GG = rows_between_ranks(tokens_GP, slots_P, problem.num_ranks, problem.traffic, problem.cost.deduplicate)
    largest_load = float(tokens_GP.sum(axis=0).reshape(problem.num_ranks, -1).sum(axis=1).max())
    price_us = replica_us(solution.home_rank, solution.hosts, problem.cost, ports)
    return _port_cost(problem, rows_GG, largest_load, price_us)


def slots_of_hosts(hosts_EG: np.ndarray) -> np.ndarray:
    """int64 [P]: a row of slots that holds the copies of bool `hosts_EG`; as many slots for each rank as the fullest one needs."""
    rank, expert = np.nonzero(hosts_EG.T)
    per_rank = np.bincount(rank, minlength=hosts_EG.shape[1])
    slots_GS = np.full((hosts_EG.shape[1], per_rank.max()), EMPTY)
    slots_GS[rank, np.arange(rank.size) - np.searchsorted(rank, rank)] = expert
    return slots_GS.reshape(-1)


def home_cost_us(problem: LayerProblem, home_rank_E: np.ndarray) -> float:
    """`placement_cost(...).total_us` of homes alone, without replicas. home_rank_E: int [E]."""
    return placement_cost(problem, Solution.without_replicas(home_rank_E, problem.num_ranks).hosts.astype(np.float64)).total_us


def exchange_us(bytes_GG: np.ndarray, ports: Ports, overhead_us: float) -> float:
    """Time of one exchange: its busiest port, the largest latency among the pairs that talk, and the fixed overhead."""
    return float(ports.busy_us(bytes_GG).max()) + ports.latency_us(bytes_GG) + overhead_us
