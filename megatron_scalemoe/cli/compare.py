"""`scalemoe compare`: every policy on the same trace and cluster, side by side, the contiguous placement first."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, emit, format_table
from megatron_scalemoe.cli.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.cli.inputs import load_plan_for, load_topology_and_trace
from megatron_scalemoe.cli.planning import Planning, add_planning_flags, add_replanning_flags, check_planning_flags, planned_steps
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import check_output
from megatron_scalemoe.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.plan import PlacementPlan
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
    parser.add_argument("--topology", type=Path, required=True, metavar="FILE", help="the cluster, from scalemoe topology")
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="the routing, from scalemoe trace")
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
    from megatron_scalemoe.plan import PlacementPlan

    planning = Planning.from_args(args)
    topology, trace = load_topology_and_trace(args.topology, args.trace, quiet=args.quiet)
    cost = cost_from_args(args, trace.meta)
    policies = list(dict.fromkeys([BASELINE, *(args.policies or POLICIES)]))
    if args.policies is None and planning.replicas == 0 and trace.num_experts * trace.num_ranks <= _MOST_EXACT_VARIABLES:
        policies.append(EXACT)
    for policy in policies:
        check_solver(policy)
    contiguous = PlacementPlan.contiguous(trace.num_layers, trace.num_ranks, trace.num_experts)
    fixed = {BASELINE: [contiguous] * trace.num_steps}
    fixed |= {str(path): [load_plan_for(path, trace, args.trace, topology)] * trace.num_steps for path in args.plans}
    price = _Pricing(trace, topology, cost, planning, even=args.split == "even")
    rows = []
    for policy in _with_progress(args, [*policies, *map(str, args.plans)]):
        began = time.monotonic()
        try:
            plans = list(fixed.get(policy) or price.plans(policy))
            rows.append(price.row(policy, plans, time.monotonic() - began))
        except ScaleMoEError as error:
            if policy != EXACT or args.policies:
                raise
            print(f"scalemoe: note: no exact solution: {error}", file=sys.stderr)
    made_from = {"topology": str(args.topology), "trace": str(args.trace), "cost": dataclasses.asdict(cost)}
    result = {"rows": rows, "split": args.split, "replicas": planning.replicas, **made_from}
    emit(args, result, format_result(result))
    return OK


class _Pricing:
    """What is the same for all policies: inputs, routes, ports, and the lower bound, each computed once."""

    def __init__(self, trace: RoutingTrace, topology: Topology, cost: CostModel, planning: Planning, *, even: bool):
        from megatron_scalemoe.placement.bounds import lower_bound_us
        from megatron_scalemoe.placement.problem import LayerProblem
        from megatron_scalemoe.topology.ports import ports_of
        from megatron_scalemoe.topology.routes import compute_routes

        self.trace, self.topology, self.cost, self.planning, self.even = trace, topology, cost, planning, even
        self.routes = compute_routes(topology)
        self.ports = ports_of(topology, self.routes)
        options = {"ports": self.ports, "cost": cost, "replicas": planning.replicas}
        problems = [LayerProblem(traffic=trace.layer(layer), **options) for layer in range(trace.num_layers)]
        self.lower_bound_us = sum(map(lower_bound_us, problems))

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
        gap = cost_us / self.lower_bound_us - 1 if self.lower_bound_us > 0 else 0.0
        solved = {"cost_us": cost_us, "lower_bound_us": self.lower_bound_us, "gap": gap, "seconds": seconds}
        return {"policy": policy, **replay.summary(), **solved}


def _with_progress(args: argparse.Namespace, policies: list[str]):
    """On a terminal only."""
    from tqdm import tqdm

    return tqdm(policies, unit="policy", desc="compare", file=sys.stderr, leave=False, disable=True if args.quiet else None)


def format_result(result: dict) -> str:
    """The table that people read, and a line of what it means."""
    rows, baseline = result["rows"], result["rows"][0]
    headers = ["policy", "step ms", "speed", "dispatch", "combine", "compute", "replicas", "max/mean", "p95", "scale-out", "gap", "plan s"]
    cells = [
        [
            row["policy"],
            f"{row['step_us'] / 1e3:.3f}",
            f"{baseline['step_us'] / row['step_us']:.2f}x",
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
    note = f"Fastest: {best['policy']}, {baseline['step_us'] / best['step_us']:.2f}x the speed of {BASELINE}."
    if baseline["warm_up_steps"]:
        note += f" The first {baseline['warm_up_steps']} recorded steps, before the first plan, are left out."
    times = f"Times are of one micro-batch through all MoE layers, mean of {baseline['steps']} recorded steps"
    return f"{format_table(headers, cells)}\n\n{note}\n{times}; the gap is from a lower bound to the cost of the mean traffic."
