"""The next plan of a running job, from its recent traffic and the plan in force: new replicas, and homes that move where that pays back.

Candidates, in every layer: the homes stay and replicas are chosen anew; the homes go downhill, a swap at a time; homes and replicas are
solved from nothing. Replicas are sent anew in every step, so theirs is a question of the step's cost alone; a home takes its optimizer
state along, and must save more within the policy's horizon. Suffixes: S recorded steps, L layers, G ranks, E logical experts, C candidates.
"""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.migration import align_plan, interchangeable_ranks, migration_us, moves, replicas_removed, state_bytes
from megatron_scalemoe.placement.objective import solution_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replan.policy import ReplanDecision, ReplanPolicy, should_replan
from megatron_scalemoe.placement.replicas.add import add_replicas
from megatron_scalemoe.placement.solvers.local_search import SWAPS, descend, solve_local_search
from megatron_scalemoe.placement.solvers.port_model import port_model
from megatron_scalemoe.placement.solvers.swap_table import SwapTable
from megatron_scalemoe.plan.fit import check_fit
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan
from megatron_scalemoe.plan.split import balanced_max_load
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.traffic.trace import RoutingTrace
from megatron_scalemoe.version import __version__

# Beside training, few iterations: of the full number of a search.
_EFFORT = 0.6
# Up to as many layers get them; of more layers each gets less.
_FULL_LAYERS = 8
# Recorded steps, evenly spaced, that the noise of a saving is taken from.
_NOISE_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplanOptions:
    """replicas: slots for them in each layer, over all ranks, of which each gets as many. migrate: whether homes may move.
    time_budget_s: a limit; where it cuts the search short, the reason says so. unpaid_us: see `policy.should_replan`. Raises
    `ScaleMoEError` on a value out of range.
    """

    replicas: int
    migrate: bool
    time_budget_s: float
    seed: int
    policy: ReplanPolicy = dataclasses.field(default_factory=ReplanPolicy)
    unpaid_us: float = 0.0

    def __post_init__(self) -> None:
        for name in ("replicas", "seed"):
            if getattr(self, name) < 0:
                raise ScaleMoEError(f"{name} must be 0 or more", found=getattr(self, name))
        if not (math.isfinite(self.time_budget_s) and self.time_budget_s > 0):
            raise ScaleMoEError("time_budget_s must be above 0", found=self.time_budget_s)
        if not math.isfinite(self.unpaid_us):
            raise ScaleMoEError("unpaid_us must be a number", found=self.unpaid_us)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Replan:
    """The next plan; the old one itself if nothing is worth a change.

    changed: whether a slot differs. moved_homes, replicas_added, replicas_removed: over all layers.
    current_us, planned_us: cost of an optimizer step under the old and the next plan, all layers and micro-batches, of the mean traffic,
        replicas included. replica_us: what the next plan's replicas take of that. migration_us: once, for the homes that move.
    max_over_mean_before, max_over_mean_after: largest over mean rank load of the recorded steps, each split as the runtime does; the mean
        over steps and layers.
    reason: in one line, for the log.
    """

    plan: PlacementPlan
    changed: bool
    moved_homes: int
    replicas_added: int
    replicas_removed: int
    current_us: float
    planned_us: float
    replica_us: float
    migration_us: float
    max_over_mean_before: float
    max_over_mean_after: float
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    """cost_us_L: of an optimizer step. migration_us_L: from the old plan."""

    plan: PlacementPlan
    cost_us_L: np.ndarray
    migration_us_L: np.ndarray

    @property
    def cost_us(self) -> float:
        return float(self.cost_us_L.sum())


