"""`scalemoe diff`: what changes from a plan to another: which experts move and, with trace and topology, what that costs and gains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.cli.planning.inputs import load_topology_and_trace
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.units import format_bytes

if TYPE_CHECKING:
    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.topology.graph import Topology
    from megatron_scalemoe.topology.routes import Routes
    from megatron_scalemoe.traffic.trace import RoutingTrace

# (key, header, format)
COLUMNS = (
    ("layer", "layer", "d"),
    ("homes_moved", "homes moved", "d"),
    ("replicas_added", "replicas added", "d"),
    ("replicas_removed", "removed", "d"),
    ("rounds", "rounds", "d"),
    ("max_over_mean_old", "max/mean old", ".3f"),
    ("max_over_mean_new", "new", ".3f"),
    ("cost_us_old", "us old", ".0f"),
    ("cost_us_new", "new", ".0f"),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `diff` to the command line."""
    parser = commands.add_parser("diff", help="two plans: moves, bytes, balance before and after", allow_abbrev=False, description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="the plan in force")
    parser.add_argument("new", type=Path, metavar="NEW", help="the plan to follow it")
    parser.add_argument("--topology", type=Path, metavar="FILE", help="the cluster: adds the time of the migration")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the routing: adds the balance, and with --topology the cost")
    parser.add_argument("--horizon", type=int, default=500, metavar="STEPS", help="optimizer steps to pay back a migration (%(default)s)")
    add_cost_flags(parser)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Compares and prints."""
    check_output(args.output, force=args.force)
    if args.horizon < 1:
        raise ScaleMoEError("--horizon must be 1 or more", found=args.horizon)
    from megatron_scalemoe.placement.migration import state_bytes
    from megatron_scalemoe.plan.placement_plan import load_plan

    old, new = load_plan(args.old), load_plan(args.new)
    topology, trace = _inputs(args, old)
    cost = cost_from_args(args, None if trace is None else trace.meta)
    try:
        layers = _moves_of_layers(old, new)
    except ScaleMoEError as error:
        raise ScaleMoEError(f"{args.old} and {args.new}: {error}") from error
    total = {key: sum(layer[key] for layer in layers) for key in ("homes_moved", "replicas_added", "replicas_removed", "rounds")}
    total["bytes"] = total["homes_moved"] * state_bytes(cost)
    routes = None
    if topology is not None:
        from megatron_scalemoe.topology.routes import compute_routes

        routes = compute_routes(topology)
        total |= _migration(old, new, topology, routes, cost)
    if trace is not None:
        for name, plan in (("old", old), ("new", new)):
            for layer, facts in zip(layers, _facts_of_layers(plan, trace, topology, routes, cost), strict=True):
                layer |= {f"{key}_{name}": value for key, value in facts.items()}
        total |= _totals(layers)
    if trace is not None and topology is not None:
        total |= _decision(total, cost.micro_batches, args.horizon)
    emit(args, {"layers": layers, "total": total}, format_result(layers, total))
    return OK


def _inputs(args: argparse.Namespace, plan: PlacementPlan) -> tuple[Topology | None, RoutingTrace | None]:
    """The files that were given, as large as the plans need them."""
    topology = trace = None
    if args.topology is not None and args.trace is not None:
        topology, trace = load_topology_and_trace(args.topology, args.trace, quiet=args.quiet)
    elif args.topology is not None:
        from megatron_scalemoe.topology.topology_file import load_topology

        topology = load_topology(args.topology)
        if topology.num_ranks < plan.num_ranks:
            found = f"{topology.num_ranks} GPUs, {plan.num_ranks} ranks"
            raise ScaleMoEError(f"{args.topology} must have a GPU for each rank of {args.old}", found=found)
        topology = topology.subset(plan.num_ranks)
    elif args.trace is not None:
        from megatron_scalemoe.traffic.trace import load_trace

        trace = load_trace(args.trace)
    if trace is not None:
        shapes = [(p.num_layers, p.num_ranks, e) for p, e in ((trace, trace.num_experts), (plan, plan.num_logical_experts))]
        if shapes[0] != shapes[1]:
            found = " and ".join(f"{layers} layers, {ranks} ranks, {experts} experts" for layers, ranks, experts in shapes)
            raise ScaleMoEError(f"{args.trace} and {args.old} must be for the same layers, ranks and experts", found=found)
    return topology, trace


def _moves_of_layers(old: PlacementPlan, new: PlacementPlan) -> list[dict]:
    """Counts for each layer."""
    import numpy as np

    from megatron_scalemoe.placement.migration import moves, replicas_removed, rounds

    moved, removed_L = moves(old, new), replicas_removed(old, new)
    rounds_L = np.bincount([moved.layer[chosen[0]] for chosen in rounds(moved, new.num_ranks)], minlength=new.num_layers)
    homes_L = np.bincount(moved.layer[moved.is_home], minlength=new.num_layers)
    added_L = np.bincount(moved.layer[~moved.is_home], minlength=new.num_layers)
    counts = zip(homes_L, added_L, removed_L, rounds_L, strict=True)
    keys = ("homes_moved", "replicas_added", "replicas_removed", "rounds")
    return [{"layer": layer, **dict(zip(keys, map(int, row), strict=True))} for layer, row in enumerate(counts)]


def _migration(old: PlacementPlan, new: PlacementPlan, topology: Topology, routes: Routes, cost: CostModel) -> dict:
    """Time on this cluster, and how many homes would move if interchangeable ranks took each other's experts."""
    from megatron_scalemoe.placement.migration import align_plan, interchangeable_ranks, migration_us, moves, state_bytes
    from megatron_scalemoe.topology.ports import ports_of

    ports = ports_of(topology, routes)
    aligned = align_plan(old, new, interchangeable_ranks(ports))
    return {
        "migration_us": migration_us(moves(old, new), ports, state_bytes(cost)),
        "homes_moved_if_aligned": moves(old, aligned).num_homes,
    }


