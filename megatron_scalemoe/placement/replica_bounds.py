"""Lower bound on layers with replicas: what must be computed and must travel even where replicas are free and tokens split at will.

A source may send all its tokens to a copy on its own rank, or node, whatever the other sources do; so only copies that exist are counted,
each where it keeps most at home. Suffixes: G ranks, N nodes, E logical experts, X sources (ranks or nodes).
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.placement.port_program import PortFloor
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.row_model import RowBounds, RowModel
from megatron_scalemoe.topology.ports import PortSide
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps


def least_copy_load(problem: LayerProblem) -> float:
    """Selections of the most loaded rank, at least: the mean, or the largest load per copy when each copy goes where it helps most."""
    load_E, ranks = problem.load[problem.load > 0], problem.num_ranks
    low, high = float(problem.load.sum()) / ranks, float(problem.load.max())
    # Bisection on the load per copy.
    for _ in range(50 if high > low else 0):
        middle = (low + high) / 2
        copies_E = np.ceil(load_E / middle)
        enough = copies_E.max() <= ranks and (copies_E - 1).sum() <= problem.replicas
        low, high = (low, middle) if enough else (middle, high)
    return low


def replicated_floor(model: RowModel, bounds: RowBounds, least_load: float) -> PortFloor:
    """Lower bounds of the parts of the cost with at most `problem.replicas` replicas, the most loaded rank having at least `least_load`."""
    problem, ports, counts_GE, counts_NE = model.problem, model.problem.ports, model.counts_GE, model.counts_NE
    ranks_N, slots = ports.node_sizes, problem.homes_per_rank + problem.replica_slots_per_rank
    far = _least_remote(counts_NE, problem.replicas)
    remote = max(far, _least_remote(counts_GE, problem.replicas))
    own_E = np.sort(counts_GE, axis=1)[:, ::-1]
    node_slots_N = slots * ranks_N
    far_G = np.array([row[n:].sum() for row, n in zip(own_E, node_slots_N[ports.node_of_rank], strict=True)])
    far_N = np.array([row[n:].sum() for row, n in zip(np.sort(counts_NE, axis=1)[:, ::-1], node_slots_N, strict=True)])

    def busiest(sources: PortSide, experts: PortSide) -> float:
        """Selections per GB/s: on average over all ports of a kind, and at each source's own."""
        average = [far / GBps.sum() for side in (sources, experts) for GBps in (side.scale_out_GBps, side.node_GBps)]
        average += [remote / (side.scale_up_GBps.sum() + side.scale_out_GBps.sum()) for side in (sources, experts)]
        return max(*average, float((far_G / sources.scale_out_GBps).max()), float((far_N / sources.node_GBps).max()))

    us = bounds.rows[0][0] * problem.cost.row_bytes / BYTES_PER_US_PER_GBps
    enough = 1e-6 * counts_GE.sum()
    near_us = ports.scale_up_latency_us if ports.num_nodes == 1 else min(ports.scale_up_latency_us, ports.scale_out_latency_us)
    latency_us = ports.scale_out_latency_us if far > enough else near_us if remote > enough else 0.0
    return PortFloor(
        dispatch_us=us * busiest(ports.out, ports.into),
        combine_us=us * busiest(ports.into, ports.out),
        fixed_us=problem.cost.exchange_overhead_us + latency_us,
        compute_us=least_load * problem.cost.compute_us_per_row,
    )


def _least_remote(counts_XE: np.ndarray, replicas: int) -> float:
    """Selections that no copy on their own rank (node) can take: each expert once, and `replicas` more copies, each where it takes most."""
    best_E = counts_XE.max(axis=0)
    others = np.sort(np.delete(np.sort(counts_XE, axis=0), -1, axis=0), axis=None)[::-1]
    return max(0.0, float(counts_XE.sum() - best_E.sum() - others[:replicas].sum()))
