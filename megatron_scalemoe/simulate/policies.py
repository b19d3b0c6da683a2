"""Policies side by side: the plans that solvers make for a trace, fixed or remade on the way, replayed and judged alike."""

from __future__ import annotations

import time
from collections.abc import Iterable

from megatron_scalemoe.cost.bottleneck import bottleneck
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.placement.bound import gap_to, lower_bound_us
from megatron_scalemoe.placement.defaults import BASELINE
from megatron_scalemoe.placement.migration import align_plan, interchangeable_ranks
from megatron_scalemoe.placement.plan_trace import PlanRequest
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solve import check_solver, solve_trace
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.simulate.engine import Replanning, replanned, replay
from megatron_scalemoe.traffic.trace import RoutingTrace

# Of the iterations of a plan, where many are made.
_REPLANNING_EFFORT = 0.125


def planned_steps(request: PlanRequest, replanning: Replanning | None = None, *, solver: str | None = None) -> Iterable[PlacementPlan]:
    """The plan in force at each recorded step; None for one plan from the whole trace. solver: in place of the request's.

    Raises `ScaleMoEError` for an unknown solver or a short trace, before the first plan is made.
    """
    solver = solver or request.solver
    check_solver(solver)
    trace, ports = request.trace, request.links.ports
    options = {"solver": solver, "replicas": request.replicas, "seed": request.seed, "time_budget_s": request.time_budget_s}
    options["effort"] = 1.0 if replanning is None else _REPLANNING_EFFORT

    def planner(trace: RoutingTrace, steps: slice, previous: PlacementPlan) -> PlacementPlan:
        made = solve_trace(trace, ports, request.cost, links=request.links, steps=steps, **options).plan
        return align_plan(previous, made, interchangeable_ranks(ports))

    if replanning is None:
        return [planner(trace, slice(None), request.contiguous)] * trace.num_steps
    return replanned(trace, request.contiguous, planner, replanning)


class Comparison:
    """Judges plans by a replay of the request's trace, and by the cost of its mean traffic beside the lower bound.

    replanning: None for one plan from the whole trace. even: split tokens evenly over copies. Raises `ScaleMoEError` for a short trace.
    """

    def __init__(self, request: PlanRequest, replanning: Replanning | None = None, *, even: bool = False):
        if replanning is not None:
            replanning.check(request.trace)
        self.request, self.replanning, self.even = request, replanning, even
        self._bounds_us: dict[int, float] = {}

    def row_of_solver(self, solver: str) -> dict:
        """Plans, unless it is the baseline; then as `row`."""
        began = time.monotonic()
        if solver == BASELINE:
            return self.row(solver, self.request.contiguous)
        plans = list(planned_steps(self.request, self.replanning, solver=solver))
        return self.row(solver, plans, time.monotonic() - began)

    def row(self, name: str, plans: PlacementPlan | list[PlacementPlan], seconds: float = 0.0) -> dict:
        """The replay's summary, and the cost of the last plan under the trace's mean traffic. seconds: that the plans took."""
        request = self.request
        plans = [plans] * request.trace.num_steps if isinstance(plans, PlacementPlan) else plans
        warm_up_steps = self.replanning.lag if self.replanning else 0
        replayed = replay(request.trace, plans, request.links, request.cost, even=self.even, warm_up_steps=warm_up_steps)
        cost_us = plan_cost(plans[-1], request.trace, request.links, request.cost, even=self.even).total_us
        bound_us = self._lower_bound_us(plans)
        gap = gap_to(bound_us, cost_us)
        solved = {"cost_us": cost_us, "lower_bound_us": None if gap is None else bound_us, "gap": gap, "seconds": seconds}
        slowest = bottleneck(replayed.worst_step, request.links)._asdict()
        return {"policy": name, **replayed.summary(), **solved, "bottleneck": slowest}

    def _lower_bound_us(self, plans: list[PlacementPlan]) -> float:
        """No placement with as many slots as `plans`, or as the request allows, costs less. Of a plan file, the slots may be more."""
        trace = self.request.trace
        slots = max(plan.physical_to_logical.shape[1] for plan in plans)
        replicas = min(max(self.request.replicas, slots - trace.num_experts), trace.num_experts * (trace.num_ranks - 1))
        if replicas not in self._bounds_us:
            options = {"ports": self.request.links.ports, "cost": self.request.cost, "replicas": replicas}
            problems = [LayerProblem(traffic=trace.layer(layer), **options) for layer in range(trace.num_layers)]
            self._bounds_us[replicas] = sum(map(lower_bound_us, problems))
        return self._bounds_us[replicas]