def _facts_of_layers(
    plan: PlacementPlan, trace: RoutingTrace, topology: Topology | None, routes: Routes | None, cost: CostModel
) -> list[dict]:
    """Balance, and with a topology the cost, of each layer under a plan and the mean traffic."""
    import numpy as np

    from megatron_scalemoe.cost.layer import plan_cost
    from megatron_scalemoe.plan.split import balanced_shares

    facts = []
    for layer in range(plan.num_layers):
        traffic = trace.layer(layer)
        if topology is not None and routes is not None:
            priced = plan_cost(plan, layer, traffic, routes, topology, cost)
            facts.append({"max_over_mean": priced.max_over_mean, "cost_us": priced.total_us})
            continue
        load_E = traffic.counts.sum(axis=0)
        load_G = load_E @ balanced_shares(load_E, plan.hosts(layer))
        facts.append({"max_over_mean": float(load_G.max() / load_G.mean()) if np.any(load_G) else 1.0})
    return facts


def _totals(layers: list[dict]) -> dict:
    """Mean balance, and summed cost, over the layers."""
    total = {}
    for name in ("old", "new"):
        total[f"max_over_mean_{name}"] = sum(layer[f"max_over_mean_{name}"] for layer in layers) / len(layers)
        if f"cost_us_{name}" in layers[0]:
            total[f"cost_us_{name}"] = sum(layer[f"cost_us_{name}"] for layer in layers)
    return total


def _decision(total: dict, micro_batches: int, horizon_steps: int) -> dict:
    """Whether to move, as `placement.replan.policy` sees it, by optimizer steps."""
    from megatron_scalemoe.placement.replan.policy import ReplanPolicy, should_replan

    old_us, new_us = total["cost_us_old"] * micro_batches, total["cost_us_new"] * micro_batches
    decision = should_replan(old_us, new_us, total["migration_us"], ReplanPolicy(horizon_steps=horizon_steps))
    return {"replan": decision.replan, "reason": decision.reason}


def format_result(layers: list[dict], total: dict) -> str:
    """The layers that change, then all of them in words."""
    columns = [column for column in COLUMNS if column[0] in layers[0]]
    counted = ("homes_moved", "replicas_added", "replicas_removed")
    changed = [layer for layer in layers if any(layer[key] for key in counted)]
    lines = []
    if changed:
        rows = [[format(layer[key], form) for key, _, form in columns] for layer in changed]
        lines = [format_table([header for _, header, _ in columns], rows), ""]
    lines.append(f"{len(changed)} of {len(layers)} layers change.")
    if not changed:
        return lines[0]
    homes = f"{total['homes_moved']} homes move, {format_bytes(total['bytes'])} with optimizer state, in {total['rounds']} rounds"
    if "migration_us" in total:
        homes += f" that take {total['migration_us'] / 1e3:.3g} ms"
    lines.append(f"{homes}.")
    fewer = total.get("homes_moved_if_aligned", total["homes_moved"])
    if fewer < total["homes_moved"]:
        lines.append(f"Only {fewer} would move if ranks with equal ports in one node took each other's experts.")
    lines.append(f"{total['replicas_added']} replicas come and {total['replicas_removed']} go: they move nothing.")
    if "max_over_mean_old" in total:
        lines.append(f"Max/mean rank load: {total['max_over_mean_old']:.3f} before, {total['max_over_mean_new']:.3f} after.")
    if "cost_us_old" in total:
        lines.append(f"All layers, one micro-batch: {total['cost_us_old']:.0f} us before, {total['cost_us_new']:.0f} us after.")
        lines.append(f"{'Worth moving' if total['replan'] else 'Not worth moving'}: {total['reason']}.")
    return "\n".join(lines)
