"""`scalemoe bench solvers`: every placement solver on the same synthetic layers, beside the contiguous placement and the lower bound."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_scalemoe.cli.bench.layers import SyntheticLayers
from megatron_scalemoe.cli.common import add_option_flags, add_output_flags, check_output, emit_measured, format_table, options_from_args
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.placement.defaults import BASELINE

if TYPE_CHECKING:
    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.placement.problem import LayerProblem

# Too slow, or not meant to win: only when asked for.
ON_REQUEST = ("exact", "genetic_paper")


class SolverLayers(SyntheticLayers):
    """What the solvers are tried on."""

    kind: str = "clustered"
    """of synthetic traffic, as in `trace synth`"""

    time_budget: float = Field(default=0.9, gt=0)
    """seconds for a layer, at most"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench solvers` to the command line."""
    text = "placement solvers: cost, gap to the lower bound and time, on synthetic layers of several seeds"
    parser = kinds.add_parser("solvers", help=text, description=text, allow_abbrev=False)
    add_option_flags(parser, SolverLayers)
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help=f"default all but {', '.join(ON_REQUEST)}; {BASELINE} always runs")
    add_cost_flags(parser)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Places every layer with every solver and prints the comparison."""
    from megatron_scalemoe.placement.solve import SOLVERS, check_solver, solve_layer

    layers, cost = options_from_args(args, SolverLayers), cost_from_args(args)
    check_output(args.output, force=args.force)
    wanted = args.solvers or [name for name in SOLVERS if name not in ON_REQUEST]
    for name in wanted:
        check_solver(name)
    solvers = list(dict.fromkeys([BASELINE, *wanted]))
    runs: dict[str, list[dict]] = {name: [] for name in solvers}
    for seed in range(layers.seeds):
        problem = synthetic_problem(layers, cost, seed)
        for name in solvers:
            found = solve_layer(problem, name, seed=seed, time_budget_s=layers.time_budget)
            measured = {key: getattr(found, key) for key in ("cost_us", "lower_bound_us", "gap", "seconds", "cut")}
            runs[name].append({"seed": seed, **measured})
        if not args.quiet:
            print(f"seed {seed}: {seed + 1} of {layers.seeds} layers placed", file=sys.stderr)
    result = {"rows": [summary(name, runs[name], runs[BASELINE]) for name in solvers]}
    return emit_measured(args, result, format_result(result))


def synthetic_problem(layers: SolverLayers, cost: CostModel, seed: int) -> LayerProblem:
    """The layer of a seed."""
    from megatron_scalemoe.placement.problem import LayerProblem
    from megatron_scalemoe.traffic.synthetic import synthesize

    trace = synthesize(layers.kind, ranks=layers.ranks, experts=layers.experts, layers=1, topk=layers.topk, seed=seed)
    return LayerProblem(traffic=trace.layer(0), ports=layers.ports(), cost=cost, replicas=layers.replicas)


def summary(solver: str, runs: list[dict], baseline: list[dict]) -> dict:
    """One row: means over the seeds, and the worst gap and time; gaps None unless each seed has one."""
    gaps = [run["gap"] for run in runs if run["gap"] is not None]
    bounded = len(gaps) == len(runs)
    ratios = [run["cost_us"] / base["cost_us"] if base["cost_us"] else 1.0 for run, base in zip(runs, baseline, strict=True)]
    count = len(runs)
    return {
        "solver": solver,
        "cost_us": sum(run["cost_us"] for run in runs) / count,
        "ratio_to_contiguous": sum(ratios) / count,
        "gap": sum(gaps) / count if bounded else None,
        "gap_max": max(gaps) if bounded else None,
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
            *("" if row[name] is None else f"{100 * row[name]:.2f}" for name in ("gap", "gap_max")),
            f"{row['seconds']:.3f}",
            f"{row['seconds_max']:.3f}",
        ]
        for row in result["rows"]
    ]
    return format_table(headers, rows)
