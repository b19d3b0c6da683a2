"""`scalemoe simulate`: replay a trace on a cluster, under a plan or with replanning, beside the contiguous placement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
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
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.simulate.engine import Replanning, Replay

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
    add_split_flag(parser)
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="also draw the last step, for ui.perfetto.dev (Chrome trace JSON)")
    add_planning_flags(parser)
    add_output_flags(parser)
    add_cost_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Replays, prints and writes."""
    planning = [name for name in PLANNING_FLAGS if getattr(args, name) is not None]
    if args.plan is not None and planning:
        raise ScaleMoEError(f"--{planning[0].replace('_', '-')} makes a plan, --plan gives one: use one of them")
    check_output(args.output, force=args.force)
    check_output(args.timeline, force=args.force, flag="--timeline")
    from megatron_scalemoe.cost.bottleneck import bottleneck
    from megatron_scalemoe.simulate.engine import replay

    replanning = replanning_from_args(args)
    request = request_from_args(args)
    policy, plans = _policy(args, request, replanning) if planning or args.plan else (BASELINE, None)
    options = {"even": args.split == "even", "warm_up_steps": replanning.lag if replanning else 0}
    replayed = baseline = replay(request.trace, request.contiguous, request.links, request.cost, **options)
    if plans is not None:
        with progress_bar(args, request.trace.num_steps, "step") as bar:
            advance = {"progress": lambda step: bar.update(step - bar.n)}
            replayed = replay(request.trace, plans, request.links, request.cost, **options, **advance)
    slowest = bottleneck(replayed.worst_step, request.links)
    result = _result(args, policy, replayed, baseline) | {"bottleneck": slowest._asdict(), "cost": request.cost.model_dump()}
    emit(args, result, format_result(result, compared=plans is not None))
    if args.timeline is not None:
        _write_timeline(args, replayed, request)
    return OK


def _policy(
    args: argparse.Namespace, request: PlanRequest, replanning: Replanning | None
) -> tuple[str, PlacementPlan | Iterable[PlacementPlan]]:
    """(name, the plan or one for each step)."""
    if args.plan is not None:
        return args.plan.name, load_plan_for(args.plan, request.trace, args.trace)
    from megatron_scalemoe.simulate.policies import planned_steps

    name = f"{request.solver} + {request.replicas} replicas" if request.replicas else request.solver
    if replanning is not None:
        name += f", every {replanning.every}, lag {replanning.lag}"
    return name, planned_steps(request, replanning)


def _write_timeline(args: argparse.Namespace, replay: Replay, request: PlanRequest) -> None:
    from megatron_scalemoe.simulate.timeline import drawn_layers, write_timeline

    steps, layers = replay.total_us.shape
    write_timeline(replay, request.topology.node_of_rank, steps - 1, args.timeline, force=args.force)
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
    from megatron_scalemoe.cost.bottleneck import Bottleneck

    slowest = Bottleneck(**result["bottleneck"])
    columns = [result["baseline"], result] if compared else [result]
    table = format_table(["", *(c["policy"] for c in columns)], [[label, *(show(c) for c in columns)] for label, show in ROWS])
    steps = "1 recorded step" if result["steps"] == 1 else f"{result['steps']} recorded steps"
    counted = f"Mean of {steps} (one micro-batch, {result['layers']} MoE layers, {result['ranks']} ranks)"
    if result["warm_up_steps"]:
        counted += f", without the {result['warm_up_steps']} before the first plan"
    if result["idle_steps"]:
        counted += f", without {result['idle_steps']} that have no tokens"
    return f"{table}\n\n{counted}.\n{_meaning(result) if compared else _alone(result)}\n{slowest}"


def _meaning(result: dict) -> str:
    before, faster = result["baseline"], result["speedup"]
    pace = f"{faster:.2f}x faster than" if faster >= 1.005 else f"Slower, {faster:.2f}x the speed of" if faster <= 0.995 else "As fast as"
    balance = f"max/mean rank load {before['max_over_mean_mean']:.2f} -> {result['max_over_mean_mean']:.2f}"
    waits = f"{result['wait_share']:.1%} of the step is waiting for the most loaded rank (was {before['wait_share']:.1%})"
    return f"{pace} the contiguous placement: {balance}; {waits}."


def _alone(result: dict) -> str:
    waits = f"{result['wait_share']:.1%} of the step is waiting for the most loaded rank"
    return f"Under the contiguous placement {waits}. To compare: --plan FILE, or --replicas {result['ranks']}."
