"""The flags that make a `CostModel`, shared by every command that prices a placement."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_scalemoe.cli.common import add_option_flags, given_options, naming_flags
from megatron_scalemoe.cost.model import CostModel

_FROM_TRACE = ("hidden_size", "ffn_hidden_size")


def add_cost_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of `CostModel`. What is not given comes from the trace, else is `CostModel`'s default."""
    group = parser.add_argument_group("cost model", "one MoE layer, one micro-batch, forward and backward")
    add_option_flags(group, CostModel)
    group.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="results of `scalemoe bench dispatch` with different --tokens: --exchange-overhead-us is fitted to them",
    )


def cost_from_args(args: argparse.Namespace, meta: Mapping[str, object] | None = None) -> CostModel:
    """The `CostModel` of the flags; sizes that are not given come from a trace's `meta`. Raises `ScaleMoEError` on a bad value.

    args: of a parser with `add_cost_flags` and `common.add_output_flags`.
    """
    given = given_options(args, CostModel)
    recorded = {name: meta[name] for name in _FROM_TRACE if meta and name in meta and name not in given}
    with naming_flags(**{name: f"the trace's meta: {name}" for name in recorded}):
        cost = CostModel(**recorded, **given)
    if args.calibration is None or "exchange_overhead_us" in given:
        return cost
    from megatron_scalemoe.cost.calibrate import fit_bench

    fit = fit_bench(args.calibration)
    if not args.quiet:
        worst = abs(fit.residuals).max()
        text = (
            f"{fit.overhead_us:.1f} us + a rank's bytes / {fit.bandwidth_GBps:.3g} GB/s, {fit.residuals.size} points, worst {worst:.0%} off"
        )
        print(f"scalemoe: calibration: one exchange takes {text}; links keep the topology's bandwidth", file=sys.stderr)
    return fit.apply(cost)
