"""From the plan in force and recent traffic to the next plan: replicas chosen anew, and homes moved only where that pays back.

Replicas are transient, so changing them costs nothing beyond their price in every step. Homes carry optimizer state: they move only if
`policy.should_replan` says that the saving pays for the migration. Suffixes: L layers, G ranks, E logical experts.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.migration import align_plan, interchangeable_ranks, migration_us, moves, replicas_removed, state_bytes
from megatron_scalemoe.placement.objective import solution_cost
from megatron_scalemoe.placement.policy import ReplanPolicy, should_replan
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replicate import add_replicas
from megatron_scalemoe.placement.solve import solve_layer
from megatron_scalemoe.plan import PlacementPlan
from megatron_scalemoe.split import split_tokens
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.traffic.trace import RoutingTrace

# Of the time, for replicas beside the homes that are there; the rest is for new homes.
_REPLICAS_SHARE = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplanOptions:
    """replicas: slots for them in each layer, over all ranks. migrate: whether homes may move. unpaid_us: see `should_replan`."""

    replicas: int
    migrate: bool
    time_budget_s: float
    seed: int
    policy: ReplanPolicy = dataclasses.field(default_factory=ReplanPolicy)
    unpaid_us: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Replan:
    """The next plan; the old one itself if nothing is worth a change.

    current_us, planned_us: cost of an optimizer step's MoE layers under the old plan and this one, for the recorded mean traffic, replicas'
    price included. replica_us: that price, in this plan. max_over_mean_before, _after: mean over layers and recorded steps.
    migration_us: estimated time of the homes' moves. reason: for the log.
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


def replan(trace: RoutingTrace, old: PlacementPlan, ports: Ports, cost: CostModel, options: ReplanOptions) -> Replan:
    """The plan to follow `old`, which must be for the trace's layers, ranks and experts.

    Two candidates, within about `time_budget_s`: new replicas beside the homes that are there, taken if they save at least the policy's
    `min_saving`; and, with `migrate`, new homes with replicas, taken if they also pay back their migration. Deterministic for the seed,
    unless the time cuts a search short.
    """
    deadline = time.monotonic() + options.time_budget_s
    problems = [
        LayerProblem(traffic=trace.layer(layer), ports=ports, cost=cost, replicas=options.replicas) for layer in range(trace.num_layers)
    ]
    share = _REPLICAS_SHARE if options.migrate else 1.0
    current_us = _step_us(problems, old, cost)
    stays = _new_replicas(problems, old, options, time.monotonic() + options.time_budget_s * share)
    best, reason = old, "no replicas save enough"
    saving = should_replan(current_us, _step_us(problems, stays, cost), 0.0, options.policy)
    if saving.replan:
        best, reason = stays, f"replicas beside the same homes: {saving.reason}"
    if options.migrate:
        moved = _new_homes(problems, old, options, deadline)
        price_us = migration_us(moves(old, moved), ports, state_bytes(cost))
        noise_us = _noise_us(trace, best, moved, ports, cost)
        unpaid_us = options.unpaid_us
        best_us, moved_us = _step_us(problems, best, cost), _step_us(problems, moved, cost)
        decision = should_replan(best_us, moved_us, price_us, options.policy, noise_us=noise_us, unpaid_us=unpaid_us)
        if decision.replan:
            best, reason = moved, f"new homes: {decision.reason}"
        else:
            reason += f"; homes stay: {decision.reason}"
    return _described(trace, problems, old, best, reason, current_us, cost)


def _described(
    trace: RoutingTrace,
    problems: list[LayerProblem],
    old: PlacementPlan,
    new: PlacementPlan,
    reason: str,
    current_us: float,
    cost: CostModel,
) -> Replan:
    changes, ports = moves(old, new), problems[0].ports
    return Replan(
        plan=new,
        changed=new.content_hash != old.content_hash,
        moved_homes=changes.num_homes,
        replicas_added=int((~changes.is_home).sum()),
        replicas_removed=int(replicas_removed(old, new).sum()),
        current_us=current_us,
        planned_us=_step_us(problems, new, cost),
        replica_us=sum(costs.replica_us for costs in _layer_costs(problems, new)) * cost.micro_batches,
        migration_us=migration_us(changes, ports, state_bytes(cost)),
        max_over_mean_before=_max_over_mean(trace, old, ports),
        max_over_mean_after=_max_over_mean(trace, new, ports),
        reason=reason,
    )


