"""The flags that plan, simulate and compare share, and the `PlanRequest` that they make: files and numbers, read and checked once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import naming_flags
from megatron_scalemoe.cli.file_kinds import wanted
from megatron_scalemoe.cli.planning.cost_flags import cost_from_args
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.defaults import SOLVER, TIME_BUDGET_S

if TYPE_CHECKING:
    from megatron_scalemoe.placement.plan_trace import PlanRequest
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.simulate.engine import Replanning
    from megatron_scalemoe.topology.graph import Topology
    from megatron_scalemoe.traffic.trace import RoutingTrace


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """`--topology` and `--trace`, both needed."""
    parser.add_argument("--topology", type=Path, required=True, metavar="FILE", help="the cluster, from scalemoe topology")
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="the routing, from scalemoe trace")


def add_planning_flags(parser: argparse.ArgumentParser, *, solver: bool = True, replanning: bool = True) -> None:
    """`--solver`, `--replicas`, `--time-budget`, `--seed`; `--replan-every`, `--replan-lag`."""
    group = parser.add_argument_group("planning")
    if solver:
        group.add_argument("--solver", metavar="NAME", help=f"{SOLVER} (default), or a name that `compare` shows")
    group.add_argument("--replicas", type=int, metavar="N", help="extra slots per layer, in total over all ranks (0)")
    group.add_argument("--time-budget", type=float, metavar="S", help=f"most seconds for a plan of all layers ({TIME_BUDGET_S:g})")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the solver (%(default)s)")
    if replanning:
        group.add_argument("--replan-every", type=int, metavar="N", help="make a new plan every N recorded steps (1, with --replan-lag)")
        group.add_argument(
            "--replan-lag", type=int, metavar="N", help="its newest counts are N recorded steps old (1, with --replan-every)"
        )


def add_split_flag(parser: argparse.ArgumentParser) -> None:
    """`--split`."""
    text = "tokens between copies of an expert (%(default)s)"
    parser.add_argument("--split", choices=("balanced", "even"), default="balanced", help=text)


def request_from_args(args: argparse.Namespace) -> PlanRequest:
    """Reads the files, and checks the flags. Raises `ScaleMoEError` naming the file or the flag."""
    from megatron_scalemoe.placement.plan_trace import PlanRequest

    trace = _load_trace(args.trace)
    topology = load_topology_for(args.topology, trace.num_ranks, args.trace, quiet=args.quiet)
    options = {
        "solver": getattr(args, "solver", None) or SOLVER,
        "replicas": args.replicas or 0,
        "seed": args.seed,
        "time_budget_s": TIME_BUDGET_S if args.time_budget is None else args.time_budget,
        "last_steps": getattr(args, "last_steps", None),
        "shared": getattr(args, "shared", False),
    }
    cost = cost_from_args(args, trace.meta)
    with naming_flags(time_budget_s="--time-budget"):
        return PlanRequest(trace=trace, topology=topology, cost=cost, **options)


def replanning_from_args(args: argparse.Namespace) -> Replanning | None:
    """None for one plan from the whole trace."""
    from megatron_scalemoe.simulate.engine import Replanning

    every, lag = args.replan_every, args.replan_lag
    if every is None and lag is None:
        return None
    with naming_flags(every="--replan-every", lag="--replan-lag"):
        return Replanning(every=1 if every is None else every, lag=1 if lag is None else lag)


def load_topology_for(path: Path, num_ranks: int, ranks_of: Path, *, quiet: bool = False) -> Topology:
    """The first ranks of a topology. Raises `ScaleMoEError` if it has fewer than the file `ranks_of` needs."""
    from megatron_scalemoe.topology.topology_file import load_topology

    with wanted("topology", path, "--topology"):
        topology = load_topology(path)
    if topology.num_ranks < num_ranks:
        problem = f"{path} must have a GPU for each of the {num_ranks} ranks of {ranks_of}"
        raise ScaleMoEError(problem, found=f"{topology.num_ranks} GPUs", try_=f"a topology of {num_ranks} GPUs or more")
    if topology.num_ranks > num_ranks and not quiet:
        note = f"{path} has {topology.num_ranks} GPUs, {ranks_of} {num_ranks} ranks: the first GPUs are used"
        print(f"scalemoe: note: {note}", file=sys.stderr)
    return topology.subset(num_ranks)


def load_trace_file(path: Path) -> RoutingTrace:
    """Raises `ScaleMoEError` as `load_trace`, or that the file is of another kind."""
    from megatron_scalemoe.traffic.trace import load_trace

    with wanted("trace", path, "--trace"):
        return load_trace(path)


def _load_trace(path: Path) -> RoutingTrace:
    """Raises `ScaleMoEError` if its experts cannot be placed."""
    trace = load_trace_file(path)
    if trace.num_experts % trace.num_ranks:
        problem, found = f"{path}: the number of experts must be a multiple of the ranks", f"{trace.num_experts} on {trace.num_ranks}"
        raise ScaleMoEError(problem, found=found, try_="a trace of ranks that divide the experts")
    return trace


def load_plan_for(plan_path: Path, trace: RoutingTrace, trace_path: Path, flag: str = "--plan") -> PlacementPlan:
    """The plan, which must be for the layers, ranks and experts of the trace. Raises `ScaleMoEError` naming both files."""
    from megatron_scalemoe.plan.fit import check_fit
    from megatron_scalemoe.plan.placement_plan import load_plan

    with wanted("plan", plan_path, flag):
        plan = load_plan(plan_path)
    check_fit({str(trace_path): trace, str(plan_path): plan}, try_="scalemoe plan with this trace")
    return plan
