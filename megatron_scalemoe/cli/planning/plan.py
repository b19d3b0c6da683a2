"""`scalemoe plan`: from a topology and a trace to a placement plan, with its cost, a lower bound and the gap between them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, format_table, print_result, progress_bar
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.cli.planning.inputs import add_input_flags, load_topology_and_trace
from megatron_scalemoe.cli.planning.requests import add_planning_flags, check_planning_flags
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.defaults import SOLVER, TIME_BUDGET_S
from megatron_scalemoe.placement.gap import gap_to
from megatron_scalemoe.units import format_bytes

if TYPE_CHECKING:
    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.placement.solve import SolveResult
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.topology.graph import Topology
    from megatron_scalemoe.topology.routes import Routes
    from megatron_scalemoe.traffic.trace import RoutingTrace

BASELINE = "contiguous"
# Points of a search's course that are kept per layer, for the report.
_MAX_HISTORY = 50


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `plan` to the command line."""
    about = "find where experts, and replicas of the hot ones, should live"
    parser = commands.add_parser("plan", help=about, allow_abbrev=False, description=__doc__)
    add_input_flags(parser)
    add_planning_flags(parser, time_budget_s=TIME_BUDGET_S)
    parser.add_argument("--last-steps", type=int, metavar="N", help="plan from the last N recorded steps (default: all)")
    parser.add_argument("--shared", action="store_true", help="one placement for all layers, from their mean traffic")
    add_cost_flags(parser)
    add_output_flags(parser, output_help="write the plan to FILE")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Plans, writes the plan, prints what it costs beside the contiguous placement."""
    check_planning_flags(args)
    if args.last_steps is not None and args.last_steps < 1:
        raise ScaleMoEError("--last-steps must be 1 or more", found=args.last_steps)
    check_output(args.output, force=args.force)
    from megatron_scalemoe.placement.solve import solve_trace
    from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
    from megatron_scalemoe.topology.ports import ports_of
    from megatron_scalemoe.topology.routes import compute_routes

    topology, trace = load_topology_and_trace(args.topology, args.trace, quiet=args.quiet)
    if (args.last_steps or 0) > trace.num_steps:
        raise ScaleMoEError(f"--last-steps must be at most the {trace.num_steps} recorded steps of {args.trace}", found=args.last_steps)
    cost = cost_from_args(args, trace.meta)
    routes = compute_routes(topology)
    steps = slice(-args.last_steps, None) if args.last_steps else slice(None)
    options = {"solver": args.solver or SOLVER, "replicas": args.replicas or 0, "seed": args.seed, "shared": args.shared}
    with progress_bar(args, trace.num_layers, "layer") as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        result = solve_trace(
            trace, ports_of(topology, routes), cost, time_budget_s=args.time_budget, steps=steps, progress=progress, **options
        )
    plan = _with_topology(result.plan, topology)
    contiguous = PlacementPlan.contiguous(trace.num_layers, trace.num_ranks, trace.num_experts)
    priced = [_price(p, trace, steps, routes, topology, cost) for p in (plan, contiguous)]
    if args.output is not None:
        save_plan(plan, args.output, force=args.force)
    content = _result(args, result, plan, *priced) | {"cost": dataclasses.asdict(cost)}
    print_result(args, content, format_result(content))
    return OK


def _with_topology(plan: PlacementPlan, topology: Topology) -> PlacementPlan:
    of_topology = {"topology": topology.name, "topology_hash": topology.content_hash, "node_of_rank": topology.node_of_rank.tolist()}
    return dataclasses.replace(plan, provenance={**plan.provenance, **of_topology})


def _price(plan: PlacementPlan, trace: RoutingTrace, steps: slice, routes: Routes, topology: Topology, cost: CostModel) -> dict:
    """The mean traffic of `steps` under a plan, on the links: sums over the layers, and the balance."""
    from megatron_scalemoe.cost.layer import plan_cost

    layers = [plan_cost(plan, i, trace.layer(i, steps), routes, topology, cost) for i in range(trace.num_layers)]
    balance = [layer.max_over_mean for layer in layers]
    return {
        "cost_us": sum(layer.total_us for layer in layers),
        "max_over_mean": sum(balance) / len(balance),
        "max_over_mean_worst": max(balance),
        "bytes_scale_out": sum(layer.bytes_scale_out for layer in layers),
        "replica_us": sum(layer.replica_us for layer in layers),
        "layer_cost_us": [layer.total_us for layer in layers],
    }


def _result(args: argparse.Namespace, result: SolveResult, plan: PlacementPlan, price: dict, baseline: dict) -> dict:
    bound_us = result.lower_bound_us
    layer_costs = price.pop("layer_cost_us")
    baseline.pop("layer_cost_us")
    return {
        "solver": plan.provenance["solver"],
        **price,
        "lower_bound_us": bound_us,
        "gap": gap_to(bound_us, price["cost_us"]),
        "seconds": result.seconds,
        "replicas": int(plan.num_replicas.sum()),
        "replica_slots": int(plan.num_layers * (args.replicas or 0)),
        "plan": str(args.output) if args.output else None,
        "plan_hash": plan.content_hash,
        "baseline": {"solver": BASELINE, **baseline},
        "layers": [
            {"cost_us": c, "lower_bound_us": r.lower_bound_us, "history": [list(p) for p in _thinned(r.history)]}
            for c, r in zip(layer_costs, result.layers, strict=True)
        ],
    }


def _thinned(history: tuple) -> list:
    """At most `_MAX_HISTORY` points, the last one among them."""
    step = -(-len(history) // _MAX_HISTORY)
    return list(history[::-1][::step][::-1])


def format_result(result: dict) -> str:
    """The table that people read, and what was written."""
    base = result["baseline"]
    rows = [
        ["cost, all layers", f"{base['cost_us'] / 1e3:.3f} ms", f"{result['cost_us'] / 1e3:.3f} ms"],
        ["lower bound", "", f"{result['lower_bound_us'] / 1e3:.3f} ms"],
        ["gap to it", f"{gap_to(result['lower_bound_us'], base['cost_us']):.1%}", f"{result['gap']:.1%}"],
        ["max/mean rank load, mean", f"{base['max_over_mean']:.3f}", f"{result['max_over_mean']:.3f}"],
        ["max/mean rank load, worst", f"{base['max_over_mean_worst']:.3f}", f"{result['max_over_mean_worst']:.3f}"],
        ["bytes scale-out", format_bytes(base["bytes_scale_out"]), format_bytes(result["bytes_scale_out"])],
        ["replicas used", "0", f"{result['replicas']} of {result['replica_slots']} slots"],
        ["  their price", "0.000 ms", f"{result['replica_us'] / 1e3:.3f} ms"],
        ["seconds", "", f"{result['seconds']:.2f}"],
    ]
    table = format_table(["", BASELINE, result["solver"]], rows)
    faster = base["cost_us"] / result["cost_us"] if result["cost_us"] else 1.0
    note = f"{faster:.2f}x the speed of the contiguous placement, for one micro-batch of the trace's mean traffic."
    if result["replicas"] < result["replica_slots"]:
        note += "\nReplica slots stay empty where the solver found no replica that saves more than it costs."
    return f"{table}\n\n{note}" + (
        f"\nWrote {result['plan']}" if result["plan"] else "\nNothing was written: add -o plan.json to keep the plan."
    )
