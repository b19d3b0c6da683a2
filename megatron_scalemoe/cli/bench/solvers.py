"""`scalemoe bench solvers`: every placement solver on the same synthetic layers, beside the contiguous placement and the lower bound."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.environment import describe_environment
from megatron_scalemoe.errors import ScaleMoEError

if TYPE_CHECKING:
    from megatron_scalemoe.placement.problem import LayerProblem

BASELINE = "contiguous"
# Too slow, or not meant to win: only when asked for.
ON_REQUEST = ("exact", "genetic_paper")


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench solvers` to the command line."""
    text = "placement solvers: cost, gap to the lower bound and time, on synthetic layers of several seeds"
    parser = kinds.add_parser("solvers", help=text, description=text, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="equal nodes that the ranks are spread over (default %(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="a multiple of --ranks (default %(default)s)")
    parser.add_argument("--topk", type=int, default=2, help="experts per token (default %(default)s)")
    parser.add_argument("--kind", default="clustered", help="of synthetic traffic, as in `trace synth` (default %(default)s)")
    parser.add_argument("--replicas", type=int, default=0, help="extra slots, in total over all ranks (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="layers to place, one for each seed from 0 (default %(default)s)")
    parser.add_argument("--time-budget", type=float, default=0.9, metavar="S", help="seconds for a layer (default %(default)s)")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help=f"default all but {', '.join(ON_REQUEST)}; {BASELINE} always runs")
    add_cost_flags(parser)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Places every layer with every solver and prints the comparison."""
    from megatron_scalemoe.placement.solve import SOLVERS, check_solver, solve_layer

    validate(args)
    check_output(args.output, force=args.force)
    wanted = args.solvers or [name for name in SOLVERS if name not in ON_REQUEST]
    for name in wanted:
        check_solver(name)
    solvers = list(dict.fromkeys([BASELINE, *wanted]))
    runs: dict[str, list[dict]] = {name: [] for name in solvers}
    for seed in range(args.seeds):
        problem = synthetic_problem(args, seed)
        for name in solvers:
            found = solve_layer(problem, name, seed=seed, time_budget_s=args.time_budget)
            measured = {"cost_us": found.cost_us, "lower_bound_us": found.lower_bound_us, "gap": found.gap, "seconds": found.seconds}
            runs[name].append({"seed": seed, **measured})
        if not args.quiet:
            print(f"seed {seed}: {seed + 1} of {args.seeds} layers placed", file=sys.stderr)
    result = {"rows": [summary(name, runs[name], runs[BASELINE]) for name in solvers]}
    result["env"] = describe_environment(["scalemoe", *sys.argv[1:]])
    emit(args, result, format_result(result))
    return OK


def validate(args: argparse.Namespace) -> None:
    """Raises `ScaleMoEError` for numbers that no layer could have."""
    for name in ("ranks", "nodes", "experts", "topk", "seeds"):
        if getattr(args, name) < 1:
            raise ScaleMoEError(f"--{name} must be 1 or more", found=getattr(args, name))
    if args.ranks % args.nodes:
        raise ScaleMoEError("--ranks must be a multiple of --nodes", found=f"--ranks {args.ranks} --nodes {args.nodes}")
    if args.experts % args.ranks:
        raise ScaleMoEError("--experts must be a multiple of --ranks", found=f"--experts {args.experts} --ranks {args.ranks}")
    if not (math.isfinite(args.time_budget) and args.time_budget > 0):
        raise ScaleMoEError("--time-budget must be a number of seconds above 0", found=args.time_budget)


def synthetic_problem(args: argparse.Namespace, seed: int) -> LayerProblem:
    """One layer of synthetic traffic on equal nodes of equal ranks (`topology.ports.two_level_ports`)."""
    from megatron_scalemoe.placement.problem import LayerProblem
    from megatron_scalemoe.topology.ports import two_level_ports
    from megatron_scalemoe.traffic.synthetic import synthesize

    trace = synthesize(args.kind, ranks=args.ranks, experts=args.experts, layers=1, topk=args.topk, seed=seed)
    ports = two_level_ports(args.nodes, args.ranks // args.nodes)
    return LayerProblem(traffic=trace.layer(0), ports=ports, cost=cost_from_args(args), replicas=args.replicas)


def summary(solver: str, runs: list[dict], baseline: list[dict]) -> dict:
    """One row: means over the seeds, and the worst gap and time."""
    ratios = [run["cost_us"] / base["cost_us"] if base["cost_us"] else 1.0 for run, base in zip(runs, baseline, strict=True)]
    count = len(runs)
    return {
        "solver": solver,
        "cost_us": sum(run["cost_us"] for run in runs) / count,
        "ratio_to_contiguous": sum(ratios) / count,
        "gap": sum(run["gap"] for run in runs) / count,
        "gap_max": max(run["gap"] for run in runs),
        "seconds": sum(run["seconds"] for run in runs) / count,
        "seconds_max": max(run["seconds"] for run in runs),
        "runs": runs,
    }


def format_result(result: dict) -> str:
    """The table that people read."""
    headers = ["solver", "cost us", "ratio to contiguous", "gap %", "worst gap %", "seconds", "longest s"]
    rows = [
        [
            row["solver"],
            f"{row['cost_us']:.1f}",
            f"{row['ratio_to_contiguous']:.4f}",
            f"{100 * row['gap']:.2f}",
            f"{100 * row['gap_max']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['seconds_max']:.3f}",
        ]
        for row in result["rows"]
    ]
    return format_table(headers, rows)
