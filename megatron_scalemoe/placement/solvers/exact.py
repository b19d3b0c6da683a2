"""The best homes by mixed-integer programming (HiGHS), for small layers: the oracle of the other solvers.

The program is `port_program` with whole experts. Without deduplication it is the cost itself. With deduplication by co-activation a
variable for each pair of experts on a rank says whether both are there; then it is the cost itself for top-2 if all sources choose alike,
and otherwise a little below it, so that what it proves stays a lower bound.
Suffixes: G ranks, E logical experts, Q pairs of experts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.bound import least_largest_load, lower_bound_us, port_floor
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.port_program import PortProgram, port_program
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.row_model import row_model

# Largest programs: (expert, rank) cells, and (pair of experts, rank) cells, beyond which HiGHS does not end in minutes.
MAX_CELLS = 2048
MAX_PAIR_CELLS = 2048
_LEAST_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class ExactResult:
    """home_rank: int64 [E]. cost_us: its `placement_cost(...).total_us`. lower_bound_us: what is proven, for layers without replicas."""

    home_rank: np.ndarray
    cost_us: float
    lower_bound_us: float


def solve_exact(
    problem: LayerProblem, *, rng: np.random.Generator, deadline: float, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """int64 [E], the best homes found by `deadline` (a `time.monotonic()` value). Raises as `prove_exact`."""
    result = prove_exact(problem, deadline=deadline)
    if progress:
        progress(result.cost_us)
    return result.home_rank


def prove_exact(problem: LayerProblem, *, deadline: float) -> ExactResult:
    """The best homes found by `deadline`, and the bound proven by then; never worse than the contiguous placement.

    Replicas are left out: these are the homes. Raises `ScaleMoEError` where the cost is not a (small enough) linear program: exchanges
    other than flat, deduplication without co-activation, too many experts.
    """
    problem = dataclasses.replace(problem, replicas=0)
    _check(problem)
    model = row_model(problem)
    bounds = model.rows_at(np.inf)
    program = port_program(model, bounds, port_floor(model, bounds, least_largest_load(problem)))
    most = program.most.copy()
    most[: problem.num_experts * problem.num_ranks][_forbidden(problem).reshape(-1)] = 0.0
    program = dataclasses.replace(program, most=most)
    if model.partners:
        program = _with_pairs(program, problem)
    result = milp(
        program.objective,
        integrality=np.arange(program.objective.size) < problem.num_experts * problem.num_ranks,
        bounds=Bounds(program.least, program.most),
        constraints=[
            LinearConstraint(program.upper, -np.inf, program.upper_limit),
            LinearConstraint(program.equal, program.equal_limit, program.equal_limit),
        ],
        options={"time_limit": max(_LEAST_SECONDS, deadline - time.monotonic()), "mip_rel_gap": 1e-6},
    )
    home_rank_E = np.repeat(np.arange(problem.num_ranks), problem.homes_per_rank)
    cost_us, proven_us = home_cost_us(problem, home_rank_E), lower_bound_us(problem, method="combinatorial")
    if result.x is not None:
        found_E = result.x[: problem.num_experts * problem.num_ranks].reshape(problem.num_experts, -1).argmax(axis=1)
        found_us = home_cost_us(problem, found_E)
        if found_us < cost_us:
            home_rank_E, cost_us = found_E, found_us
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        proven_us = max(proven_us, float(result.mip_dual_bound) * program.unit_us * (1 - 1e-6))
    return ExactResult(home_rank_E, cost_us, min(proven_us, cost_us))


def _check(problem: LayerProblem) -> None:
    experts, ranks = problem.num_experts, problem.num_ranks
    other = "another solver; `lower_bound_us` says how far from the best it can be"
    if problem.cost.exchange != "flat":
        raise ScaleMoEError("the exact solver knows the flat exchange only", found=problem.cost.exchange, try_=other)
    if experts * ranks > MAX_CELLS:
        raise ScaleMoEError(
            f"the exact solver takes up to {MAX_CELLS} experts x ranks", found=f"{experts} x {ranks} = {experts * ranks}", try_=other
        )
    if not problem.cost.deduplicate or problem.traffic.topk == 1:
        return
    if problem.traffic.coactivation is None:
        raise ScaleMoEError("the exact solver needs co-activation to count distinct rows", found="a trace without it", try_=other)
    pairs = experts * (experts - 1) // 2 * ranks
    if pairs > MAX_PAIR_CELLS:
        raise ScaleMoEError(
            f"with deduplication the exact solver takes up to {MAX_PAIR_CELLS} pairs of experts x ranks",
            found=f"{experts} experts on {ranks} ranks: {pairs}",
            try_=f"deduplicate off, or {other}",
        )


def _forbidden(problem: LayerProblem) -> np.ndarray:
    """bool [E, G]: homes that symmetry makes superfluous. Where ranks are exactly alike, order them by their lowest expert: then the k-th
    (from 0) of them holds no expert below k."""
    features = np.column_stack([problem.ports.rank_features, problem.traffic.counts])
    _, alike_G = np.unique(features, axis=0, return_inverse=True)
    earlier_G = np.array([np.count_nonzero(alike_G[:g] == alike) for g, alike in enumerate(alike_G)])
    return np.arange(problem.num_experts)[:, None] < earlier_G


def _with_pairs(program: PortProgram, problem: LayerProblem) -> PortProgram:
    """Adds columns y[pair, g] <= x[e, g], x[f, g], and S[g] <= the sum of the pairs' co-activation."""
    experts, ranks, columns = problem.num_experts, problem.num_ranks, program.objective.size
    e_Q, f_Q = np.nonzero(np.triu(problem.traffic.coactivation, 1))
    together_Q = problem.traffic.coactivation[e_Q, f_Q]
    first_saved = experts * (ranks + problem.ports.num_nodes)
    eye_G, eye_Y = sparse.eye_array(ranks), sparse.eye_array(e_Q.size * ranks)

    def shares_of(expert_Q: np.ndarray) -> sparse.csr_array:
        picked = sparse.csr_array((np.ones(e_Q.size), (np.arange(e_Q.size), expert_Q)), shape=(e_Q.size, experts))
        return _at_columns(sparse.kron(picked, eye_G), 0, columns)

    new_rows = [sparse.hstack([-shares_of(expert_Q), eye_Y]) for expert_Q in (e_Q, f_Q)]
    new_rows.append(sparse.hstack([_at_columns(eye_G, first_saved, columns), -sparse.kron(together_Q[None], eye_G)]))
    new_limit = np.zeros(2 * e_Q.size * ranks + ranks)

    def wider(matrix: sparse.csr_array) -> sparse.csr_array:
        return sparse.hstack([matrix, sparse.csr_array((matrix.shape[0], eye_Y.shape[0]))])

    return dataclasses.replace(
        program,
        objective=np.concatenate([program.objective, np.zeros(eye_Y.shape[0])]),
        upper=sparse.vstack([wider(program.upper), *new_rows], format="csr"),
        upper_limit=np.concatenate([program.upper_limit, new_limit]),
        equal=sparse.csr_array(wider(program.equal)),
        least=np.concatenate([program.least, np.zeros(eye_Y.shape[0])]),
        most=np.concatenate([program.most, np.ones(eye_Y.shape[0])]),
    )


def _at_columns(block: sparse.sparray, first: int, columns: int) -> sparse.csr_array:
    height, width = block.shape
    left, right = sparse.csr_array((height, first)), sparse.csr_array((height, columns - first - width))
    return sparse.csr_array(sparse.hstack([left, block, right]))
