"""`solve_layer` and `solve_trace`: any solver by name, replicas, lower bound and gap; from a trace to a plan."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.bound import gap_to, lower_bound_us
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.defaults import SOLVER, TIME_BUDGET_S
from megatron_scalemoe.placement.objective import final_cost_us, solution_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.processes import default_processes, run_jobs
from megatron_scalemoe.placement.replicas.add import add_replicas
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes, solve_contiguous, solve_greedy, solve_hierarchical, solve_random
from megatron_scalemoe.placement.solvers.exact import solve_exact
from megatron_scalemoe.placement.solvers.genetic import solve_genetic, solve_genetic_paper
from megatron_scalemoe.placement.solvers.local_search import solve_local_search
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.traffic.trace import LayerTraffic, RoutingTrace
from megatron_scalemoe.version import __version__

SOLVERS: dict[str, Callable[..., np.ndarray | Solution]] = {
    "contiguous": solve_contiguous,
    "random": solve_random,
    "greedy": solve_greedy,
    "hierarchical": solve_hierarchical,
    "genetic": solve_genetic,
    "genetic_paper": solve_genetic_paper,
    "local_search": solve_local_search,
    "exact": solve_exact,
}
# These are what others are compared with: they stay as they are, without our replicas, and even where contiguous is better.
BASELINES = ("contiguous", "random", "greedy", "hierarchical", "genetic_paper")
_WITHOUT_OUR_REPLICAS = ("contiguous", "random", "hierarchical")
# Up to as many layers get the full number of iterations; of more layers each gets less, so that a plan takes about as long.
_FULL_LAYERS = 2.5
_REPLICA_TRIES = 5
# Of the iterations, and of the time that may cut them, where replicas follow.
_HOMES_SHARE = 0.4


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerResult:
    """One layer's placement and how good it is.

    cost_us: at the ports (`objective.solution_cost`), replicas included.
    lower_bound_us: no placement costs less; None where that is not tight (`bound`).
    history: (seconds, best cost_us so far) at each improvement. seconds: of the search alone.
    cut: whether the time ended the search, so that the result depends on the machine.
    """

    solution: Solution
    cost_us: float
    lower_bound_us: float | None
    history: tuple[tuple[float, float], ...]
    seconds: float
    cut: bool

    @property
    def gap(self) -> float | None:
        return gap_to(self.lower_bound_us, self.cost_us)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SolveResult:
    """A plan with one `LayerResult` per layer, and the wall time of it all in seconds."""

    plan: PlacementPlan
    layers: tuple[LayerResult, ...]
    seconds: float

    @property
    def cost_us(self) -> float:
        """Of all layers together; `lower_bound_us` and `gap` likewise, None where a layer's is None."""
        return sum(layer.cost_us for layer in self.layers)

    @property
    def lower_bound_us(self) -> float | None:
        bounds = [layer.lower_bound_us for layer in self.layers]
        return None if None in bounds else sum(bounds)

    @property
    def gap(self) -> float | None:
        return gap_to(self.lower_bound_us, self.cost_us)

    @property
    def cut(self) -> bool:
        """Whether the time ended the search in a layer."""
        return any(layer.cut for layer in self.layers)


def solve_layer(
    problem: LayerProblem,
    solver: str,
    *,
    seed: int | list[int] = 0,
    time_budget_s: float = TIME_BUDGET_S,
    effort: float = 1.0,
    progress: Callable[[float], None] | None = None,
) -> LayerResult:
    """Places one layer. effort: share of the full number of iterations. progress: called with each better cost in us.

    The result is never worse than the contiguous placement, except for the `BASELINES`. It depends on the seed only, unless it says that
    the time budget cut it. Raises `ScaleMoEError` for an unknown solver.
    """
    check_solver(solver)
    began = time.monotonic()
    contiguous = Solution.without_replicas(contiguous_homes(problem), problem.num_ranks)
    contiguous_us = solution_cost(problem, contiguous).total_us
    history = [(0.0, contiguous_us)]

    def record(cost_us: float) -> None:
        history.append((time.monotonic() - began, cost_us))
        if progress:
            progress(cost_us)

    budget = Budget(effort, began + time_budget_s)
    solution = _search(problem, solver, np.random.default_rng(seed), budget, record)
    cost_us = solution_cost(problem, solution).total_us
    if solver not in BASELINES and contiguous_us < cost_us:
        solution, cost_us = contiguous, contiguous_us
    seconds = time.monotonic() - began
    history.append((seconds, cost_us))
    bound_us = _tight_bound_us(problem, cost_us)
    return LayerResult(solution=solution, cost_us=cost_us, lower_bound_us=bound_us, history=tuple(history), seconds=seconds, cut=budget.cut)


def _tight_bound_us(problem: LayerProblem, cost_us: float) -> float | None:
    bound_us = lower_bound_us(problem)
    return None if gap_to(bound_us, cost_us) is None else bound_us


def check_solver(solver: str) -> None:
    """Raises `ScaleMoEError` unless there is a solver of that name."""
    if solver not in SOLVERS:
        raise ScaleMoEError("there is no such solver", found=repr(solver), try_=", ".join(SOLVERS))


