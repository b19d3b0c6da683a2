"""Replicas of experts: which, how many and where, so that the per-step split can even out the ranks, and only where they pay."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.placement.objective import placement_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replicate_drift import expected_load, plausible_loads
from megatron_scalemoe.placement.replicate_search import improve
from megatron_scalemoe.placement.replicate_start import balanced_homes, chained_replicas, packed_replicas
from megatron_scalemoe.split import balanced_max_load, balanced_shares


def add_replicas(problem: LayerProblem, home_rank_E: np.ndarray, *, rng: np.random.Generator, deadline: float, cases=12, draws=80, trace=None) -> Solution:
    loads_BE = plausible_loads(problem.traffic.loads, cases, rng)
    load_E = expected_load(problem.traffic.loads)
    G = problem.num_ranks
    kw = dict(replicas=problem.replicas, per_rank=problem.replica_slots_per_rank)
    starts = []
    for homes in (home_rank_E, balanced_homes(load_E, G)):
        for own in (False, True):
            starts.append(chained_replicas(load_E, homes, problem.ports.node_of_rank, target=load_E.sum() / G, own_node=own, **kw))
    starts.append(packed_replicas(load_E, home_rank_E, ranks=G, **kw))
    def cost_us(s, v):
        return v
    vals = [balanced_max_load(loads_BE, s.hosts)[0].mean() for s in starts]
    best = starts[int(np.argmin(vals))]
    return improve(best, loads_BE, cost_us, draws=draws, rng=rng, deadline=deadline, **kw)
