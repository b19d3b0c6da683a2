"""`scalemoe bench split`: the per-step split of tokens between copies beside the even split, one step after the plan."""

from __future__ import annotations

import argparse
import statistics
import time

from pydantic import Field

from megatron_scalemoe.cli.bench.layers import SyntheticLayers
from megatron_scalemoe.cli.common import add_option_flags, add_output_flags, check_output, emit_measured, format_table, options_from_args

SPLITS = ("even", "balanced")
DEFAULTS = {"ranks": 64, "nodes": 8, "experts": 256, "topk": 8, "replicas": 64}
# The plan is the EPLB-shaped one: what is measured is the split.
SOLVER = "hierarchical"


class SplitLayers(SyntheticLayers):
    """What is split."""

    skew: float = Field(default=0.8, ge=0)
    """Zipf exponent of the experts' load"""

    iters: int = Field(default=50, ge=1)
    """measured calls for each layer"""


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench split` to the command line."""
    text = "the per-step split of tokens between copies of experts, beside the even split: time and balance"
    parser = kinds.add_parser("split", help=text, description=text, allow_abbrev=False)
    add_option_flags(parser, SplitLayers, **DEFAULTS)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Measures both splits in turns on the same layers."""
    layers = options_from_args(args, SplitLayers)
    check_output(args.output, force=args.force)
    times_ms: dict[str, list[float]] = {name: [] for name in SPLITS}
    balance: dict[str, list[float]] = {name: [] for name in SPLITS}
    for seed in range(layers.seeds):
        for name, (layer_ms, max_over_mean) in measure_layer(layers, seed).items():
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
    return emit_measured(args, {"rows": rows}, format_result(rows))


def measure_layer(layers: SplitLayers, seed: int) -> dict[str, tuple[list[float], float]]:
    """Of each split: (milliseconds of each call, max/mean rank load), for the step after the one that the plan was made from."""
    import numpy as np

    from megatron_scalemoe.cost.layer import max_over_mean
    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.placement.objective import slots_of_hosts
    from megatron_scalemoe.placement.problem import LayerProblem
    from megatron_scalemoe.placement.solve import solve_layer
    from megatron_scalemoe.plan.split import split_tokens
    from megatron_scalemoe.traffic.synthetic import synthesize

    sizes = {"ranks": layers.ranks, "experts": layers.experts, "topk": layers.topk}
    trace = synthesize("zipf", **sizes, layers=1, steps=2, tokens_per_rank=4096, skew=layers.skew, seed=seed, coactivation=False)
    ports = layers.ports()
    problem = LayerProblem(traffic=trace.layer(0, slice(0, 1)), ports=ports, cost=CostModel(), replicas=layers.replicas)
    slots_P = slots_of_hosts(solve_layer(problem, SOLVER).solution.hosts)
    counts_GE, measured = trace.counts[1, 0].astype(np.int64), {name: [] for name in SPLITS}
    for _ in range(layers.iters):
        for name in SPLITS:
            began = time.perf_counter()
            tokens_GP = split_tokens(counts_GE, slots_P, layers.ranks, ports.node_of_rank, even=name == "even")
            measured[name].append((1e3 * (time.perf_counter() - began), tokens_GP.sum(axis=0).reshape(layers.ranks, -1).sum(axis=1)))
    return {name: ([ms for ms, _ in calls], max_over_mean(calls[0][1])) for name, calls in measured.items()}


def format_result(rows: list[dict]) -> str:
    """The table that people read."""
    cells = [[row["split"], f"{row['median_ms']:.2f}", f"{row['p90_ms']:.2f}", f"{row['max_over_mean']:.3f}"] for row in rows]
    return format_table(["split", "median ms", "p90 ms", "max/mean"], cells)
