"""The flags of planning, shared by plan, simulate and compare; and the plans that they ask for, one for each recorded step."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.defaults import SOLVER, TIME_BUDGET_S

if TYPE_CHECKING:
    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.topology.ports import Ports
    from megatron_scalemoe.traffic.trace import RoutingTrace

# Recorded steps that a replan looks back on.
HISTORY = 4


def add_planning_flags(
    parser: argparse.ArgumentParser, *, time_budget_s: float | None = None, solver: bool = True
) -> argparse._ArgumentGroup:
    """`--solver`, `--replicas`, `--time-budget`, `--seed`."""
    group = parser.add_argument_group("planning")
    if solver:
        group.add_argument("--solver", metavar="NAME", help=f"{SOLVER} (default), or a name that `compare` shows")
    group.add_argument("--replicas", type=int, metavar="N", help="extra slots per layer, in total over all ranks (0)")
    budget = f"{TIME_BUDGET_S:g}; 1 when replanning" if time_budget_s is None else f"{time_budget_s:g}"
    group.add_argument("--time-budget", type=float, default=time_budget_s, metavar="S", help=f"seconds for a plan of all layers ({budget})")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the solver (%(default)s)")
    return group


def add_replanning_flags(group: argparse._ArgumentGroup) -> None:
    """`--replan-every`, `--replan-lag`."""
    group.add_argument("--replan-every", type=int, metavar="N", help="make a new plan every N recorded steps (1, with --replan-lag)")
    group.add_argument("--replan-lag", type=int, metavar="N", help="its newest counts are N recorded steps old (1, with --replan-every)")


def check_planning_flags(args: argparse.Namespace) -> None:
    """Raises `ScaleMoEError` for numbers out of range."""
    for name, least in (("replicas", 0), ("replan_every", 1), ("replan_lag", 0), ("seed", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ScaleMoEError(f"--{name.replace('_', '-')} must be {least} or more", found=value)
    if args.time_budget is not None and not (math.isfinite(args.time_budget) and args.time_budget > 0):
        raise ScaleMoEError("--time-budget must be a number of seconds above 0", found=args.time_budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planning:
    """What the flags ask for. replan_every, replan_lag: None for one plan from the whole trace."""

    replicas: int
    seed: int
    time_budget_s: float
    replan_every: int | None
    replan_lag: int | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Planning:
        every, lag = args.replan_every, args.replan_lag
        if every is not None or lag is not None:
            every, lag = (1 if value is None else value for value in (every, lag))
        budget_s = args.time_budget or (TIME_BUDGET_S if every is None else 1.0)
        return cls(replicas=args.replicas or 0, seed=args.seed, time_budget_s=budget_s, replan_every=every, replan_lag=lag)

    @property
    def warm_up_steps(self) -> int:
        """The first recorded steps, before there is a plan."""
        return self.replan_lag or 0


def planned_steps(solver: str, planning: Planning, trace: RoutingTrace, ports: Ports, cost: CostModel) -> Iterable[PlacementPlan]:
    """The plan in force at each recorded step, made by `solver`. Raises `ScaleMoEError` for an unknown solver or a short trace."""
    from megatron_scalemoe.placement.migration import align_plan, interchangeable_ranks
    from megatron_scalemoe.placement.solve import check_solver, solve_trace
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.simulate.engine import replanned

    check_solver(solver)
    contiguous = PlacementPlan.contiguous(trace.num_layers, trace.num_ranks, trace.num_experts)

    def planner(trace: RoutingTrace, steps: slice, previous: PlacementPlan) -> PlacementPlan:
        options = {"solver": solver, "replicas": planning.replicas, "seed": planning.seed, "time_budget_s": planning.time_budget_s}
        return align_plan(previous, solve_trace(trace, ports, cost, steps=steps, **options).plan, interchangeable_ranks(ports))

    if planning.replan_every is None:
        return [planner(trace, slice(None), contiguous)] * trace.num_steps
    return replanned(trace, contiguous, planner, every=planning.replan_every, lag=planning.replan_lag, history=HISTORY)
