"""`plan_trace`: from a routing trace and a cluster to a placement plan, and what it costs there. The planner's front door.

report = plan_trace(PlanRequest(trace=load_trace("routing.npz"), topology=load_topology("cluster.yaml"), replicas=64))
save_plan(report.plan, Path("plan.json"))
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import PlanCost, plan_cost
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.bound import gap_to
from megatron_scalemoe.placement.defaults import SOLVER, TIME_BUDGET_S
from megatron_scalemoe.placement.solve import SolveResult, check_solver, solve_trace
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.traffic.trace import RoutingTrace


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PlanRequest:
    """What to plan, for which cluster, and how hard to search. Raises `ScaleMoEError` on what cannot be.

    topology: of as many ranks as the trace. replicas: extra slots per layer, in total over all ranks.
    time_budget_s: a limit, for all layers together. last_steps: plan from so many recorded steps only. shared: one placement for all
    layers, from their mean traffic.
    """

    trace: RoutingTrace
    topology: Topology
    cost: CostModel = dataclasses.field(default_factory=CostModel)
    solver: str = SOLVER
    replicas: int = 0
    seed: int = 0
    time_budget_s: float = TIME_BUDGET_S
    last_steps: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        check_solver(self.solver)
        for name, least in (("replicas", 0), ("seed", 0), ("last_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ScaleMoEError(f"must be {least} or more", found=value, field=(name,))
        if not (math.isfinite(self.time_budget_s) and self.time_budget_s > 0):
            raise ScaleMoEError("must be a number of seconds above 0", found=self.time_budget_s, field=("time_budget_s",))
        if (self.last_steps or 0) > self.trace.num_steps:
            problem = f"must be at most the {self.trace.num_steps} recorded steps"
            raise ScaleMoEError(problem, found=self.last_steps, field=("last_steps",))

    @functools.cached_property
    def links(self) -> Links:
        return Links(self.topology)

    @property
    def steps(self) -> slice:
        """Of the trace."""
        return slice(-self.last_steps, None) if self.last_steps else slice(None)

    @property
    def contiguous(self) -> PlacementPlan:
        """Megatron's own placement, with which every plan is compared."""
        return PlacementPlan.contiguous(self.trace.num_layers, self.trace.num_ranks, self.trace.num_experts)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PlanReport:
    """A plan, and what it costs on the links beside the contiguous placement, both for the mean traffic of the request's steps.

    solved: the search, layer by layer, with costs at the ports.
    """

    plan: PlacementPlan
    cost: PlanCost
    baseline: PlanCost
    solved: SolveResult

    @property
    def lower_bound_us(self) -> float | None:
        """What no placement can be below; None where we know of no bound that tells anything."""
        return self.solved.lower_bound_us

    @property
    def gap(self) -> float | None:
        return gap_to(self.lower_bound_us, self.cost.total_us)


def plan_trace(request: PlanRequest, *, progress: Callable[[int, int], None] | None = None) -> PlanReport:
    """Plans, and prices the plan. progress: called with (layers done, layers to do). Raises `ScaleMoEError` for input that does not fit."""
    trace, links, topology = request.trace, request.links, request.topology
    names = ("solver", "replicas", "seed", "time_budget_s", "steps", "shared")
    options = {name: getattr(request, name) for name in names}
    solved = solve_trace(trace, links.ports, request.cost, links=links, progress=progress, **options)
    of_topology = {"topology": topology.name, "topology_hash": topology.content_hash, "node_of_rank": topology.node_of_rank.tolist()}
    plan = dataclasses.replace(solved.plan, provenance={**solved.plan.provenance, **of_topology})
    cost, baseline = (plan_cost(p, trace, links, request.cost, steps=request.steps) for p in (plan, request.contiguous))
    return PlanReport(plan=plan, cost=cost, baseline=baseline, solved=solved)