def replan(trace: RoutingTrace, old: PlacementPlan, ports: Ports, cost: CostModel, options: ReplanOptions) -> Replan:
    """The plan to follow `old`.

    trace: recent traffic of the plan's layers; each recorded step is (the mean of) a micro-batch. Replicas stay in a layer unless others
    save the policy's `min_saving` there. Homes move, in those layers where that is cheapest within the policy's horizon, if `should_replan`
    says so about all of them together. Unless the time cuts the search short, the result depends on the seed only.
    Raises `ScaleMoEError` for input that does not fit.
    """
    _check_fits(trace, old, options)
    budget = Budget(_EFFORT * min(1.0, _FULL_LAYERS / trace.num_layers), time.monotonic() + options.time_budget_s)
    before = _with_replica_slots(old, options.replicas // old.num_ranks)
    problems = [
        LayerProblem(traffic=trace.layer(layer), ports=ports, cost=cost, replicas=options.replicas) for layer in range(trace.num_layers)
    ]
    found_LC = [_candidates(problem, _solution(before, i), options, layer=i, budget=budget) for i, problem in enumerate(problems)]
    current = _candidate(before, before, problems)
    kept = _kept(current, [found[0] for found in found_LC], problems, options.policy)
    chosen, reason = kept, _replica_reason(current, kept, options.replicas)
    if options.migrate:
        others = [_aligned([found[i] for found in found_LC], before, problems) for i in (1, 2)]
        moved = _cheapest_within([kept, *others], options.policy.horizon_steps)
        decision = _decide(trace, problems, kept, moved, options)
        chosen = moved if decision.replan else kept
        homes = moves(before, moved.plan).num_homes
        if decision.replan:
            reason += f"; {homes} homes move: {decision.reason}"
        else:
            reason += f"; homes stay: {decision.reason if homes else 'no move would pay back'}"
    reason += f"; the search was cut after {options.time_budget_s:g} s" if budget.cut else ""
    return _replan(old, current, chosen, problems, _provenance(trace, options), reason)


def _candidates(problem: LayerProblem, old: Solution, options: ReplanOptions, *, layer: int, budget: Budget) -> list[Solution]:
    """Homes kept; and with `migrate`, homes downhill, and from nothing."""
    rng = np.random.default_rng([options.seed, layer])
    kept = add_replicas(problem, old.home_rank, fixed_homes=True, old=old, rng=rng, budget=budget)
    if not options.migrate:
        return [kept]
    if budget.over():
        return [kept, kept, kept]
    table = SwapTable(port_model(problem), old.home_rank)
    descend(table, budget.iterations(SWAPS), rng=rng, budget=budget)
    near = add_replicas(problem, table.home_rank_E.copy(), fixed_homes=True, rng=rng, budget=budget)
    fresh = add_replicas(problem, solve_local_search(problem, rng=rng, budget=budget), rng=rng, budget=budget)
    return [kept, near, fresh]


def _kept(current: _Candidate, found: list[Solution], problems: list[LayerProblem], policy: ReplanPolicy) -> _Candidate:
    """All homes where they are; new replicas in those layers where they save enough."""
    proposed = _candidate(align_plan(current.plan, _plan(found, current.plan)), current.plan, problems)
    pairs = zip(current.cost_us_L, proposed.cost_us_L, strict=True)
    better_L = [should_replan(old_us, new_us, 0.0, policy).replan for old_us, new_us in pairs]
    return _mix([current, proposed], np.array(better_L, dtype=np.int64))


def _cheapest_within(candidates: list[_Candidate], horizon_steps: int) -> _Candidate:
    """In each layer the candidate that costs least over the horizon, its migration included; the first of equals."""
    total_us_CL = np.stack([c.cost_us_L * horizon_steps + c.migration_us_L for c in candidates])
    return _mix(candidates, total_us_CL.argmin(axis=0))


def _decide(
    trace: RoutingTrace, problems: list[LayerProblem], kept: _Candidate, moved: _Candidate, options: ReplanOptions
) -> ReplanDecision:
    """Whether homes move."""
    costs = kept.cost_us, moved.cost_us, float(moved.migration_us_L.sum())
    decision = should_replan(*costs, options.policy, unpaid_us=options.unpaid_us)
    if not decision.replan:
        return decision  # noise would only speak against it
    noise_us = _noise_us(trace, problems, kept.plan, moved.plan)
    return should_replan(*costs, options.policy, noise_us=noise_us, unpaid_us=options.unpaid_us)


def _noise_us(trace: RoutingTrace, problems: list[LayerProblem], kept: PlacementPlan, moved: PlacementPlan) -> float:
    """Standard error of what `moved` saves in a step, over recorded steps; 0 for a single one."""
    number = min(trace.num_steps, _NOISE_STEPS)
    if number < 2:
        return 0.0
    saving_us_S = np.zeros(number)
    different = np.flatnonzero((kept.physical_to_logical != moved.physical_to_logical).any(axis=1))
    for i, step in enumerate(np.arange(number) * trace.num_steps // number):
        for layer in different:
            problem = dataclasses.replace(problems[layer], traffic=trace.layer(int(layer), slice(step, step + 1)))
            saving_us_S[i] += _step_us(problem, _solution(kept, layer)) - _step_us(problem, _solution(moved, layer))
    return float(saving_us_S.std(ddof=1) / math.sqrt(number))


def _replan(
    old: PlacementPlan,
    current: _Candidate,
    chosen: _Candidate,
    problems: list[LayerProblem],
    provenance: dict[str, object],
    reason: str,
) -> Replan:
    changed = not np.array_equal(chosen.plan.physical_to_logical, old.physical_to_logical)
    plan = dataclasses.replace(chosen.plan, provenance=provenance) if changed else old
    moved = moves(current.plan, plan)
    solutions = [_solution(plan, layer) for layer in range(plan.num_layers)]
    prices_us = [replica_us(s.home_rank, s.hosts, p.cost, p.ports) * p.cost.micro_batches for s, p in zip(solutions, problems, strict=True)]
    return Replan(
        plan=plan,
        changed=changed,
        moved_homes=moved.num_homes,
        replicas_added=int(np.count_nonzero(~moved.is_home)),
        replicas_removed=int(replicas_removed(current.plan, plan).sum()),
        current_us=current.cost_us,
        planned_us=chosen.cost_us,
        replica_us=float(sum(prices_us)),
        migration_us=float(chosen.migration_us_L.sum()),
        max_over_mean_before=_max_over_mean(current.plan, problems),
        max_over_mean_after=_max_over_mean(plan, problems),
        reason=reason,
    )


def _replica_reason(current: _Candidate, kept: _Candidate, replicas: int) -> str:
    if not replicas:
        return "no replica slots"
    layers = int((current.plan.physical_to_logical != kept.plan.physical_to_logical).any(axis=1).sum())
    if not layers:
        return "no other replicas save enough"
    saved_us = current.cost_us - kept.cost_us
    return (
        f"new replicas in {layers} of {kept.plan.num_layers} layers save {saved_us / 1e3:.3g} ms a step ({saved_us / current.cost_us:.1%})"
    )


def _max_over_mean(plan: PlacementPlan, problems: list[LayerProblem]) -> float:
    ratios = []
    for layer, problem in enumerate(problems):
        loads_SE = problem.traffic.loads
        mean_S = loads_SE.sum(axis=1) / plan.num_ranks
        largest_S, _ = balanced_max_load(loads_SE, plan.hosts(layer))
        ratios.append(largest_S[mean_S > 0] / mean_S[mean_S > 0])
    known = np.concatenate(ratios)
    return float(known.mean()) if known.size else 1.0


def _candidate(plan: PlacementPlan, old: PlacementPlan, problems: list[LayerProblem]) -> _Candidate:
    moved = moves(old, plan)
    cost_us_L, migration_us_L = np.zeros((2, len(problems)))
    for layer, problem in enumerate(problems):
        here = moved.layer == layer
        of_layer = dataclasses.replace(moved, **{name: values[here] for name, values in vars(moved).items()})
        cost_us_L[layer] = _step_us(problem, _solution(plan, layer))
        migration_us_L[layer] = migration_us(of_layer, problem.ports, state_bytes(problem.cost))
    return _Candidate(plan, cost_us_L, migration_us_L)


def _aligned(found: list[Solution], before: PlacementPlan, problems: list[LayerProblem]) -> _Candidate:
    """With as few homes moved as equal ranks allow."""
    return _candidate(align_plan(before, _plan(found, before), interchangeable_ranks(problems[0].ports)), before, problems)


def _mix(candidates: list[_Candidate], chosen_L: np.ndarray) -> _Candidate:
    """Each layer from the candidate of that number."""
    layers, some = np.arange(chosen_L.size), candidates[0].plan
    slots_LP, cost_us_L, migration_us_L = (
        np.stack(each)[chosen_L, layers]
        for each in zip(*((c.plan.physical_to_logical, c.cost_us_L, c.migration_us_L) for c in candidates), strict=True)
    )
    return _Candidate(PlacementPlan(slots_LP, some.num_ranks, some.num_logical_experts), cost_us_L, migration_us_L)


def _step_us(problem: LayerProblem, solution: Solution) -> float:
    return solution_cost(problem, solution).total_us * problem.cost.micro_batches


def _solution(plan: PlacementPlan, layer: int) -> Solution:
    return Solution(plan.home_rank[layer], plan.hosts(layer))


def _plan(solutions: list[Solution], like: PlacementPlan) -> PlacementPlan:
    home_rank_LE, hosts_LEG = np.stack([s.home_rank for s in solutions]), np.stack([s.hosts for s in solutions])
    return PlacementPlan.from_hosts(home_rank_LE, hosts_LEG, replica_slots_per_rank=like.slots_per_rank - like.homes_per_rank)


def _with_replica_slots(plan: PlacementPlan, per_rank: int) -> PlacementPlan:
    """With empty slots added up to `per_rank` for replicas."""
    slots_LGS = plan.physical_to_logical.reshape(plan.num_layers, plan.num_ranks, -1)
    more = per_rank - (plan.slots_per_rank - plan.homes_per_rank)
    slots_LGS = np.pad(slots_LGS, ((0, 0), (0, 0), (0, more)), constant_values=EMPTY)
    return dataclasses.replace(plan, physical_to_logical=slots_LGS.reshape(plan.num_layers, -1))


def _check_fits(trace: RoutingTrace, old: PlacementPlan, options: ReplanOptions) -> None:
    check_fit({"the plan": old, "the trace": trace})
    if options.replicas % old.num_ranks:
        raise ScaleMoEError(f"replicas must be a multiple of the {old.num_ranks} ranks", found=options.replicas)
    slots = (old.slots_per_rank - old.homes_per_rank) * old.num_ranks
    if slots > options.replicas:
        raise ScaleMoEError(f"replicas must be at least the {slots} slots that the plan in force has for them", found=options.replicas)


def _provenance(trace: RoutingTrace, options: ReplanOptions) -> dict[str, object]:
    return {
        "version": __version__,
        "solver": "replan",
        "seed": options.seed,
        "replicas": options.replicas,
        "migrate": options.migrate,
        "time_budget_s": options.time_budget_s,
        "iterations": trace.iterations,
        "trace_hash": trace.content_hash,
    }
