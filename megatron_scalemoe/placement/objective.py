"""What a placement costs, at the ports: the one objective of all solvers, here evaluated in full.

Ports stand for links (see `topology/ports.py`): their time never exceeds the time of the links for a flat exchange, and only they
depend on a placement alone. The other exchanges are searched with the same objective; links have the final word on all of them.
Suffixes: G ranks, N nodes, E logical experts.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.topology.ports import Ports, port_time_us
from megatron_scalemoe.traffic.matrices import distinct_factor


@dataclasses.dataclass(frozen=True, slots=True)
class PortCost:
    """Cost of one layer in one micro-batch, forward and backward, in microseconds."""

    dispatch_us: float
    combine_us: float
    compute_us: float
    replica_us: float
    total_us: float


def placement_cost(
    problem: LayerProblem, share_EG: np.ndarray, hosts_EG: np.ndarray | None = None, home_rank_E: np.ndarray | None = None
) -> PortCost:
    """Cost of sending the fraction `share_EG[e, g]` (float, rows sum to 1) of each expert's tokens, from every source alike, to rank g.

    hosts_EG (bool) and home_rank_E (int): where the copies and the homes are; with both, the replicas' own traffic is paid too.
    """
    cost, ports = problem.cost, problem.ports
    selections_GG = problem.traffic.counts @ share_EG
    rows_GG = selections_GG * distinct_factor(share_EG, problem.traffic) if cost.deduplicate else selections_GG
    bytes_GG = rows_GG * cost.row_bytes
    dispatch_us = 2 * exchange_us(bytes_GG, ports, cost.exchange_overhead_us)
    combine_us = 2 * exchange_us(bytes_GG.T, ports, cost.exchange_overhead_us)
    compute_us = float(selections_GG.sum(axis=0).max()) * cost.compute_us_per_row
    price_us = 0.0
    if hosts_EG is not None and home_rank_E is not None:
        price_us = replica_us(home_rank_E, hosts_EG, cost, ports)
    total_us = cost.layer_us(dispatch_us + combine_us, compute_us) + price_us
    return PortCost(dispatch_us, combine_us, compute_us, price_us, total_us)


def home_cost_us(problem: LayerProblem, home_rank_E: np.ndarray) -> float:
    """`placement_cost(...).total_us` of homes alone, without replicas. home_rank_E: int [E]."""
    return placement_cost(problem, Solution.without_replicas(home_rank_E, problem.num_ranks).hosts.astype(np.float64)).total_us


def exchange_us(bytes_GG: np.ndarray, ports: Ports, overhead_us: float) -> float:
    """Time of one exchange: its busiest port, the largest latency among the pairs that talk, and the fixed overhead."""
    talk_GG = bytes_GG > 0
    np.fill_diagonal(talk_GG, False)
    between_nodes_GG = ports.node_of_rank[:, None] != ports.node_of_rank
    latency_us = 0.0
    if talk_GG.any():
        latency_us = ports.scale_out_latency_us if (talk_GG & between_nodes_GG).any() else ports.scale_up_latency_us
    return port_time_us(bytes_GG, ports) + latency_us + overhead_us
