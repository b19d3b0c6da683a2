"""`scalemoe diff`: what changes from a plan to another: which experts move and, with trace and topology, what that costs and gains."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.cli.planning.requests import load_plan_for, load_topology_for, load_trace_file
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.units import format_bytes

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
    add_output_flags(parser)
    add_cost_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Compares and prints."""
    check_output(args.output, force=args.force)
    from megatron_scalemoe.cost.network import Links
    from megatron_scalemoe.placement.replan.plan_diff import diff_plans
    from megatron_scalemoe.placement.replan.policy import ReplanPolicy
    from megatron_scalemoe.plan.placement_plan import load_plan

    if args.horizon < 1:
        raise ScaleMoEError("--horizon must be 1 or more", found=args.horizon)
    trace = None if args.trace is None else load_trace_file(args.trace)
    old, new = (load_plan(path) if trace is None else load_plan_for(path, trace, args.trace, "diff") for path in (args.old, args.new))
    links = None
    if args.topology is not None:
        links = Links(load_topology_for(args.topology, old.num_ranks, args.trace or args.old, quiet=args.quiet))
    cost = cost_from_args(args, None if trace is None else trace.meta)
    try:
        result = diff_plans(old, new, cost, links=links, trace=trace, policy=ReplanPolicy(horizon_steps=args.horizon))
    except ScaleMoEError as error:
        raise ScaleMoEError(f"{args.old} and {args.new}: {error}") from error
    emit(args, result, format_result(**result))
    return OK


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