def _search(problem: LayerProblem, solver: str, rng: np.random.Generator, budget: Budget, record: Callable[[float], None]) -> Solution:
    replicate = problem.replicas > 0 and solver not in _WITHOUT_OUR_REPLICAS
    now = time.monotonic()
    share = _HOMES_SHARE if replicate else 1.0
    homes_budget = Budget(budget.effort * share, now + (budget.deadline - now) * share)
    found = SOLVERS[solver](problem, rng=rng, budget=homes_budget, progress=record)
    if replicate:
        found = _with_replicas(problem, found, rng, budget, budget.iterations(_REPLICA_TRIES) if solver == SOLVER else 1)
    budget.cut = budget.cut or homes_budget.cut
    return found if isinstance(found, Solution) else Solution.without_replicas(found, problem.num_ranks)


def _with_replicas(problem: LayerProblem, home_rank_E: np.ndarray, rng: np.random.Generator, budget: Budget, tries: int) -> Solution:
    """The best of `add_replicas` from these homes and from greedy ones in turn (good homes need not be the best ones without replicas), the
    last third of the tries from the best so far."""
    starts = (home_rank_E, solve_greedy(problem, rng=rng, budget=budget))
    best = add_replicas(problem, home_rank_E, rng=rng, budget=budget)
    for i in range(1, tries):
        if budget.over():
            break
        homes_E, old = (starts[i % 2], None) if i < 2 * tries / 3 else (best.home_rank, best)
        tried = add_replicas(problem, homes_E, old=old, rng=rng, budget=budget)
        best = min(best, tried, key=lambda solution: final_cost_us(problem, solution))
    return best


def solve_trace(
    trace: RoutingTrace,
    ports: Ports,
    cost: CostModel,
    *,
    solver: str = SOLVER,
    replicas: int = 0,
    seed: int = 0,
    time_budget_s: float = TIME_BUDGET_S,
    effort: float = 1.0,
    steps: slice = slice(None),
    shared: bool = False,
    progress: Callable[[int, int], None] | None = None,
    processes: int | None = None,
    links: Links | None = None,
) -> SolveResult:
    """A plan from the mean traffic of `steps` (which must hold at least one step).

    replicas: extra slots per layer, over all ranks. time_budget_s: a limit; where it cuts the search short, the result says so. Otherwise
    the plan depends on `seed` only. effort: share of the full number of iterations; less than 1 for plans that are made often.
    shared: one placement for all layers, from their mean. progress: called with (layers done, layers to do).
    processes: default as many as pay (see `processes`). links: of the same cluster; they choose between
    plans of the search. Raises `ScaleMoEError` for input that does not fit.
    """
    began = time.monotonic()
    check_solver(solver)
    if not trace.counts[steps].shape[0]:
        raise ScaleMoEError("a plan needs at least one recorded step", found=f"{steps} of {trace.num_steps} steps")
    if not time_budget_s > 0:
        raise ScaleMoEError("the time budget must be above 0 s", found=time_budget_s)
    problems = [
        LayerProblem(traffic=trace.layer(layer, steps), ports=ports, cost=cost, replicas=replicas, links=links)
        for layer in range(trace.num_layers)
    ]
    searched = [_mean_of_layers(problems)] if shared else problems
    processes = processes or default_processes(len(searched))
    jobs = _layer_jobs(searched, solver, seed, effort, began, time_budget_s, processes)
    layers = run_jobs(_solve_until, jobs, processes=processes, progress=progress)
    if shared:
        layers = [_of_layer(problem, layers[0]) for problem in problems]
    provenance = {
        "version": __version__,
        "solver": solver,
        "seed": seed,
        "replicas": replicas,
        "shared": shared,
        "time_budget_s": time_budget_s,
        "steps": list(steps.indices(trace.num_steps)),
        "trace_hash": trace.content_hash,
    }
    plan = PlacementPlan.from_hosts(
        np.stack([layer.solution.home_rank for layer in layers]),
        np.stack([layer.solution.hosts for layer in layers]),
        replica_slots_per_rank=problems[0].replica_slots_per_rank,
        provenance=provenance,
    )
    return SolveResult(plan=plan, layers=tuple(layers), seconds=time.monotonic() - began)


def _layer_jobs(
    problems: list[LayerProblem], solver: str, seed: int, effort: float, began: float, time_budget_s: float, processes: int
) -> list[tuple]:
    """Arguments of `_solve_until` for each layer; the layers share the iterations, and the time."""
    effort *= min(1.0, _FULL_LAYERS / len(problems))
    turns = -(-len(problems) // processes)
    deadlines = [began + time_budget_s * (layer // processes + 1) / turns for layer in range(len(problems))]
    return [(problem, solver, [seed, layer], deadlines[layer], effort) for layer, problem in enumerate(problems)]


def _solve_until(problem: LayerProblem, solver: str, seed: list[int], deadline: float, effort: float) -> LayerResult:
    return solve_layer(problem, solver, seed=seed, time_budget_s=deadline - time.monotonic(), effort=effort)


def _mean_of_layers(problems: list[LayerProblem]) -> LayerProblem:
    each = [problem.traffic for problem in problems]
    together = None if each[0].coactivation is None else np.mean([t.coactivation for t in each], axis=0)
    traffic = LayerTraffic(np.mean([t.counts for t in each], axis=0), together, np.mean([t.loads for t in each], axis=0), each[0].topk)
    return dataclasses.replace(problems[0], traffic=traffic)


def _of_layer(problem: LayerProblem, shared: LayerResult) -> LayerResult:
    """The shared placement, judged by one layer's own traffic."""
    cost_us = solution_cost(problem, shared.solution).total_us
    return dataclasses.replace(shared, cost_us=cost_us, lower_bound_us=_tight_bound_us(problem, cost_us))
