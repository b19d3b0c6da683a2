"""A lower bound on what any placement of a layer costs (`objective.solution_cost(...).total_us`), shown only where it is tight.

Closed form: the largest load of a rank, at least; and what must pass the busiest port, with each expert at its best place, on average and
by the pigeonhole principle (one of G ranks holds two of the G+1 heaviest experts ...). Deduplication and replicas make it loose, as they
are bounded roughly; then it is not worth a line.
Suffixes: G ranks, N nodes, E logical experts, X ports of one kind.
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.topology.ports import PortSide
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

# A gap above this says more about the bound than about the placement.
TIGHT = 0.05
# A layer without tokens has a bound of about 1e-9 us.
_NOTHING_US = 1e-6


def gap_to(lower_bound_us: float | None, cost_us: float) -> float | None:
    """How far a cost is above a lower bound, as a share of the bound; 0 where there is next to nothing to do. None where the bound is not
    tight (`TIGHT`), or None itself.

    With few tokens it may be a little below 0: the cost is of mean counts made whole, the bound of the means themselves.
    """
    if lower_bound_us is None:
        return None
    gap = cost_us / lower_bound_us - 1 if lower_bound_us > _NOTHING_US else 0.0
    return gap if gap <= TIGHT else None


def lower_bound_us(problem: LayerProblem) -> float:
    """A cost in us that no placement (with at most `problem.replicas` replicas, and any split of the tokens over them) can beat.

    With replicas: they are free, and whatever a source can keep on its own rank or node stays there. For the exchanges 1dh and 2dh only
    compute counts.
    """
    cost = problem.cost
    compute_us = cost.compute_us_per_row * (_least_copy_load(problem) if problem.replicas else _least_largest_load(problem))
    if cost.exchange != "flat":
        return cost.layer_us(0.0, compute_us)
    rows_per_selection = _least_rows_per_selection(problem)
    us_per_GBps = rows_per_selection * cost.row_bytes / BYTES_PER_US_PER_GBps
    ports = problem.ports
    communication_us = 4 * (cost.exchange_overhead_us + (ports.scale_out_latency_us if _must_cross_nodes(problem) else 0.0))
    for experts, sources in ((ports.into, ports.out), (ports.out, ports.into)):
        communication_us += 2 * us_per_GBps * _busiest_selections(problem, experts, sources)
    return cost.layer_us(communication_us, compute_us)


def _least_rows_per_selection(problem: LayerProblem) -> float:
    """From 1/topk to 1: a token's experts share a row where they share a rank."""
    slots, topk = problem.homes_per_rank + problem.replica_slots_per_rank, problem.traffic.topk
    return 1 / min(topk, slots) if problem.cost.deduplicate else 1.0


def _busiest_selections(problem: LayerProblem, experts_GBps: PortSide, sources_GBps: PortSide) -> float:
    """Selections per GB/s of the busiest port, at least: ports on the experts' side, and on the sources'."""
    counts_GE, load_E, node_G = problem.traffic.counts, problem.load, problem.ports.node_of_rank
    counts_NE = problem.ports.in_node_GN.T @ counts_GE
    near_EG = np.maximum((counts_NE[node_G] - counts_GE).T, 0.0)
    far_EN = np.maximum(load_E[:, None] - counts_NE.T, 0.0)
    if problem.replicas:
        remote = max(0.0, _least_remote(counts_NE, problem.replicas))
        return max(remote / GBps.sum() for side in (experts_GBps, sources_GBps) for GBps in side[1:])
    homes_G = np.full(problem.num_ranks, problem.homes_per_rank)
    homes_N = problem.homes_per_rank * problem.ports.node_sizes
    kinds = ((near_EG, homes_G), (far_EN[:, node_G], homes_G), (far_EN, homes_N))
    busiest = 0.0
    for (weight_EX, homes_X), expert_X, source_X in zip(kinds, experts_GBps, sources_GBps, strict=True):
        on_average = weight_EX.min(axis=1).sum() / source_X.sum()
        busiest = max(busiest, float(on_average), _least_busiest(weight_EX, expert_X, homes_X))
    return busiest


def _must_cross_nodes(problem: LayerProblem) -> bool:
    """Whether some token surely leaves its node."""
    counts_NE = problem.ports.in_node_GN.T @ problem.traffic.counts
    return _least_remote(counts_NE, problem.replicas) > 1e-6 * counts_NE.sum()


def _least_remote(counts_NE: np.ndarray, replicas: int) -> float:
    """Selections that no copy in their own node can take: each expert once, and `replicas` more copies, each where it takes most."""
    best_E = counts_NE.max(axis=0)
    others = np.sort(np.delete(np.sort(counts_NE, axis=0), -1, axis=0), axis=None)[::-1]
    return float(counts_NE.sum() - best_E.sum() - others[:replicas].sum())


def _least_largest_load(problem: LayerProblem) -> float:
    """Selections of the most loaded rank, at least, without replicas."""
    load_EG = np.broadcast_to(problem.load[:, None], (problem.num_experts, problem.num_ranks))
    return _least_busiest(load_EG, np.ones(problem.num_ranks), np.full(problem.num_ranks, problem.homes_per_rank))


def _least_copy_load(problem: LayerProblem) -> float:
    """The same with replicas: the mean, or the largest load per copy when each copy goes where it helps most."""
    load_E, ranks = problem.load[problem.load > 0], problem.num_ranks
    low, high = float(problem.load.sum()) / ranks, float(problem.load.max())
    # Bisection on the load per copy.
    for _ in range(50 if high > low else 0):
        middle = (low + high) / 2
        copies_E = np.ceil(load_E / middle)
        enough = copies_E.max() <= ranks and (copies_E - 1).sum() <= problem.replicas
        low, high = (low, middle) if enough else (middle, high)
    return low


def _least_busiest(weight_EX: np.ndarray, capacity_X: np.ndarray, homes_X: np.ndarray) -> float:
    """The least possible largest sum of weight / capacity at a port, when each expert's tokens go to ports x and weigh weight_EX[e, x]."""
    least = float(weight_EX.min(axis=1).sum() / capacity_X.sum())
    lightest_first_E = np.sort((weight_EX / capacity_X).min(axis=1))
    most_E = lightest_first_E[::-1]
    # One of X ports has q+1 of the q X + 1 heaviest; what else it has is at least as much as the lightest that fill it.
    ports, fewest, most = homes_X.size, int(homes_X.min()), int(homes_X.max())
    lightest = np.concatenate([[0.0], np.cumsum(lightest_first_E)])
    crowded = [most_E[q * ports - q : q * ports + 1].sum() + lightest[fewest - q - 1 : most - q].min() for q in range(fewest)]
    return float(max(least, *crowded))
