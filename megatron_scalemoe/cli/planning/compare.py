"""`scalemoe compare`: every policy on the same trace and cluster, side by side, the contiguous placement first."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, emit, format_table, progress_bar
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.cli.planning.inputs import add_input_flags, load_plan_for, load_topology_and_trace
from megatron_scalemoe.cli.planning.requests import (
    Planning,
    add_planning_flags,
    add_replanning_flags,
    check_planning_flags,
    planned_steps,
)
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.gap import gap_to
from megatron_scalemoe.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.topology.graph import Topology
    from megatron_scalemoe.traffic.trace import RoutingTrace

BASELINE = "contiguous"
POLICIES = (BASELINE, "random", "greedy", "hierarchical", "genetic", "memetic")
EXACT = "exact"
# Above this the proof takes longer than anyone waits for a table.
_MOST_EXACT_VARIABLES = 200


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `compare` to the command line."""
    about = "all policies on one trace and cluster, side by side"
    parser = commands.add_parser("compare", help=about, allow_abbrev=False, description=__doc__)
    add_input_flags(parser)
    parser.add_argument("--policies", nargs="+", metavar="NAME", help=f"solvers (default: {', '.join(POLICIES)}, and {EXACT} if small)")
    parser.add_argument("--plans", nargs="+", type=Path, default=[], metavar="FILE", help="plans to compare too, from scalemoe plan")
    parser.add_argument(
        "--split", choices=("balanced", "even"), default="balanced", help="tokens between copies of an expert (%(default)s)"
    )
    add_replanning_flags(add_planning_flags(parser, solver=False))
    add_cost_flags(parser)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Plans and replays with each policy."""
    check_planning_flags(args)
    check_output(args.output, force=args.force)
    from megatron_scalemoe.placement.solve import check_solver
    from megatron_scalemoe.plan.placement_plan import PlacementPlan

    planning = Planning.from_args(args)
    topology, trace = load_topology_and_trace(args.topology, args.trace, quiet=args.quiet)
    if planning.warm_up_steps >= trace.num_steps:
        problem = f"--replan-lag must be less than the {trace.num_steps} recorded steps of {args.trace}"
        raise ScaleMoEError(problem, found=planning.warm_up_steps)
    cost = cost_from_args(args, trace.meta)
    policies = list(dict.fromkeys([BASELINE, *(args.policies or POLICIES)]))
    if args.policies is None and planning.replicas == 0 and trace.num_experts * trace.num_ranks <= _MOST_EXACT_VARIABLES:
        policies.append(EXACT)
    for policy in policies:
        check_solver(policy)
    contiguous = PlacementPlan.contiguous(trace.num_layers, trace.num_ranks, trace.num_experts)
    # A file may have the name of a solver: a plan goes with each name, or None where one is to be made.
    candidates = [(policy, contiguous if policy == BASELINE else None) for policy in policies]
    candidates += [(str(path), load_plan_for(path, trace, args.trace, topology)) for path in args.plans]
    price = _Pricing(trace, topology, cost, planning, even=args.split == "even")
    rows = []
    bar = progress_bar(args, len(candidates), "policy")
    for policy, plan in candidates:
        began = time.monotonic()
        try:
            plans = [plan] * trace.num_steps if plan else list(price.plans(policy))
            rows.append(price.row(policy, plans, time.monotonic() - began))
        except ScaleMoEError as error:
            if policy != EXACT or args.policies:
                raise
            if not args.quiet:
                print(f"scalemoe: note: no exact solution: {error}", file=sys.stderr)
        bar.update()
    bar.close()
    made_from = {"topology": str(args.topology), "trace": str(args.trace), "cost": dataclasses.asdict(cost)}
    result = {"rows": rows, "split": args.split, "replicas": planning.replicas, **made_from}
    emit(args, result, format_result(result))
    return OK


class _Pricing:
    """What is the same for all policies: inputs, routes, ports, and the lower bounds, each computed once."""

    def __init__(self, trace: RoutingTrace, topology: Topology, cost: CostModel, planning: Planning, *, even: bool):
        from megatron_scalemoe.topology.ports import ports_of
        from megatron_scalemoe.topology.routes import compute_routes

        self.trace, self.topology, self.cost, self.planning, self.even = trace, topology, cost, planning, even
        self.routes = compute_routes(topology)
        self.ports = ports_of(topology, self.routes)
        self._bounds_us: dict[int, float] = {}

    def lower_bound_us(self, plans: list[PlacementPlan]) -> float:
        """No placement with as many slots as `plans`, or as the flags allow, costs less. Of a plan file, the slots may be more."""
        from megatron_scalemoe.placement.bound import lower_bound_us
        from megatron_scalemoe.placement.problem import LayerProblem

        experts, ranks = self.trace.num_experts, self.trace.num_ranks
        slots = max(plan.physical_to_logical.shape[1] for plan in plans)
        replicas = min(max(self.planning.replicas, slots - experts), experts * (ranks - 1))
        if replicas not in self._bounds_us:
            options = {"ports": self.ports, "cost": self.cost, "replicas": replicas}
            problems = [LayerProblem(traffic=self.trace.layer(layer), **options) for layer in range(self.trace.num_layers)]
            self._bounds_us[replicas] = sum(map(lower_bound_us, problems))
        return self._bounds_us[replicas]

    def plans(self, policy: str) -> Iterable[PlacementPlan]:
        return planned_steps(policy, self.planning, self.trace, self.ports, self.cost)

    def row(self, policy: str, plans: list[PlacementPlan], seconds: float) -> dict:
        """The replay's summary, and the cost of the last plan under the trace's mean traffic. seconds: that the plans took."""
        from megatron_scalemoe.cost.layer import plan_cost
        from megatron_scalemoe.simulate.engine import replay_plans

        inputs = (self.routes, self.topology, self.cost)
        replay = replay_plans(self.trace, plans, *inputs, even=self.even, warm_up_steps=self.planning.warm_up_steps)
        layers = range(self.trace.num_layers)
        cost_us = sum(plan_cost(plans[-1], i, self.trace.layer(i), *inputs, even=self.even).total_us for i in layers)
        bound_us = self.lower_bound_us(plans)
        solved = {"cost_us": cost_us, "lower_bound_us": bound_us, "gap": gap_to(bound_us, cost_us), "seconds": seconds}
        return {"policy": policy, **replay.summary(), **solved}


def format_result(result: dict) -> str:
    """The table that people read, and a line of what it means."""
    rows, baseline = result["rows"], result["rows"][0]
    headers = ["policy", "step ms", "speed", "dispatch", "combine", "compute", "replicas", "max/mean", "p95", "scale-out", "gap", "plan s"]
    cells = [
        [
            row["policy"],
            f"{row['step_us'] / 1e3:.3f}",
            f"{_speed(row, baseline):.2f}x",
            *(f"{row[f'{part}_us'] / 1e3:.3f}" for part in ("dispatch", "combine", "compute", "replica")),
            f"{row['max_over_mean_mean']:.3f}",
            f"{row['max_over_mean_p95']:.3f}",
            format_bytes(row["bytes_scale_out"]),
            f"{row['gap']:.1%}",
            f"{row['seconds']:.2f}",
        ]
        for row in rows
    ]
    best = min(rows, key=lambda row: row["step_us"])
    note = f"Fastest: {best['policy']}, {_speed(best, baseline):.2f}x the speed of {BASELINE}."
    if baseline["warm_up_steps"]:
        note += f" The first {baseline['warm_up_steps']} recorded steps, before the first plan, are left out."
    times = f"Times are of one micro-batch through all MoE layers, mean of {baseline['steps']} recorded steps"
    gap = "the gap is from a lower bound, for as many slots, to the cost of the mean traffic"
    return f"{format_table(headers, cells)}\n\n{note}\n{times}; {gap}."


def _speed(row: dict, baseline: dict) -> float:
    return baseline["step_us"] / row["step_us"] if row["step_us"] else 1.0
