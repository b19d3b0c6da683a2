"""What a placement costs at the ports: the objective of all solvers (`cost.layer`, evaluated in full) for a `LayerProblem`.

Ports stand for links (see `topology/ports.py`): their time never exceeds the time of the links for a flat exchange, and only they
depend on a placement alone. The other exchanges are searched with the same objective; links have the final word on all of them.
Suffixes: G ranks, E logical experts.
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.cost.layer import LayerCost, shares_cost, split_cost
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.plan.placement_plan import EMPTY


def placement_cost(problem: LayerProblem, share_EG: np.ndarray) -> LayerCost:
    """Cost of sending the fraction `share_EG[e, g]` (float, rows sum to 1) of each expert's tokens, from every source alike, to rank g."""
    return shares_cost(share_EG, problem.traffic, problem.ports, _flat(problem.cost))


def solution_cost(problem: LayerProblem, solution: Solution) -> LayerCost:
    """Cost of homes and replicas with the tokens split over them as the runtime does (`split.split_tokens`), sources by sources.

    A source prefers near copies, so the exchange is cheaper than `placement_cost` of the shares alone, which treats all sources alike.
    """
    hosts_EG = solution.hosts
    if (hosts_EG.sum(axis=1) == 1).all():
        return placement_cost(problem, hosts_EG.astype(np.float64))
    return split_cost(slots_of_hosts(hosts_EG), solution.home_rank, hosts_EG, problem.traffic, problem.ports, _flat(problem.cost))


def final_cost_us(problem: LayerProblem, solution: Solution) -> float:
    """As `solution_cost`, of the exchange as it is, on the links where they are known."""
    slots_P = slots_of_hosts(solution.hosts)
    network = problem.links or problem.ports
    return split_cost(slots_P, solution.home_rank, solution.hosts, problem.traffic, network, problem.cost).total_us


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


def _flat(cost: CostModel) -> CostModel:
    return cost if cost.exchange == "flat" else cost.replaced(exchange="flat")