def _new_replicas(problems: list[LayerProblem], old: PlacementPlan, options: ReplanOptions, deadline: float) -> PlacementPlan:
    solutions = []
    for layer, problem in enumerate(problems):
        homes = Solution(old.home_rank[layer], old.hosts(layer))
        rng, until = np.random.default_rng([options.seed, layer]), _share_of_time(deadline, len(problems) - layer)
        solutions.append(add_replicas(problem, homes.home_rank, rng=rng, deadline=until, fixed_homes=True, old=homes))
    return _plan(solutions, old, options, None)


def _new_homes(problems: list[LayerProblem], old: PlacementPlan, options: ReplanOptions, deadline: float) -> PlacementPlan:
    solutions = []
    for layer, problem in enumerate(problems):
        left_s = _share_of_time(deadline, len(problems) - layer) - time.monotonic()
        solutions.append(solve_layer(problem, "memetic", seed=[options.seed, layer, 1], time_budget_s=max(left_s, 0.02)).solution)
    return _plan(solutions, old, options, interchangeable_ranks(problems[0].ports))


def _plan(solutions: list[Solution], old: PlacementPlan, options: ReplanOptions, interchangeable_G: np.ndarray | None) -> PlacementPlan:
    home_rank_LE, hosts_LEG = np.stack([s.home_rank for s in solutions]), np.stack([s.hosts for s in solutions])
    spare = options.replicas // old.num_ranks
    provenance = {"made_by": "replan", "seed": options.seed}
    plan = PlacementPlan.from_hosts(home_rank_LE, hosts_LEG, replica_slots_per_rank=spare, provenance=provenance)
    return align_plan(old, plan, interchangeable_G)


def _share_of_time(deadline: float, parts: int) -> float:
    now = time.monotonic()
    return now + max(deadline - now, 0.0) / parts


def _layer_costs(problems: list[LayerProblem], plan: PlacementPlan) -> list:
    return [solution_cost(problem, Solution(plan.home_rank[i], plan.hosts(i))) for i, problem in enumerate(problems)]


def _step_us(problems: list[LayerProblem], plan: PlacementPlan, cost: CostModel) -> float:
    """Of all layers and micro-batches of an optimizer step."""
    return sum(costs.total_us for costs in _layer_costs(problems, plan)) * cost.micro_batches


def _noise_us(trace: RoutingTrace, one: PlacementPlan, other: PlacementPlan, ports: Ports, cost: CostModel) -> float:
    """Standard error of the difference in cost of two plans over the recorded steps; 0 with one step only."""
    differences = []
    for step in range(trace.num_steps if trace.num_steps > 1 else 0):
        of_step = slice(step, step + 1)
        problems = [LayerProblem(traffic=trace.layer(layer, of_step), ports=ports, cost=cost) for layer in range(trace.num_layers)]
        differences.append(_step_us(problems, one, cost) - _step_us(problems, other, cost))
    return float(np.std(differences, ddof=1) / len(differences) ** 0.5) if differences else 0.0


def _max_over_mean(trace: RoutingTrace, plan: PlacementPlan, ports: Ports) -> float:
    """With the runtime's split of each recorded step."""
    ratios = []
    for counts_LGE in trace.counts:
        for slots_P, counts_GE in zip(plan.physical_to_logical, counts_LGE, strict=True):
            tokens_GP = split_tokens(counts_GE.astype(np.int64), slots_P, plan.num_ranks, ports.node_of_rank)
            load_G = tokens_GP.sum(axis=0).reshape(plan.num_ranks, -1).sum(axis=1)
            ratios.append(load_G.max() / load_G.mean() if load_G.any() else 1.0)
    return float(np.mean(ratios))
