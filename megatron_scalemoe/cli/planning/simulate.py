"""`scalemoe simulate`: replay a trace on a cluster, under a plan or with replanning, beside the contiguous placement."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable
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
from megatron_scalemoe.placement.defaults import SOLVER
from megatron_scalemoe.units import format_bytes

if TYPE_CHECKING:
    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.simulate.engine import Replay
    from megatron_scalemoe.topology.graph import Topology
    from megatron_scalemoe.topology.routes import Routes
    from megatron_scalemoe.traffic.trace import RoutingTrace

BASELINE = "contiguous"
PLANNING_FLAGS = ("solver", "replicas", "replan_every", "replan_lag", "time_budget")


def _ms(name: str) -> Callable[[dict], str]:
    return lambda summary: f"{summary[name] / 1e3:.3f} ms"


ROWS: tuple[tuple[str, Callable[[dict], str]], ...] = (
    ("step", _ms("step_us")),
    ("  dispatch", _ms("dispatch_us")),
    ("  combine", _ms("combine_us")),
    ("  compute", _ms("compute_us")),
    ("  replicas", _ms("replica_us")),
    ("waiting", lambda s: f"{s['wait_share']:.1%}"),
    ("max/mean rank load, mean", lambda s: f"{s['max_over_mean_mean']:.3f}"),
    ("max/mean rank load, p95", lambda s: f"{s['max_over_mean_p95']:.3f}"),
    ("bytes scale-out", lambda s: format_bytes(s["bytes_scale_out"])),
    ("bytes scale-up", lambda s: format_bytes(s["bytes_scale_up"])),
    ("plan changes", lambda s: f"{s['replans']}"),
    ("migrated, in all", lambda s: format_bytes(s["migrated_bytes"])),
    ("migration, in all", _ms("migration_us")),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `simulate` to the command line."""
    about = "replay a trace on a cluster: time, balance and bytes of each step"
    parser = commands.add_parser("simulate", help=about, allow_abbrev=False, description=__doc__)
    add_input_flags(parser)
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan, from scalemoe plan; or plan now with the flags below")
    parser.add_argument(
        "--split", choices=("balanced", "even"), default="balanced", help="tokens between copies of an expert (%(default)s)"
    )
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="also draw the last step, for ui.perfetto.dev (Chrome trace JSON)")
    add_replanning_flags(add_planning_flags(parser))
    add_cost_flags(parser)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Replays, prints and writes."""
    validate(args)
    check_output(args.output, force=args.force)
    if args.timeline is not None:
        check_output(args.timeline, force=args.force, flag="--timeline")
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.simulate.engine import replay_fixed, replay_plans
    from megatron_scalemoe.topology.routes import compute_routes

    topology, trace = load_topology_and_trace(args.topology, args.trace, quiet=args.quiet)
    cost = cost_from_args(args, trace.meta)
    routes = compute_routes(topology)
    contiguous = PlacementPlan.contiguous(trace.num_layers, trace.num_ranks, trace.num_experts)
    policy, plans, warm_up_steps = _policy(args, trace, topology, routes, cost)
    inputs = {"routes": routes, "topology": topology, "cost": cost, "even": args.split == "even", "warm_up_steps": warm_up_steps}
    replay = baseline = replay_fixed(trace, contiguous, **inputs)
    if plans is not None:
        with progress_bar(args, trace.num_steps, "step") as progress:
            replay = replay_plans(trace, plans, progress=lambda step: progress.update(step - progress.n), **inputs)
    result = _result(args, policy, replay, baseline) | {"cost": dataclasses.asdict(cost)}
    emit(args, result, format_result(result, compared=plans is not None))
    if args.timeline is not None:
        _write_timeline(args, replay, topology)
    return OK


def validate(args: argparse.Namespace) -> None:
    """Raises `ScaleMoEError` for flags that do not go together or are out of range."""
    for name in PLANNING_FLAGS:
        if args.plan is not None and getattr(args, name) is not None:
            raise ScaleMoEError(f"--{name.replace('_', '-')} makes a plan, --plan gives one: use one of them")
    check_planning_flags(args)


def _policy(
    args: argparse.Namespace, trace: RoutingTrace, topology: Topology, routes: Routes, cost: CostModel
) -> tuple[str, Iterable[PlacementPlan] | None, int]:
    """(name, a plan for each step or None for the baseline alone, warm-up steps before the first plan)."""
    if args.plan is not None:
        return args.plan.name, [load_plan_for(args.plan, trace, args.trace, topology)] * trace.num_steps, 0
    if all(getattr(args, name) is None for name in PLANNING_FLAGS):
        return BASELINE, None, 0
    from megatron_scalemoe.topology.ports import ports_of

    planning, solver = Planning.from_args(args), args.solver or SOLVER
    plans = planned_steps(solver, planning, trace, ports_of(topology, routes), cost)
    name = f"{solver} + {planning.replicas} replicas" if planning.replicas else solver
    if planning.replan_every is not None:
        name += f", every {planning.replan_every}, lag {planning.replan_lag}"
    return name, plans, planning.warm_up_steps


def _write_timeline(args: argparse.Namespace, replay: Replay, topology: Topology) -> None:
    from megatron_scalemoe.simulate.timeline import drawn_layers, write_timeline

    steps, layers = replay.total_us.shape
    write_timeline(replay, topology.node_of_rank, steps - 1, args.timeline, force=args.force)
    if drawn_layers(replay) < layers and not args.quiet:
        print(f"scalemoe: note: {args.timeline} shows {drawn_layers(replay)} of {layers} layers", file=sys.stderr)


def _result(args: argparse.Namespace, policy: str, replay: Replay, baseline: Replay) -> dict:
    _, layers, ranks = replay.load.shape
    own, other = replay.summary(), baseline.summary()
    return {
        "policy": policy,
        **own,
        "speedup": other["step_us"] / own["step_us"] if own["step_us"] else 1.0,
        "split": args.split,
        "topology": str(args.topology),
        "trace": str(args.trace),
        "layers": layers,
        "ranks": ranks,
        "baseline": {"policy": BASELINE, **other},
    }


def format_result(result: dict, *, compared: bool) -> str:
    """The table that people read, and a line of what it means. compared: there is a policy beside the baseline."""
    columns = [result["baseline"], result] if compared else [result]
    table = format_table(["", *(c["policy"] for c in columns)], [[label, *(show(c) for c in columns)] for label, show in ROWS])
    steps = "1 recorded step" if result["steps"] == 1 else f"{result['steps']} recorded steps"
    counted = f"Mean of {steps} (one micro-batch, {result['layers']} MoE layers, {result['ranks']} ranks)"
    if result["warm_up_steps"]:
        counted += f", without the {result['warm_up_steps']} before the first plan"
    return f"{table}\n\n{counted}.\n{_meaning(result) if compared else _alone(result)}"


def _meaning(result: dict) -> str:
    before, faster = result["baseline"], result["speedup"]
    pace = f"{faster:.2f}x faster than" if faster >= 1.005 else f"Slower, {faster:.2f}x the speed of" if faster <= 0.995 else "As fast as"
    balance = f"max/mean rank load {before['max_over_mean_mean']:.2f} -> {result['max_over_mean_mean']:.2f}"
    waits = f"{result['wait_share']:.1%} of the step is waiting for the most loaded rank (was {before['wait_share']:.1%})"
    return f"{pace} the contiguous placement: {balance}; {waits}."


def _alone(result: dict) -> str:
    waits = f"{result['wait_share']:.1%} of the step is waiting for the most loaded rank"
    return f"Under the contiguous placement {waits}. To compare: --plan FILE, or --replicas {result['ranks']}."
