"""`scalemoe bench split`: the per-step split of tokens between copies beside the even split, one step after the plan."""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.environment import describe_environment
from megatron_scalemoe.errors import ScaleMoEError

SPLITS = ("even", "balanced")
# The plan is the EPLB-shaped one: what is measured is the split.
SOLVER = "hierarchical"


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench split` to the command line."""
    text = "the per-step split of tokens between copies of experts, beside the even split: time and balance"
    parser = kinds.add_parser("split", help=text, description=text, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--nodes", type=int, default=8, help="equal nodes that the ranks are spread over (default %(default)s)")
    parser.add_argument("--experts", type=int, default=256, help="a multiple of --ranks (default %(default)s)")
    parser.add_argument("--topk", type=int, default=8, help="experts per token (default %(default)s)")
    parser.add_argument("--replicas", type=int, default=64, help="extra slots, in total over all ranks (default %(default)s)")
    parser.add_argument("--skew", type=float, default=0.8, help="Zipf exponent of the experts' load (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="layers, one for each seed from 0 (default %(default)s)")
    parser.add_argument("--iters", type=int, default=50, help="measured calls for each layer (default %(default)s)")
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Measures both splits in turns on the same layers."""
    validate(args)
    check_output(args.output, force=args.force)
    times_ms: dict[str, list[float]] = {name: [] for name in SPLITS}
    balance: dict[str, list[float]] = {name: [] for name in SPLITS}
    for seed in range(args.seeds):
        for name, (layer_ms, max_over_mean) in measure_layer(args, seed).items():
            times_ms[name] += layer_ms
            balance[name].append(max_over_mean)
    rows = [
        {
            "split": name,
            "median_ms": statistics.median(times_ms[name]),
            "p90_ms": statistics.quantiles(times_ms[name], n=10)[-1],
            "max_over_mean": statistics.mean(balance[name]),
        }
        for name in SPLITS
    ]
    emit(args, {"rows": rows, "env": describe_environment(["scalemoe", *sys.argv[1:]])}, format_result(rows))
    return OK


def validate(args: argparse.Namespace) -> None:
    """Raises `ScaleMoEError` for numbers that cannot be."""
    for name in ("ranks", "nodes", "experts", "topk", "seeds", "iters"):
        if getattr(args, name) < 1:
            raise ScaleMoEError(f"--{name} must be 1 or more", found=getattr(args, name))
    if args.ranks % args.nodes:
        raise ScaleMoEError("--ranks must be a multiple of --nodes", found=f"--ranks {args.ranks} --nodes {args.nodes}")


def measure_layer(args: argparse.Namespace, seed: int) -> dict[str, tuple[list[float], float]]:
    """Of each split: (milliseconds of each call, max/mean rank load), for the step after the one that the plan was made from."""
    import numpy as np

    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.placement.objective import slots_of_hosts
    from megatron_scalemoe.placement.problem import LayerProblem
    from megatron_scalemoe.placement.solve import solve_layer
    from megatron_scalemoe.plan.split import split_tokens
    from megatron_scalemoe.topology.ports import two_level_ports
    from megatron_scalemoe.traffic.synthetic import synthesize

    sizes = {"ranks": args.ranks, "experts": args.experts, "topk": args.topk}
    trace = synthesize("zipf", **sizes, layers=1, steps=2, tokens_per_rank=4096, skew=args.skew, seed=seed, coactivation=False)
    ports = two_level_ports(args.nodes, args.ranks // args.nodes)
    problem = LayerProblem(traffic=trace.layer(0, slice(0, 1)), ports=ports, cost=CostModel(), replicas=args.replicas)
    slots_P = slots_of_hosts(solve_layer(problem, SOLVER).solution.hosts)
    counts_GE, measured = trace.counts[1, 0].astype(np.int64), {name: [] for name in SPLITS}
    for _ in range(args.iters):
        for name in SPLITS:
            began = time.perf_counter()
            tokens_GP = split_tokens(counts_GE, slots_P, args.ranks, ports.node_of_rank, even=name == "even")
            measured[name].append((1e3 * (time.perf_counter() - began), tokens_GP.sum(axis=0).reshape(args.ranks, -1).sum(axis=1)))
    return {name: ([ms for ms, _ in calls], float(calls[0][1].max() / calls[0][1].mean())) for name, calls in measured.items()}


def format_result(rows: list[dict]) -> str:
    """The table that people read."""
    cells = [[row["split"], f"{row['median_ms']:.2f}", f"{row['p90_ms']:.2f}", f"{row['max_over_mean']:.3f}"] for row in rows]
    return format_table(["split", "median ms", "p90 ms", "max/mean"], cells)
