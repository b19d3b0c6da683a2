"""`scalemoe compare`: every policy on the same trace and cluster, side by side, the contiguous placement first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, emit, format_table, progress_bar
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags
from megatron_scalemoe.cli.planning.requests import (
    add_input_flags,
    add_planning_flags,
    add_split_flag,
    load_plan_for,
    replanning_from_args,
    request_from_args,
)
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.defaults import BASELINE
from megatron_scalemoe.units import format_bytes

if TYPE_CHECKING:
    from megatron_scalemoe.placement.plan_trace import PlanRequest

POLICIES = (BASELINE, "random", "greedy", "hierarchical", "genetic", "local_search")
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
    add_split_flag(parser)
    add_planning_flags(parser, solver=False)
    add_output_flags(parser)
    add_cost_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Plans and replays with each policy."""
    check_output(args.output, force=args.force)
    from megatron_scalemoe.placement.solve import check_solver
    from megatron_scalemoe.simulate.policies import Comparison

    replanning = replanning_from_args(args)
    request = request_from_args(args)
    policies = _policies(args, request)
    for policy in policies:
        check_solver(policy)
    # A file may have the name of a solver.
    plans = [(path, load_plan_for(path, request.trace, args.trace, "--plans")) for path in args.plans]
    comparison = Comparison(request, replanning, even=args.split == "even")
    rows = []
    with progress_bar(args, len(policies) + len(plans), "policy") as bar:
        for policy in policies:
            try:
                rows.append(comparison.row_of_solver(policy))
            except ScaleMoEError as error:
                if policy != EXACT or args.policies:
                    raise
                if not args.quiet:
                    print(f"scalemoe: note: no exact solution: {error}", file=sys.stderr)
            bar.update()
        for path, plan in plans:
            rows.append(comparison.row(str(path), plan))
            bar.update()
    made_from = {"topology": str(args.topology), "trace": str(args.trace), "cost": request.cost.model_dump()}
    result = {"rows": rows, "split": args.split, "replicas": request.replicas, **made_from}
    emit(args, result, format_result(result))
    return OK


def _policies(args: argparse.Namespace, request: PlanRequest) -> list[str]:
    policies = list(dict.fromkeys([BASELINE, *(args.policies or POLICIES)]))
    small = request.trace.num_experts * request.trace.num_ranks <= _MOST_EXACT_VARIABLES
    return [*policies, EXACT] if args.policies is None and request.replicas == 0 and small else policies


def format_result(result: dict) -> str:
    """The table that people read, and a line of what it means."""
    from megatron_scalemoe.cost.bottleneck import Bottleneck

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
            "" if row["gap"] is None else f"{row['gap']:.1%}",
            f"{row['seconds']:.2f}",
        ]
        for row in rows
    ]
    best = min(rows, key=lambda row: row["step_us"])
    note = f"Fastest: {best['policy']}, {_speed(best, baseline):.2f}x the speed of {BASELINE}."
    if baseline["warm_up_steps"]:
        note += f" The first {baseline['warm_up_steps']} recorded steps, before the first plan, are left out."
    slowest = Bottleneck(**best["bottleneck"])
    times = f"Times are of one micro-batch through all MoE layers, mean of {baseline['steps']} recorded steps"
    if baseline["idle_steps"]:
        times += f" (not of {baseline['idle_steps']} without tokens)"
    if any(row["gap"] is not None for row in rows):
        times += "; the gap is from a lower bound, for as many slots, to the cost of the mean traffic"
    return f"{format_table(headers, cells)}\n\n{note}\n{slowest}\n{times}."


def _speed(row: dict, baseline: dict) -> float:
    return baseline["step_us"] / row["step_us"] if row["step_us"] else 1.0
