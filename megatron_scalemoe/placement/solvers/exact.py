"""The best homes by mixed-integer programming (HiGHS), for small layers: the optimum that other solvers are held against.

Whole experts on ranks, so that the busiest port and the most loaded rank take least. Without deduplication that is the cost itself. With
deduplication a variable for each pair of experts on a rank says whether both are there; then it is the cost itself for top-2 if all sources
choose alike, and close to it otherwise.
Suffixes: G ranks, N nodes, E logical experts, Q pairs of experts, X columns of the program.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.bound import lower_bound_us
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes
from megatron_scalemoe.placement.solvers.port_model import port_model

# Largest programs: (expert, rank) cells, and (pair of experts, rank) cells, beyond which HiGHS does not end in minutes.
MAX_CELLS = 2048
MAX_PAIR_CELLS = 2048
_LEAST_SECONDS, _MOST_SECONDS = 0.1, 1e6


def solve_exact(
    problem: LayerProblem, *, rng: np.random.Generator, budget: Budget, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """int64 [E], the best homes; those found by then if the time cuts it; never worse than the contiguous placement.

    Replicas are left out: these are the homes. Raises `ScaleMoEError` where the cost is not a (small enough) linear program: exchanges
    other than flat, deduplication without co-activation, too many experts.
    """
    problem = dataclasses.replace(problem, replicas=0)
    _check(problem)
    matrix, least, limit = _program(problem)
    columns, cells = matrix.shape[1], problem.num_experts * problem.num_ranks
    most = np.full(columns, np.inf)
    most[: columns - 4] = 1.0
    most[:cells][_superfluous(problem).reshape(-1)] = 0.0
    seconds = min(_MOST_SECONDS, max(_LEAST_SECONDS, budget.deadline - time.monotonic()))
    result = milp(
        np.eye(1, columns, columns - 1)[0],
        integrality=np.arange(columns) < cells,
        bounds=Bounds(0.0, most),
        constraints=LinearConstraint(matrix, least, limit),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    budget.cut = budget.cut or result.status == 1
    candidates = [contiguous_homes(problem)]
    if result.x is not None:
        candidates.append(result.x[:cells].reshape(problem.num_experts, -1).argmax(axis=1))
    best_E = min(candidates, key=lambda home_rank_E: home_cost_us(problem, home_rank_E))
    if progress:
        progress(home_cost_us(problem, best_E))
    return best_E


def _check(problem: LayerProblem) -> None:
    experts, ranks = problem.num_experts, problem.num_ranks
    if problem.cost.exchange != "flat":
        raise ScaleMoEError("the exact solver knows the flat exchange only", found=problem.cost.exchange, try_="another solver")
    if experts * ranks > MAX_CELLS:
        found = f"{experts} x {ranks} = {experts * ranks}"
        raise ScaleMoEError(f"the exact solver takes up to {MAX_CELLS} experts x ranks", found=found, try_="another solver")
    if not _counts_pairs(problem):
        return
    if problem.traffic.coactivation is None:
        raise ScaleMoEError(
            "the exact solver needs co-activation to count distinct rows", found="a trace without it", try_="another solver"
        )
    pairs = experts * (experts - 1) // 2 * ranks
    if pairs > MAX_PAIR_CELLS:
        raise ScaleMoEError(
            f"with deduplication the exact solver takes up to {MAX_PAIR_CELLS} pairs of experts x ranks",
            found=f"{experts} experts on {ranks} ranks: {pairs}",
            try_="deduplicate off, or another solver",
        )


def _counts_pairs(problem: LayerProblem) -> bool:
    return problem.cost.deduplicate and problem.traffic.topk > 1 and problem.homes_per_rank > 1


def _superfluous(problem: LayerProblem) -> np.ndarray:
    """bool [E, G]: homes that symmetry makes superfluous. Where ranks are exactly alike, order them by their lowest expert: then the k-th
    (from 0) of them holds no expert below k."""
    features = np.column_stack([problem.ports.rank_features, problem.traffic.counts])
    _, alike_G = np.unique(features, axis=0, return_inverse=True)
    earlier_G = np.array([np.count_nonzero(alike_G[:g] == alike) for g, alike in enumerate(alike_G.reshape(-1))])
    return np.arange(problem.num_experts)[:, None] < earlier_G


def _program(problem: LayerProblem) -> tuple[sparse.csr_array, np.ndarray, np.ndarray]:
    """(matrix, least, limit): least <= matrix @ v <= limit, and the last of v to be minimised.

    Columns: x[e, g], expert e on rank g; y[q, g], both experts of pair q on rank g; the times of dispatch, of combine, and of compute; the
    layer's. Times in units that are near 1.
    """
    experts, ranks, traffic = problem.num_experts, problem.num_ranks, problem.traffic
    e_Q, f_Q = np.nonzero(np.triu(traffic.coactivation, 1)) if _counts_pairs(problem) else np.zeros((2, 0), dtype=np.int64)
    together_Q = traffic.coactivation[e_Q, f_Q] if e_Q.size else np.zeros(0)
    cells, pair_cells = experts * ranks, e_Q.size * ranks
    unit_us = max(lower_bound_us(problem), 1e-9)
    blocks = []

    def add(x: object, y: object, times: np.ndarray, least: float, limit: float) -> None:
        height = times.shape[0]
        parts = (sparse.csr_array((height, width)) if part is None else part for part, width in ((x, cells), (y, pair_cells)))
        blocks.append((sparse.hstack([*parts, sparse.csr_array(times)]), np.full(height, least), np.full(height, limit)))

    add(sparse.kron(sparse.eye_array(experts), np.ones((1, ranks))), None, np.zeros((experts, 4)), 1.0, 1.0)
    add(
        sparse.kron(np.ones((1, experts)), sparse.eye_array(ranks)),
        None,
        np.zeros((ranks, 4)),
        problem.homes_per_rank,
        problem.homes_per_rank,
    )
    compute = problem.load * problem.cost.compute_us_per_row / unit_us
    add(sparse.kron(compute[None], sparse.eye_array(ranks)), None, np.tile([0.0, 0, -1, 0], (ranks, 1)), -math.inf, 0.0)
    for expert_Q in (e_Q, f_Q) if e_Q.size else ():
        picked = sparse.csr_array((np.ones(e_Q.size), (np.arange(e_Q.size), expert_Q)), shape=(e_Q.size, experts))
        add(-sparse.kron(picked, sparse.eye_array(ranks)), sparse.eye_array(pair_cells), np.zeros((pair_cells, 4)), -math.inf, 0.0)
    # Distinct rows are at least a x selections - b x pairs for each r (Dawson and Sankoff 1967); sources have pairs by their size.
    part_G = traffic.counts.sum(axis=1) / max(traffic.counts.sum(), 1e-300)
    lines = [(2 / (r + 1), 2 / (r * (r + 1))) for r in range(1, traffic.topk)] if e_Q.size else [(1.0, 0.0)]
    for passes_GG, us_D in _ports(problem):
        for direction, us in enumerate(us_D / unit_us):
            for a, b in lines if np.isfinite(us) and us > 0 else ():
                x = us * a * (traffic.counts.T @ passes_GG)
                y = -us * b * together_Q[:, None] * (part_G @ passes_GG)
                add(x.reshape(1, -1), y.reshape(1, -1), -np.eye(1, 4, direction), -math.inf, 0.0)
    one_node = problem.ports.num_nodes == 1
    latency_us = problem.ports.scale_up_latency_us if one_node else problem.ports.scale_out_latency_us
    fixed, hidden = 4 * (problem.cost.exchange_overhead_us + latency_us) / unit_us, 1 - problem.cost.overlap
    add(None, None, np.array([[-1.0, -1.0, -hidden, 1.0]]), fixed, math.inf)
    add(None, None, np.array([[-hidden, -hidden, -1.0, 1.0]]), hidden * fixed, math.inf)
    matrices, least, limit = zip(*blocks, strict=True)
    return sparse.csr_array(sparse.vstack(matrices)), np.concatenate(least), np.concatenate(limit)


def _ports(problem: LayerProblem) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each port: which (source, destination) pass it, bool [G, G]; and us per row for dispatch and for combine, both times together."""
    ports, model = problem.ports, port_model(problem)
    near_GG, far_GG = ports.same_node_GG, ~ports.same_node_GG
    np.fill_diagonal(near_GG, False)
    for place in range(problem.num_ranks):
        here = np.arange(problem.num_ranks) == place
        yield near_GG & here, model.near_in_DG[:, place]
        yield far_GG & here, model.far_in_DG[:, place]
        yield near_GG & here[:, None], model.near_out_DG[:, place]
        yield far_GG & here[:, None], model.far_out_DG[:, place]
    for node in range(ports.num_nodes):
        here = ports.node_of_rank == node
        yield far_GG & here, model.node_in_DN[:, node]
        yield far_GG & here[:, None], model.node_out_DN[:, node]
