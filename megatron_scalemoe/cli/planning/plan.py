"""`scalemoe plan`: from a topology and a trace to a placement plan, with its cost beside the contiguous placement's."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, format_table, print_result, progress_bar
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags
from megatron_scalemoe.cli.planning.requests import add_input_flags, add_planning_flags, request_from_args
from megatron_scalemoe.placement.defaults import BASELINE
from megatron_scalemoe.units import format_bytes

if TYPE_CHECKING:
    from megatron_scalemoe.cost.plan import PlanCost
    from megatron_scalemoe.placement.plan_trace import PlanReport, PlanRequest

# Points of a search's course that are kept per layer, for the report.
_MAX_HISTORY = 50


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `plan` to the command line."""
    about = "find where experts, and replicas of the hot ones, should live"
    parser = commands.add_parser("plan", help=about, allow_abbrev=False, description=__doc__)
    add_input_flags(parser)
    add_planning_flags(parser, replanning=False)
    parser.add_argument("--last-steps", type=int, metavar="N", help="plan from the last N recorded steps (default: all)")
    parser.add_argument("--shared", action="store_true", help="one placement for all layers, from their mean traffic")
    add_output_flags(parser, output_help="write the plan to FILE")
    add_cost_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Plans, writes the plan, prints what it costs beside the contiguous placement."""
    check_output(args.output, force=args.force)
    from megatron_scalemoe.placement.plan_trace import plan_trace
    from megatron_scalemoe.plan.placement_plan import save_plan

    request = request_from_args(args)
    with progress_bar(args, request.trace.num_layers, "layer") as bar:
        report = plan_trace(request, progress=lambda done, _: bar.update(done - bar.n))
    if args.output is not None:
        save_plan(report.plan, args.output, force=args.force)
    result = _result(request, report, None if args.output is None else str(args.output))
    print_result(args, result, format_result(result))
    return OK


def _result(request: PlanRequest, report: PlanReport, written: str | None) -> dict:
    from megatron_scalemoe.cost.bottleneck import bottleneck

    return {
        "solver": report.plan.provenance["solver"],
        **_figures(report.cost),
        "lower_bound_us": report.lower_bound_us,
        "gap": report.gap,
        "cut": report.solved.cut,
        "seconds": report.solved.seconds,
        "idle_steps": request.trace.num_idle_steps,
        "replicas": int(report.plan.num_replicas.sum()),
        "replica_slots": report.plan.num_layers * request.replicas,
        "plan": written,
        "plan_hash": report.plan.content_hash,
        "baseline": {"solver": BASELINE, **_figures(report.baseline)},
        "layers": [
            {"cost_us": priced.total_us, "lower_bound_us": solved.lower_bound_us, "history": [list(p) for p in _thinned(solved.history)]}
            for priced, solved in zip(report.cost.layers, report.solved.layers, strict=True)
        ],
        "bottleneck": bottleneck(report.cost.layers, request.links)._asdict(),
        "cost": request.cost.model_dump(),
    }


def _figures(cost: PlanCost) -> dict:
    return {
        "cost_us": cost.total_us,
        "max_over_mean": float(cost.max_over_mean.mean()),
        "max_over_mean_worst": float(cost.max_over_mean.max()),
        "bytes_scale_out": cost.bytes_scale_out,
        "replica_us": cost.replica_us,
    }


def _thinned(history: tuple) -> list:
    """At most `_MAX_HISTORY` points, the last one among them."""
    step = -(-len(history) // _MAX_HISTORY)
    return list(history[::-1][::step][::-1])


def format_result(result: dict) -> str:
    """The table that people read, and what was written."""
    from megatron_scalemoe.cost.bottleneck import Bottleneck

    base, bounded = result["baseline"], result["gap"] is not None
    rows = [
        ["cost, all layers", f"{base['cost_us'] / 1e3:.3f} ms", f"{result['cost_us'] / 1e3:.3f} ms"],
        *([["lower bound", "", f"{result['lower_bound_us'] / 1e3:.3f} ms"], ["gap to it", "", f"{result['gap']:.1%}"]] if bounded else []),
        ["max/mean rank load, mean", f"{base['max_over_mean']:.3f}", f"{result['max_over_mean']:.3f}"],
        ["max/mean rank load, worst", f"{base['max_over_mean_worst']:.3f}", f"{result['max_over_mean_worst']:.3f}"],
        ["bytes scale-out", format_bytes(base["bytes_scale_out"]), format_bytes(result["bytes_scale_out"])],
        ["replicas used", "0", f"{result['replicas']} of {result['replica_slots']} slots"],
        ["  their price", "0.000 ms", f"{result['replica_us'] / 1e3:.3f} ms"],
        ["seconds", "", f"{result['seconds']:.2f}"],
    ]
    table = format_table(["", BASELINE, result["solver"]], rows)
    faster = base["cost_us"] / result["cost_us"] if result["cost_us"] else 1.0
    notes = [f"{faster:.2f}x the speed of the contiguous placement, for one micro-batch of the trace's mean traffic."]
    if result["idle_steps"]:
        notes.append(f"Recorded steps without tokens are left out of the mean: {result['idle_steps']} in the trace.")
    notes.append(str(Bottleneck(**result["bottleneck"])))
    if result["replicas"] < result["replica_slots"]:
        notes.append("Replica slots stay empty where the solver found no replica that saves more than it costs.")
    if result["cut"]:
        notes.append("The time budget cut the search short: another run may find another plan.")
    notes.append(f"Wrote {result['plan']}" if result["plan"] else "Nothing was written: add -o plan.json to keep the plan.")
    return "\n".join([table, "", *notes])
